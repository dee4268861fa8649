// The page: pictures, controls and facts. Panels beside them are modules of their own.

import { compare } from "./compare.js";
import { doubt } from "./doubt.js";
import { digits, element, paint } from "./draw.js";
import { listenToKeys, listenToPointer } from "./input.js";
import { inside } from "./inside.js";
import { plan } from "./plan.js";
import { start } from "./start.js";
import { truth } from "./truth.js";
import { connect } from "./wire.js";

// A panel is {name, title, about, open, needsMotion, build(app, body), frame(message), clicked(x, y)}; all from `open` on
// but `build` are optional. `build` fills the panel's body once the server has sent app.hello. What a panel sends with
// app.send("name", fields) is read by `Session._read_name` of the server.
let PANELS = [start, truth, plan, inside, doubt, compare];

const find = (id) => document.getElementById(id);
const NAMES = { "dream 0": "dream", truth: "truth", "dream 1": "second dream" };

const app = {
  hello: null,
  last: null, // the newest frame message
  numbers: [], // the sliders of actions other than motion
  begun: 0,
  running: true,
  screens: {},
  listeners: [], // functions that get every message
  latencies: [], // milliseconds from a change of the keys to the picture
  send: (type, fields) => link.send(type, fields),
  sendBytes: (bytes) => link.sendBytes(bytes),
  /** Shows a text, for some seconds or until the next one. */
  notify(text, seconds = 0) {
    find("notice").textContent = text;
    find("notice").hidden = !text;
    clearTimeout(app.hiding);
    if (seconds) app.hiding = setTimeout(app.notify, 1000 * seconds, "");
  },
  run(on) {
    app.running = on;
    sendRun();
  },
};
window.drive = app;

// ---- pictures ----

/** The screen of a picture, created at first use; `picture` holds its canvas and overlays. */
function screenOf(name) {
  if (!app.screens[name]) {
    const canvas = element("canvas");
    const picture = element("div", { className: "picture" }, canvas);
    const score = element("output");
    const caption = element("figcaption", {}, element("b", { textContent: NAMES[name] }), score);
    const figure = element("figure", { className: "screen" }, caption, picture);
    figure.dataset.name = name;
    app.screens[name] = { figure, canvas, picture, score };
    find("screens").append(...Object.keys(NAMES).filter((n) => app.screens[n]).map((n) => app.screens[n].figure));
    if (name === "dream 0") {
      if (!app.hello.numbers) picture.classList.add("steered");
      listenToPointer(picture, app.hello.numbers ? null : steer, (x, y) => PANELS.forEach((panel) => panel.clicked?.(x, y)));
    }
  }
  return app.screens[name];
}

function show(message) {
  const [height, width] = app.hello.size;
  for (const name of Object.keys(NAMES)) {
    const bytes = message.arrays[name];
    if (bytes) paint(screenOf(name).canvas, bytes, height, width);
    if (app.screens[name]) app.screens[name].figure.hidden = !bytes;
  }
  message.dreams.forEach((dream, i) => {
    const scores = [];
    if (dream.psnr != null) scores.push(`${digits(dream.psnr, 1)} dB`);
    if (dream.lpips != null) scores.push(`LPIPS ${digits(dream.lpips, 3)}`);
    screenOf(`dream ${i}`).score.textContent = scores.join(" · ");
  });
}

// ---- steering ----

const sentAt = new Map();
let command = [0, 0, 0];
let inputs = 0;

function sendCommand() {
  sentAt.set(++inputs, performance.now());
  sentAt.delete(inputs - 100);
  if (app.hello.numbers) {
    app.send("drive", { numbers: app.numbers.map(({ value }) => value()), begun: app.begun, id: inputs });
    return;
  }
  const [forward, left, turn] = command;
  const speed = Number(find("speed").value);
  app.send("drive", {
    forward: forward * speed, left: left * speed, turn: (turn * Number(find("turning").value) * Math.PI) / 180, id: inputs,
  });
}

function steer(wanted) {
  if (app.hello && !app.hello.numbers && wanted.some((value, i) => value !== command[i])) {
    command = wanted;
    sendCommand();
  }
}

let runs = 0; // how often this was sent: what the server reports of an older state is out of date

function sendRun() {
  runs += 1;
  app.send("run", { on: app.running, flows: find("flows").checked, pace: Number(find("pace").value) });
  showRunning();
}

function showRunning() {
  find("pause").textContent = app.running ? "Pause" : "Resume";
  find("pause").classList.toggle("on", !app.running);
}

let returning = false; // whether the frame before has yet to come

function back(repeated = false) {
  if (repeated && returning) return; // a held key repeats faster than frames come
  app.running = false;
  returning = true;
  app.send("back");
  showRunning();
}

const actions = {
  pause: () => app.run(!app.running),
  step: () => app.send("step"),
  back: () => back(),
  reset: () => start.again(),
  "save-video": () => app.send("save", { what: "video" }),
  "save-actions": () => app.send("save", { what: "actions" }),
  record: () => app.send("save", { what: "dataset" }),
};
for (const [id, action] of Object.entries(actions)) find(id).onclick = action;
listenToKeys(steer, { Space: actions.pause, Backspace: back, Period: actions.step, KeyR: actions.reset });

for (const id of ["speed", "turning", "pace"]) {
  find(id).oninput = () => {
    showSliders();
    if (id === "pace") sendRun();
    else if (command.some(Boolean)) sendCommand();
  };
}
find("flows").onchange = sendRun;

function showSliders() {
  const output = (id, text) => (find(id).parentElement.querySelector("output").textContent = text);
  output("speed", `${digits(Number(find("speed").value), 1)} m/s`);
  output("turning", `${find("turning").value} °/s`);
  const times = Number(find("pace").value) / (app.hello?.fps ?? 1);
  output("pace", `${find("pace").value}/s, ${Number(times.toPrecision(2))} × real time`);
}

// ---- actions other than motion ----

/** In place of speeds, a slider for each number of an action. */
function showNumbers(numbers) {
  for (const hidden of document.querySelectorAll(".motion")) hidden.hidden = true;
  find("hint-numbers").hidden = false;
  app.numbers = numbers.map(({ name, unit, low, high }) => {
    const slider = element("input", { type: "range", min: low, max: high, step: "any" });
    const places = Math.min(6, Math.max(0, 2 - Math.floor(Math.log10(high - low || 1))));
    const snaps = app.hello.absolute ? 0 : (high - low) / 50; // so that a slider can be brought back to zero
    const value = () => {
      const x = Math.max(low, Math.min(high, Number(slider.value)));
      return Math.abs(x) < snaps ? 0 : x;
    };
    slider.dataset.number = name;
    const output = element("output");
    find("numbers").append(element("label", {}, `${name} `, slider, " ", output));
    const show = () => (output.textContent = `${digits(value(), places)} ${unit}`);
    slider.oninput = () => {
      show();
      sendCommand();
    };
    return { slider, show, value };
  });
}

/** Moves the sliders to where a drive begins. */
function restNumbers(message) {
  if (app.begun === message.begun) return;
  app.begun = message.begun;
  app.numbers.forEach(({ slider, show }, i) => {
    slider.value = message.action[i];
    show();
  });
}

// ---- facts ----

const shownAt = []; // times of the frames of the last second

function showFacts(message) {
  const now = performance.now();
  const fps = app.hello.fps;
  if (message.milliseconds != null) shownAt.push(now);
  while (shownAt.length && shownAt[0] < now - 1000) shownAt.shift();
  if (sentAt.has(message.input)) {
    if (app.hello.numbers || command.some(Boolean)) app.latencies.push(now - sentAt.get(message.input));
    sentAt.delete(message.input);
  }
  const recent = app.latencies.slice(-20).sort((a, b) => a - b);
  find("fact-step").textContent = message.step;
  find("fact-fps").textContent = shownAt.length > 2
    ? digits((1000 * (shownAt.length - 1)) / (shownAt.at(-1) - shownAt[0]), 1) : "–";
  find("fact-calls").textContent = message.dreams.map((dream) => dream.calls || "–").join(" + ");
  find("fact-latency").textContent = recent.length ? `${digits(recent[recent.length >> 1], 0)} ms` : "–";
  if (app.hello.numbers) return;
  find("fact-forward").textContent = `${digits(message.action[0] * fps)} m/s`;
  find("fact-left").textContent = `${digits(message.action[1] * fps)} m/s`;
  find("fact-turn").textContent = `${digits((message.action[2] * fps * 180) / Math.PI, 0)} °/s`;
}

// ---- messages ----

function download(name, parts, type) {
  const address = URL.createObjectURL(new Blob(parts, { type }));
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

const on = {
  hello(message) {
    app.hello = message;
    document.documentElement.style.setProperty("--aspect", message.size[1] / message.size[0]);
    find("world").textContent = `· ${message.worlds[0].name}`;
    document.title = `Drive ${message.worlds[0].name}`;
    find("speed").max = Math.max(0.5, message.spacing * message.fps * 2);
    find("speed").step = find("speed").max / 24;
    find("speed").value = message.spacing * message.fps;
    find("record").hidden = !message.records;
    showSliders();
    if (message.numbers) showNumbers(message.numbers);
    PANELS = PANELS.filter((panel) => !message.numbers || !panel.needsMotion);
    for (const panel of PANELS) {
      const body = element("div");
      const heading = element("summary", {}, panel.title, element("small", { textContent: panel.about }));
      panel.box = element("details", { className: "panel", open: Boolean(panel.open) }, heading, body);
      panel.box.dataset.panel = panel.name;
      find("panels").append(panel.box);
      panel.build(app, body);
    }
    sendRun();
    find("status").textContent = "connected";
  },
  frame(message) {
    app.last = message;
    returning = false;
    if (message.runs === runs) app.running = message.running;
    showRunning();
    if (message.dreams.length) {
      if (app.hello.numbers) restNumbers(message);
      show(message);
      showFacts(message);
    }
    for (const panel of PANELS) panel.frame?.(message);
    requestAnimationFrame(() => app.send("ack", { frame: message.frame }));
  },
  plan: (message) => plan.found(message),
  no_plan: () => plan.stopped(),
  notice: (message) => app.notify(message.message, 12),
  end: (message) => app.notify(message.message),
  file: (message) => download(message.name, [message.arrays.content], "video/mp4"),
  actions: (message) => download(message.name, [JSON.stringify(message.actions)], "application/json"),
};

const link = connect(
  (message) => {
    on[message.type](message);
    for (const listener of app.listeners) listener(message);
  },
  (reason) => {
    find("status").textContent = "not connected";
    if (find("notice").hidden) app.notify(reason || "The connection was closed. Reload the page to drive again.");
  },
);
