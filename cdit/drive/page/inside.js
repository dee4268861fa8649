// What chosen heads attend to in the past frames, from one patch of the dream, while it runs.

import { digits, element, heat, paint } from "./draw.js";

let app;
let patch = null;
let pinned = []; // [layer, head]
let off = new Set(); // "layer,head"
let layer, head, call, list, hint;
let mark = null;

const current = () => [Number(layer.value), Number(head.value)];
const same = (a, b) => a[0] === b[0] && a[1] === b[1];
const shownHeads = () => [current(), ...pinned.filter((pin) => !same(pin, current()))];

function send() {
  layer.nextElementSibling.textContent = layer.value;
  head.nextElementSibling.textContent = head.value;
  call.nextElementSibling.textContent = call.value === call.max ? "last" : Number(call.value) + 1;
  const heads = patch && inside.box.open ? shownHeads() : [];
  app.send("inside", { patch: patch ? [patch] : [], heads, call: call.value === call.max ? -1 : Number(call.value) });
}

function toggleOff(key) {
  if (!off.delete(key)) off.add(key);
  app.send("off", { heads: [...off].map((text) => text.split(",").map(Number)) });
}

function togglePin(which) {
  const rest = pinned.filter((pin) => !same(pin, which));
  pinned = rest.length === pinned.length ? [...pinned, which].slice(-11) : rest;
  send();
}

/** The box of one head; rebuilt only when the heads change. */
function boxOf(which, frames) {
  const key = which.join();
  const title = element("b", { textContent: `layer ${which[0]}, head ${which[1]}` });
  const type = element("em");
  const pin = element("button", { onclick: () => togglePin(which) });
  const turn = element("button", { onclick: () => toggleOff(key) });
  const strip = element("div", { className: "frames" });
  for (let i = 0; i < frames; i++) {
    strip.append(element("figure", {},
      element("div", { className: "picture" }, element("canvas", { className: "seen" }), element("canvas", { className: "heat" })),
      element("figcaption")));
  }
  const measures = element("div", { className: "measures" });
  const buttons = element("span", { className: "buttons" }, pin, turn);
  const box = element("section", { className: "head" }, element("header", {}, title, type, buttons), strip, measures);
  box.dataset.head = key;
  return Object.assign(box, { parts: { type, pin, turn, strip, measures } });
}

function update(box, info, which, message, first) {
  const { past, attention } = message.arrays;
  const [frames, height, width] = past.shape;
  const [rows, columns] = app.hello.worlds[0].grid;
  const keys = attention.shape[1];
  const onFrames = attention.subarray(first, first + frames * rows * columns);
  const peak = onFrames.reduce((most, weight) => Math.max(most, weight), 0);
  const { type, pin, turn, strip, measures } = box.parts;
  const isOff = message.off.some((pair) => same(pair, which));
  box.classList.toggle("off", isOff);
  type.textContent = info.type;
  type.title = info.reason;
  pin.textContent = pinned.some((other) => same(other, which)) ? "Unpin" : "Pin";
  turn.textContent = isOff ? "Turn on" : "Turn off";
  [...strip.children].forEach((figure, i) => {
    const [seen, map] = figure.querySelectorAll("canvas");
    paint(seen, past, height, width, i * height * width * 3);
    heat(map, onFrames, rows, columns, i * rows * columns, peak);
    const back = frames - i;
    figure.lastChild.textContent = `−${back} · ${digits(100 * info.masses[i], 0)} %`;
  });
  const extra = keys > frames * rows * columns ? ` · extra key ${digits(100 * attention[first + keys - 1], 0)} %` : "";
  measures.textContent = Object.entries(info.measures).map(([name, value]) => `${name} ${digits(value)}`).join(" · ") + extra;
}

export const inside = {
  name: "inside",
  title: "Inside",
  about: "what heads attend to from a clicked patch",

  build(page, body) {
    app = page;
    const world = app.hello.worlds[0];
    const slider = (max, value = 0) => element("input", { type: "range", min: 0, max, value, oninput: send });
    [layer, head, call] = [slider(world.layers - 1), slider(world.heads - 1), slider(world.sampler.steps, world.sampler.steps)];
    [layer.id, head.id, call.id] = ["layer", "head", "call"];
    hint = element("p", { textContent: "Click a patch of the dream, then keep driving." });
    list = element("div");
    body.append(
      element("label", {}, "layer", layer, element("output")),
      element("label", {}, "head", head, element("output")),
      element("label", {}, "network call", call, element("output")),
      hint, list,
    );
    inside.box.addEventListener("toggle", send);
  },

  clicked(x, y) {
    const [rows, columns] = app.hello.worlds[0].grid;
    const chosen = [Math.min(rows - 1, Math.floor(y * rows)), Math.min(columns - 1, Math.floor(x * columns))];
    patch = patch && inside.box.open && same(patch, chosen) ? null : chosen;
    if (patch) inside.box.open = true;
    mark?.remove();
    mark = null;
    if (patch) {
      mark = element("div", { className: "patch" });
      Object.assign(mark.style, {
        left: `${(100 * patch[1]) / columns}%`, top: `${(100 * patch[0]) / rows}%`,
        width: `${100 / columns}%`, height: `${100 / rows}%`,
      });
      app.screens["dream 0"].picture.append(mark);
    }
    send();
  },

  frame(message) {
    const { attention, past } = message.arrays;
    const calls = message.dreams[0]?.calls;
    if (calls && Number(call.max) !== calls - 1) {
      const wasLast = call.value === call.max;
      call.max = calls - 1;
      if (wasLast) call.value = call.max;
    }
    if (mark) mark.hidden = !inside.box.open;
    hint.hidden = Boolean(attention);
    hint.textContent = patch && !message.step ? "Take a step first: the start frame was not predicted." : "Click a patch of the dream, then keep driving.";
    if (!attention) {
      list.replaceChildren();
      return;
    }
    const heads = message.heads.map((info) => [info.layer, info.head]);
    const wanted = `${heads.join(" ")} ${past.shape[0]}`;
    if (list.dataset.heads !== wanted || list.childElementCount !== heads.length) {
      list.replaceChildren(...heads.map((which) => boxOf(which, past.shape[0])));
      list.dataset.heads = wanted;
    }
    message.heads.forEach((info, i) => update(list.children[i], info, heads[i], message, i * attention.shape[1]));
  },
};
