// Pictures, heat maps and charts on canvases, and elements.

// Matplotlib's inferno without its darkest part, as on the page of cdit.heads.
const INFERNO = [
  [43, 11, 87], [74, 12, 107], [103, 22, 110], [132, 32, 107], [160, 42, 99], [189, 56, 83], [213, 74, 65],
  [233, 97, 43], [246, 126, 20], [252, 159, 7], [250, 194, 40], [243, 229, 93], [252, 255, 164],
];
const COLOURS = Array.from({ length: 256 }, (_, i) => {
  const place = (i / 255) * (INFERNO.length - 1);
  const [low, high] = [INFERNO[Math.floor(place)], INFERNO[Math.ceil(place)]];
  return low.map((from, c) => Math.round(from + (high[c] - from) * (place % 1)));
});

/** An element with properties and children; a property with a dash is an attribute. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-")) made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

function resized(canvas, width, height) {
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  return canvas.getContext("2d");
}

/** Draws RGB bytes (height × width × 3, from `first`) on a canvas of that size. */
export function paint(canvas, bytes, height, width, first = 0) {
  const context = resized(canvas, width, height);
  const image = context.createImageData(width, height);
  for (let from = first, to = 0; to < image.data.length; from += 3, to += 4) {
    image.data[to] = bytes[from];
    image.data[to + 1] = bytes[from + 1];
    image.data[to + 2] = bytes[from + 2];
    image.data[to + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

/** Draws numbers as heat, one pixel each; the hotter, the more opaque. */
export function heat(canvas, values, height, width, first, peak, opacity = (share) => 0.1 + 0.75 * Math.sqrt(share)) {
  const context = resized(canvas, width, height);
  const image = context.createImageData(width, height);
  for (let i = 0; i < height * width; i++) {
    const share = peak > 0 ? Math.min(1, values[first + i] / peak) : 0;
    image.data.set(COLOURS[Math.round(255 * share)], 4 * i);
    image.data[4 * i + 3] = Math.round(255 * opacity(share));
  }
  context.putImageData(image, 0, 0);
}

/** Lines over steps: each {values, colour}, values by step with gaps; low and high bound the axis. */
export function chart(canvas, lines, low, high) {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth * ratio, canvas.clientHeight * ratio];
  if (!width) return;
  const context = resized(canvas, Math.round(width), Math.round(height));
  context.clearRect(0, 0, width, height);
  context.strokeStyle = "#272c36";
  context.lineWidth = ratio;
  for (const share of [0.25, 0.5, 0.75]) {
    context.strokeRect(-1, Math.round(height * share) + 0.5, width + 2, 0);
  }
  const last = Math.max(24, ...lines.map((line) => line.values.length - 1));
  for (const { values, colour } of lines) {
    context.strokeStyle = colour;
    context.lineWidth = 2 * ratio;
    context.beginPath();
    values.forEach((value, step) => {
      context.lineTo((step / last) * width, height - ((Math.min(high, Math.max(low, value)) - low) / (high - low)) * height);
    });
    context.stroke();
  }
}

/** Number with true minus sign and digits. */
export const digits = (value, count = 2) => (value == null ? "–" : value.toFixed(count).replace("-", "−"));
