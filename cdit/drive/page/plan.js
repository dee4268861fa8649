// A goal picture, the candidates that the planner tried, and the plan, which is executed step by step.

import { digits, element, paint } from "./draw.js";
import { choices } from "./start.js";

const CHOOSE = "Choose a goal picture.";

let app, text, result, above, strip, follow, cost, again;
let planned = null; // the newest message `plan`
let asked = 0; // plans not answered yet

function ask(fields, bytes = null) {
  planned = null;
  asked += 1;
  result.hidden = true;
  text.textContent = "Planning …";
  again.onclick = () => ask(fields, bytes);
  again.disabled = false;
  if (bytes) app.sendBytes(bytes);
  app.send("plan", { ...fields, cost: cost.value });
}

/** Draws the paths of all candidates from above, the start at the centre, looking up; the plan's is drawn last. */
function drawPaths({ arrays: { paths }, costs, steps }) {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [above.clientWidth * ratio, above.clientHeight * ratio];
  if (!width) return;
  Object.assign(above, { width, height });
  const [count, length] = paths.shape;
  const far = paths.reduce((most, value, i) => (i % 3 < 2 ? Math.max(most, Math.abs(value)) : most), 0.1);
  const scale = (0.45 * Math.min(width, height)) / far;
  const context = above.getContext("2d");
  const [low, high] = [Math.min(...costs), Math.max(...costs)];
  for (let i = count - 1; i >= 0; i--) {
    context.beginPath();
    context.moveTo(width / 2, height / 2);
    for (let t = 0; t < (i ? length : steps); t++) {
      const [x, y] = paths.subarray(3 * (i * length + t));
      context.lineTo(width / 2 - scale * y, height / 2 - scale * x);
    }
    const share = high > low ? (high - costs[i]) / (high - low) : 1;
    context.strokeStyle = i ? `rgba(138, 184, 255, ${0.15 + 0.6 * share})` : "#ffb86b";
    context.lineWidth = (i ? 1 : 3) * ratio;
    context.stroke();
  }
}

export const plan = {
  name: "plan",
  title: "Plan",
  about: "to a goal picture",
  needsMotion: true,

  build(page, body) {
    app = page;
    const { pictures, row } = choices(app, "plan to", ask);
    if (app.hello.count) {
      const title = "The frame recorded after the one that this drive started from";
      const onclick = () => ask({ source: "ahead" });
      row.prepend(element("button", { id: "goal-ahead", textContent: "What came next", title, onclick }));
    }
    cost = element("select", { id: "cost" }, ...app.hello.costs.map((name) => element("option", { textContent: name })));
    again = element("button", { id: "again", textContent: "Plan again", title: "To the same goal, from here", disabled: true });
    row.append(element("label", {}, "cost", cost), again);
    text = element("p", { textContent: CHOOSE });
    above = element("canvas", { className: "above" });
    strip = element("div", { className: "thumbnails" });
    follow = element("button", { id: "follow", textContent: "Drive the plan", onclick: () => app.send("follow") });
    result = element("div", { hidden: true }, above, strip, element("div", { className: "row" }, follow));
    body.append(pictures, row, text, result);
    plan.box.ontoggle = () => planned && drawPaths(planned);
  },

  /** There is no plan: it was cancelled, or a notice says why. */
  stopped() {
    asked -= 1;
    if (!asked) text.textContent = CHOOSE;
  },

  /** Shows the answer of the planner. */
  found(message) {
    planned = message;
    asked -= 1;
    result.hidden = false;
    const [height, width] = app.hello.size;
    const { goal, ends } = message.arrays;
    strip.replaceChildren();
    const picture = (name, bytes, first) => {
      const canvas = element("canvas");
      paint(canvas, bytes, height, width, first);
      strip.append(element("figure", {}, canvas, element("figcaption", { textContent: name })));
    };
    picture("goal", goal, 0);
    message.shown.forEach((candidate, i) => {
      picture(`${i ? "" : "plan "}${digits(message.costs[candidate], 3)}`, ends, i * height * width * 3);
    });
    text.textContent = `${message.costs.length} candidates in ${digits(message.seconds, 1)} s. Orange: the plan, ${message.steps} steps. `
      + "Pictures: the goal, and the predictions at the end of the plan and of other candidates, with their costs.";
    drawPaths(message);
  },

  frame(message) {
    if (!follow) return;
    follow.disabled = !planned || !message.planned || message.following > 0;
    follow.textContent = message.following ? `${message.following} steps to go` : "Drive the plan";
  },
};
