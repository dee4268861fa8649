// The page: its state, how it is rendered, and how it is changed.

const BYTES = new Blob([document.documentElement.outerHTML]).size; // before anything is added
const byId = (id) => document.getElementById(id);

const accuracy = ({ measures }) => measures?.["correspondence accuracy"] ?? -1;
/** The head that most often finds the true place; where that is unknown, the first of the middle layer. */
const FIRST = data.table.reduce((best, info) => (accuracy(info) > accuracy(best) ? info : best), {
  time: data.times[0],
  layer: data.layers[Math.floor(data.layers.length / 2)],
  head: 0,
});

/** The state. `time` is an index into the times, `row` and `column` are the patch's. */
const DEFAULTS = {
  sample: 0,
  time: data.times.indexOf(FIRST.time),
  layer: FIRST.layer,
  head: FIRST.head,
  row: Math.floor(data.rows / 2),
  column: Math.floor(data.columns / 2),
  mean: false,
  truth: false,
  sort: "head",
  descending: false,
};
const state = { ...DEFAULTS };
let weights = null; // by layer, of the current sample and time

// ---- state and address ----

const upTo = (count) => Array.from({ length: count }, (_, i) => i);
const CHOICES = {
  sample: upTo(data.samples.length),
  time: upTo(data.times.length),
  layer: data.layers,
  head: upTo(data.heads),
  row: upTo(data.rows),
  column: upTo(data.columns),
  mean: [false, true],
  truth: [false, true],
  sort: ["head", "type", ...MEASURES],
  descending: [false, true],
};

/** The state in the address; missing and invalid values take their defaults. */
function fromAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const choice = (name) => CHOICES[name].find((value) => String(value) === given.get(name)) ?? DEFAULTS[name];
  return Object.fromEntries(Object.keys(DEFAULTS).map((name) => [name, choice(name)]));
}

function toAddress() {
  const changed = Object.entries(state).filter(([name, value]) => value !== DEFAULTS[name]);
  try {
    history.replaceState(null, "", `#${new URLSearchParams(changed)}`);
  } catch {
    // A frame without an address of its own (srcdoc) has no place to store it.
  }
}

async function update(changes) {
  Object.assign(state, changes);
  const { sample, time } = state;
  const loaded = await loadWeights(sample, time);
  if (state.sample !== sample || state.time !== time) return; // changed in the meantime
  weights = loaded;
  render();
  toAddress();
}

const patchNumber = () => state.row * data.columns + state.column;

/** The attention of a head: of the chosen patch, or the mean. */
function rowOf(layer, head) {
  return state.mean ? weights.get(layer).mean(head) : weights.get(layer).patch(head, patchNumber());
}

/** The head some layers and heads further, clamped. */
function neighbour(layers, heads) {
  const clamp = (value, count) => Math.max(0, Math.min(count - 1, value));
  const layer = data.layers[clamp(data.layers.indexOf(state.layer) + layers, data.layers.length)];
  return { layer, head: clamp(state.head + heads, data.heads) };
}

// ---- rendering ----

const thumbnails = new Thumbnails(byId("thumbnails"), update);
const table = new HeadTable(byId("table"), update, update);

/** Radio buttons for a part of the state, `options` being [value, label, …more children]. */
function choices(container, name, options) {
  const inputs = options.map(([value, ...label]) => {
    const input = element("input", { type: "radio", name, onchange: () => update({ [name]: value }) });
    container.append(element("label", {}, input, element("span", {}, ...label)));
    return { value, input };
  });
  return () => inputs.forEach(({ value, input }) => (input.checked = state[name] === value));
}

const controls = [
  choices(byId("samples"), "sample", data.samples.map((sample, i) => [
    i, element("img", { src: sample.prediction ?? sample.target, alt: "" }), sample.name,
  ])),
  choices(byId("times"), "time", data.times.map((time, i) => [i, `t = ${digits(time)}`])),
  choices(byId("queries"), "mean", [[false, "chosen patch"], [true, "mean over all patches"]]),
  choices(byId("pictures"), "truth", [[false, "predicted"], [true, "true"]]),
];

const pastFrames = upTo(data.frames).map((frame) => {
  const parts = {
    image: element("img", { alt: "", draggable: false }),
    overlay: element("canvas", { width: data.columns, height: data.rows }),
    same: element("span", { className: "patch same" }),
    ring: element("span", { className: "ring" }),
    missing: element("span", { className: "missing" }, "missing"),
    bar: element("span", { className: "bar" }),
    mass: element("output"),
    note: element("span", { className: "note" }),
  };
  parts.frame = element("div", { className: "frame" }, parts.image, parts.overlay, parts.same, parts.ring, parts.missing);
  const caption = element("figcaption", {}, element("strong", {}, frameName(frame)), ` ${frameAge(frame)}`);
  const share = element("div", { className: "share" }, parts.bar, parts.mass);
  byId("past").append(element("figure", {}, caption, parts.frame, share, parts.note));
  parts.frame.addEventListener("pointermove", (event) => readWeight(frame, event));
  parts.frame.addEventListener("pointerdown", (event) => readWeight(frame, event));
  return parts;
});

function render() {
  const sample = data.samples[state.sample];
  const row = rowOf(state.layer, state.head);
  const exists = sample.context.map((frame) => frame !== null);
  controls.forEach((show) => show());
  renderTarget(sample);
  renderPast(sample, row, exists);
  renderStatus(sample, row);
  thumbnails.draw(state, rowOf, exists);
  table.draw(state);
}

/** Centres a marker at a place in patches: patch (r, c) is [r, r + 1) × [c, c + 1). */
function place(marker, row, column) {
  marker.style.left = `${(100 * column) / data.columns}%`;
  marker.style.top = `${(100 * row) / data.rows}%`;
}

const placeOnPatch = (marker) => place(marker, state.row + 0.5, state.column + 0.5);

function renderTarget(sample) {
  const truth = state.truth || !sample.prediction;
  byId("target-name").textContent = truth ? "True next frame" : "Predicted frame";
  byId("target-image").src = truth ? sample.target : sample.prediction;
  byId("pictures").hidden = !sample.prediction;
  byId("patch").hidden = state.mean;
  placeOnPatch(byId("patch"));
  byId("target").setAttribute("aria-label", `${byId("target-name").textContent}, patch at row ${state.row}, column ${state.column}`);
}

function renderPast(sample, row, exists) {
  const truths = truePlaces(sample);
  byId("ring-legend").hidden = !truths;
  byId("same-legend").hidden = state.mean;
  byId("peak").textContent = percent(row.peak);
  byId("extra").hidden = row.extra === null;
  if (row.extra !== null) showShare(...byId("extra").children, row.extra);
  pastFrames.forEach((parts, frame) => {
    const truth = truths?.[frame];
    parts.frame.classList.toggle("absent", !exists[frame]);
    if (exists[frame]) parts.image.src = sample.context[frame];
    const opacity = exists[frame] ? overFrame : () => 0;
    paintMap(parts.overlay.getContext("2d"), row.map, frame * PATCHES, row.peak, 0, 0, opacity);
    parts.same.hidden = state.mean || !exists[frame];
    placeOnPatch(parts.same);
    parts.ring.hidden = !truth || !exists[frame];
    if (truth) place(parts.ring, ...truth);
    showShare(parts.bar, parts.mass, row.masses[frame]);
    parts.note.hidden = !truths;
    parts.note.textContent = truths && !truth && exists[frame] ? "true place not visible" : "";
  });
}

function showShare(bar, output, share) {
  bar.style.setProperty("--share", share);
  output.textContent = percent(share);
}

/** The true places (row, column) of the chosen patch by past frame, null if not visible; null if unknown. */
const truePlaces = (sample) => (state.mean ? null : sample.correspondence?.[patchNumber()] ?? null);

/** The attention on the patches of the true places and their neighbours. */
function massNearTruth(map, truths) {
  let mass = 0;
  truths.forEach((truth, frame) => {
    if (!truth) return;
    const [row, column] = truth.map(Math.floor);
    for (let r = Math.max(0, row - 1); r <= Math.min(data.rows - 1, row + 1); r++) {
      for (let c = Math.max(0, column - 1); c <= Math.min(data.columns - 1, column + 1); c++) {
        mass += map[(frame * data.rows + r) * data.columns + c];
      }
    }
  });
  return mass;
}

/** Describes what is shown. */
function renderStatus(sample, row) {
  const type = typeOf(state, state.layer, state.head);
  const head = element("strong", {}, `Layer ${state.layer}, head ${state.head}`);
  const tag = element("span", { className: `tag ${typeClass(type)}` }, type);
  const from = state.mean ? "Averaged over all patches, it" : `For the patch at row ${state.row}, column ${state.column}, it`;
  const most = row.masses.indexOf(Math.max(...row.masses));
  const frame = `frame ${frameName(most)} (${frameAge(most)})`;
  const where = row.peak > 0 ? `attends most to ${frame}: ${percent(row.masses[most])}.` : "attends to nothing.";
  const truths = truePlaces(sample);
  const near = truths?.some(Boolean) ? ` ${percent(massNearTruth(row.map, truths))} is on the true places or next to them.` : "";
  const left = 1 - row.kept - (row.extra ?? 0);
  const inPlace = data.kept < TOKENS && !state.mean && row.peak > 0 && left > 0.0005;
  const rest = inPlace ? ` ${percent(left)} is on places too faint to be stored individually and is spread evenly over their frames.` : "";
  byId("status").replaceChildren(head, " ", ...(type ? [tag, " "] : []), `${from} ${where}${near}${rest}`);
}

/** Shows the weight under the pointer. */
function readWeight(frame, event) {
  const [row, column] = patchUnder(event);
  const weight = rowOf(state.layer, state.head).map[(frame * data.rows + row) * data.columns + column];
  byId("readout").textContent = `frame ${frameName(frame)}, row ${row}, column ${column}: ${percent(weight)}`;
}

// ---- input ----

function patchUnder(event) {
  const box = event.currentTarget.getBoundingClientRect();
  const inside = (share, count) => Math.max(0, Math.min(count - 1, Math.floor(share * count)));
  return [
    inside((event.clientY - box.top) / box.height, data.rows),
    inside((event.clientX - box.left) / box.width, data.columns),
  ];
}

function choosePatch(event) {
  const [row, column] = patchUnder(event);
  if (state.mean || row !== state.row || column !== state.column) update({ row, column, mean: false });
}

const target = byId("target");
target.addEventListener("pointerdown", (event) => {
  target.setPointerCapture(event.pointerId);
  choosePatch(event);
});
target.addEventListener("pointermove", (event) => event.buttons && choosePatch(event));
target.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (!step) return;
  event.preventDefault();
  const [row, column] = [state.row + step[0], state.column + step[1]];
  if (CHOICES.row.includes(row) && CHOICES.column.includes(column)) update({ row, column, mean: false });
});

const cycle = (name, step = 1) => {
  const values = CHOICES[name];
  update({ [name]: values[(values.indexOf(state[name]) + step + values.length) % values.length] });
};
const KEYS = { h: "head", l: "layer", t: "time", s: "sample", m: "mean", p: "truth" };
document.addEventListener("keydown", (event) => {
  const name = KEYS[event.key.toLowerCase()];
  if (name && !event.ctrlKey && !event.metaKey && !event.altKey) cycle(name, event.shiftKey ? -1 : 1);
});
addEventListener("hashchange", () => update(fromAddress()));

// ---- static content ----

/** Ascending integers as "0–3, 7". */
function ranges(numbers) {
  const starts = numbers.filter((number) => !numbers.includes(number - 1));
  const ends = numbers.filter((number) => !numbers.includes(number + 1));
  return starts.map((start, i) => (start === ends[i] ? start : `${start}–${ends[i]}`)).join(", ");
}

function describe() {
  const root = document.documentElement;
  root.style.setProperty("--aspect", data.aspect);
  root.style.setProperty("--rows", data.rows);
  root.style.setProperty("--columns", data.columns);
  root.classList.toggle("pixelated", data.pixelated);
  byId("thumbnails-hint").textContent =
    `Each thumbnail shows that head's attention to ${data.frames === 1 ? "the past frame" : `the ${data.frames} past frames`} for the same patch; the largest weight is pale yellow.`;
  const explained = [...TYPES, ...MEASURES].filter((name) => data.explanations[name]);
  byId("explanations").hidden = !explained.length;
  byId("explanations").querySelector("dl").append(
    ...explained.flatMap((name) => [element("dt", {}, withMinus(name)), element("dd", {}, data.explanations[name])]),
  );
  const kept = data.kept < TOKENS
    ? `Of each patch's ${TOKENS} weights, the largest ${data.kept} are stored, the rest as one number per frame`
    : `All ${TOKENS} weights of each patch are stored`;
  byId("facts").textContent =
    `${kept}, rounded by at most 0.4 % of the brightest. ` +
    `Samples: ${data.samples.length}. Denoising times: ${data.times.map(digits).join(", ")}. ` +
    `Layers: ${ranges(data.layers)}, with ${data.heads} heads each. ` +
    `The page is ${(BYTES / 1e6).toFixed(1)} MB and needs neither network nor server.`;
}

describe();
/** For tests and the console: the state, a way to change it, and the attention of a head. */
window.page = { data, state, update, rowOf, ready: update(fromAddress()) };
