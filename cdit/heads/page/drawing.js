// Colours, maps on canvases, and names.

// Matplotlib's inferno without its darkest part, 13 steps from 0.15 to 1.
const INFERNO = [
  [43, 11, 87], [74, 12, 107], [103, 22, 110], [132, 32, 107], [160, 42, 99], [189, 56, 83], [213, 74, 65],
  [233, 97, 43], [246, 126, 20], [252, 159, 7], [250, 194, 40], [243, 229, 93], [252, 255, 164],
];

/** 256 colours [red, green, blue] from 0 to the largest weight. */
const COLOURS = Array.from({ length: 256 }, (_, i) => {
  const place = (i / 255) * (INFERNO.length - 1);
  const [low, high] = [INFERNO[Math.floor(place)], INFERNO[Math.ceil(place)]];
  return low.map((from, c) => Math.round(from + (high[c] - from) * (place % 1)));
});

/** Draws weights from `first` on as a map, one pixel a patch, at (left, top); `cover` gives the opacity by share. */
function paintMap(context, weights, first, peak, left, top, cover) {
  const image = context.createImageData(data.columns, data.rows);
  for (let i = 0; i < PATCHES; i++) {
    const share = peak > 0 ? Math.min(1, weights[first + i] / peak) : 0;
    image.data.set(COLOURS[Math.round(255 * share)], 4 * i);
    image.data[4 * i + 3] = Math.round(255 * cover(share));
  }
  context.putImageData(image, left, top);
}

/** Opacity over a grey frame: hotter places are more opaque. */
const overFrame = (share) => 0.15 + 0.7 * Math.sqrt(share);
const opaque = () => 1;

/** Layout of the frames of a thumbnail: side by side, or in a square if there are many heads. */
const TILE_COLUMNS = data.heads * data.frames <= 32 ? data.frames : Math.ceil(Math.sqrt(data.frames));
const TILE_ROWS = Math.ceil(data.frames / TILE_COLUMNS);

/** All past frames' maps of a row on one small canvas, a transparent pixel between frames. */
function paintThumbnail(canvas, row, exists) {
  const context = canvas.getContext("2d");
  for (let frame = 0; frame < data.frames; frame++) {
    const left = (frame % TILE_COLUMNS) * (data.columns + 1);
    const top = Math.floor(frame / TILE_COLUMNS) * (data.rows + 1);
    paintMap(context, row.map, frame * PATCHES, row.peak, left, top, exists[frame] ? opaque : () => 0);
  }
}

/** Number with three digits, such as 0.0312, 12.3 or −4.5; very small ones such as 2e−5. */
function digits(value) {
  if (value === null) return "–";
  const small = value !== 0 && Math.abs(value) < 0.001;
  return withMinus(small ? value.toExponential(0) : String(Number(value.toPrecision(3))));
}

/** True minus signs, which no line breaks after. */
const withMinus = (text) => text.replace(/-(?=\d)/g, "−");

/** Share as percent: whole, or with a digit below ten. */
function percent(share) {
  const value = 100 * share;
  return `${value < 0.05 ? "0" : value < 9.95 ? value.toFixed(1) : value.toFixed(0)} %`;
}

/** Frames are named by their distance from the newest: …, −2, −1, 0. */
function frameName(frame) {
  const back = data.frames - 1 - frame;
  return back ? `−${back}` : "0";
}

function frameAge(frame) {
  const back = data.frames - 1 - frame;
  return back ? `${digits(back / data.fps)} s ago` : "now";
}

/** An element with properties and children; a property with a dash is an attribute. */
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

/** Scrolls a box, and nothing around it, until an element within it is visible. */
function reveal(item, box) {
  const [inner, outer] = [item.getBoundingClientRect(), box.getBoundingClientRect()];
  if (inner.top < outer.top + 2 * inner.height || inner.bottom > outer.bottom) {
    box.scrollTop += inner.top - outer.top - (outer.height - inner.height) / 2;
  }
  if (inner.left < outer.left || inner.right > outer.right) {
    box.scrollLeft += inner.left - outer.left - (outer.width - inner.width) / 2;
  }
}

/** Moves the focus within a group of which one element is in the tab order. */
function rove(items, current) {
  const focused = items.includes(document.activeElement);
  for (const item of items) item.tabIndex = item === current ? 0 : -1;
  if (focused) current.focus();
}
