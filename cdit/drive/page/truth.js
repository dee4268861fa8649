// The engine runs beside the dream: both pictures, and how much they differ.

import { chart, digits, element } from "./draw.js";
import { start } from "./start.js";

const COLOURS = ["#8ab8ff", "#ffb86b"];
const CHARTS = { psnr: { name: "PSNR, 8 to 32 dB", low: 8, high: 32 }, lpips: { name: "LPIPS, 0 to 0.8", low: 0, high: 0.8 } };

let app;
let charts = {};
let here;
let scores = []; // by step, for each dream

export const truth = {
  name: "truth",
  title: "Truth",
  about: "the engine beside the dream",
  needsMotion: true,

  build(page, body) {
    app = page;
    if (app.hello.no_truth) {
      body.append(element("p", { textContent: `Not available: ${app.hello.no_truth}.` }));
      return;
    }
    const turn = element("input", { type: "checkbox", id: "with-truth" });
    turn.onchange = () => {
      start.withTruth = turn.checked;
      start.again();
    };
    here = element("button", { textContent: "Start the dream from here", disabled: true, id: "from-here" });
    here.onclick = () => app.send("from_here");
    body.append(
      element("label", { className: "check" }, turn, "execute the same commands in the engine"),
      element("p", { textContent: "The engine's player has inertia and stops at walls; the dream is conditioned on the resulting motion." }),
      here,
    );
    for (const [metric, { name }] of Object.entries(CHARTS)) {
      const canvas = element("canvas", { className: "chart" });
      const value = element("output");
      const box = element("div", { hidden: true }, element("div", { className: "legend" }, name, value), canvas);
      charts[metric] = { canvas, value, box };
      body.append(box);
    }
  },

  frame(message) {
    if (!here) return;
    here.disabled = !message.arrays.truth || !message.step;
    scores.length = Math.min(scores.length, message.step);
    if (message.arrays.truth && message.step) scores[message.step] = message.dreams;
    for (const [metric, { canvas, value, box }] of Object.entries(charts)) {
      const newest = message.dreams.map((dream) => dream[metric]).filter((number) => number != null);
      box.hidden = !message.arrays.truth || !(newest.length || (metric === "psnr" && scores.length));
      if (box.hidden || !truth.box.open) continue;
      value.textContent = newest.map((number) => digits(number, metric === "psnr" ? 1 : 3)).join(" · ");
      const lines = COLOURS.map((colour, i) => {
        const values = [];
        scores.forEach((dreams, step) => dreams[i]?.[metric] != null && (values[step] = dreams[i][metric]));
        return { values, colour };
      });
      chart(canvas, lines, CHARTS[metric].low, CHARTS[metric].high);
    }
  },
};
