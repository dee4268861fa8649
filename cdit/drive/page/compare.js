// A second dream beside the first, with the same commands: another checkpoint, sampler or number of steps.

import { element } from "./draw.js";

let app;

/** Scheduler and number of steps of a dream. */
function samplerOf(number, world) {
  const scheduler = element("select", {}, ...world.schedulers.map((name) => element("option", { textContent: name })));
  scheduler.value = world.sampler.scheduler;
  const steps = element("input", { type: "range", min: 1, max: Math.max(16, world.sampler.steps), value: world.sampler.steps });
  const shown = element("output", { textContent: `${steps.value} steps` });
  const send = () => {
    shown.textContent = `${steps.value} steps`;
    app.send("sampler", { dream: number, scheduler: scheduler.value, steps: Number(steps.value) });
  };
  scheduler.onchange = steps.oninput = send;
  return element("div", { className: "row" }, scheduler, element("label", {}, steps, shown));
}

export const compare = {
  name: "compare",
  title: "Compare",
  about: "samplers, numbers of steps, checkpoints",

  build(page, body) {
    app = page;
    const { worlds } = app.hello;
    const second = element("select", { id: "second" }, element("option", { value: "", textContent: "nothing" }),
      ...worlds.map((world, i) => element("option", { value: i, textContent: world.name })));
    const its = element("div");
    second.onchange = () => {
      const chosen = second.value === "" ? null : Number(second.value);
      app.send("compare", { world: chosen });
      its.replaceChildren(...(chosen === null ? [] : [samplerOf(1, worlds[chosen])]));
    };
    body.append(
      element("p", { textContent: "The dream" }), samplerOf(0, worlds[0]),
      element("div", { className: "row" }, "compare with", second), its,
      element("p", { textContent: "A second dream gets the same actions and noise. Adding one restarts the drive." }),
    );
  },
};
