// Samples of the next second from different noise, and their spread over the dream.

import { digits, element, heat, paint } from "./draw.js";

const FULL = 48; // levels of 256 at which the overlay is brightest

let app, samples, text, strip;
let overlay = null;

export const doubt = {
  name: "doubt",
  title: "Doubt",
  about: "where samples of the next second differ",

  build(page, body) {
    app = page;
    samples = element("select", { id: "samples" },
      ...[0, 2, 4, 8].map((count) => element("option", { value: count, textContent: count ? `${count} samples` : "off" })));
    samples.onchange = () => app.send("doubt", { samples: Number(samples.value) });
    text = element("p", { textContent: "How much pixels differ between samples, if the current motion continues for a second." });
    strip = element("div", { className: "thumbnails" });
    body.append(element("div", { className: "row" }, samples), text, strip);
  },

  frame(message) {
    const { ends, spread } = message.arrays;
    if (overlay) overlay.hidden = !spread;
    strip.hidden = !ends;
    if (!spread) return;
    if (!overlay) {
      overlay = element("canvas", { className: "overlay" });
      app.screens["dream 0"].canvas.after(overlay);
    }
    const [count, height, width] = ends.shape;
    heat(overlay, spread, height, width, 0, FULL, (share) => 0.8 * share);
    text.textContent = `After a second, the samples differ by ${digits(100 * message.spread, 1)} % of the range (standard deviation, mean over pixels).`;
    while (strip.childElementCount < count) strip.append(element("canvas"));
    while (strip.childElementCount > count) strip.lastChild.remove();
    [...strip.children].forEach((canvas, i) => paint(canvas, ends, height, width, i * height * width * 3));
  },
};
