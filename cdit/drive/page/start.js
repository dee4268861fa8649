// Where the drive begins: a frame of the dataset, a picture of your own, or a place in the engine.

import { element, paint } from "./draw.js";

const MAX_SEED = 2 ** 31 - 1;
const MAX_BUTTONS = 4; // of maps; more are in a list

let app;
let how = null; // the fields of the message `begin`
let picture = null; // its bytes, if the drive begins with one
let seed;
let buttons = [];
let list; // of maps

function begin(fields, bytes = null) {
  how = fields;
  picture = bytes;
  if (list && fields.source !== "map") list.selectedIndex = 0;
  app.notify("");
  for (const button of buttons) {
    button.classList.toggle("on", button.dataset.start === JSON.stringify([fields.source, fields.start ?? fields.map]));
  }
  send();
}

function send() {
  if (!how) return;
  if (picture) app.sendBytes(picture); // the server keeps only one, which may be a goal by now
  app.send("begin", { ...how, truth: start.withTruth, seed: Math.max(0, Math.min(MAX_SEED, Math.floor(Number(seed.value)) || 0)) });
}

/** A picture, cropped as the model's training frames were, as bytes. */
async function pictureBytes(file) {
  const [height, width] = app.hello.size;
  const image = await createImageBitmap(file);
  const wanted = { aspect: width / height, "4:3": 4 / 3, none: image.width / image.height }[app.hello.crop];
  const [w, h] = [Math.min(image.width, image.height * wanted), Math.min(image.height, image.width / wanted)];
  const canvas = element("canvas", { width, height });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(image, (image.width - w) / 2, (image.height - h) / 2, w, h, 0, 0, width, height);
  image.close();
  const pixels = context.getImageData(0, 0, width, height).data;
  return new Uint8Array(height * width * 3).map((_, i) => pixels[4 * Math.floor(i / 3) + (i % 3)]);
}

/**
 * What frames can be chosen from: {pictures, row}, elements; `chosen` gets {source: "data", start}, or
 * {source: "picture"} and its bytes, which must be sent first.
 */
export function choices(page, verb, chosen) {
  const { hello } = page;
  const [height, width] = hello.size;
  const pictures = element("div", { className: "thumbnails" });
  hello.starts.forEach((fields, i) => {
    const canvas = element("canvas");
    paint(canvas, hello.arrays.starts, height, width, i * height * width * 3);
    const onclick = () => chosen({ source: "data", start: fields.start });
    const button = element("button", { title: fields.name, onclick, "aria-label": `${verb} ${fields.name}` }, canvas);
    button.dataset.start = JSON.stringify(["data", fields.start]);
    pictures.append(button);
  });
  const row = element("div", { className: "row" });
  if (hello.count) {
    const anywhere = () => chosen({ source: "data", start: Math.floor(Math.random() * hello.count) });
    row.append(element("button", { textContent: "Random frame", onclick: anywhere }));
  }
  const onchange = async (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (!file) return;
    let bytes;
    try {
      bytes = await pictureBytes(file);
    } catch {
      page.notify(`${file.name} is not a picture that this browser can read`);
      return;
    }
    chosen({ source: "picture" }, bytes);
  };
  row.append(element("label", { className: "file" }, "Picture …", element("input", { type: "file", accept: "image/*", onchange })));
  return { pictures, row };
}

export const start = {
  name: "start",
  title: "Start",
  about: "from a frame of the data, a picture, the engine",
  open: true,
  withTruth: false,

  build(page, body) {
    app = page;
    const { hello } = app;
    const { pictures, row } = choices(app, "start from", begin);
    buttons = [...pictures.children];
    seed = element("input", { type: "number", min: 0, max: MAX_SEED, value: 0, onchange: send });
    const inMap = (map) => begin({ source: "map", map });
    if (hello.maps.length > MAX_BUTTONS) {
      list = element("select", {}, ...["In a map …", ...hello.maps].map((textContent) => element("option", { textContent })));
      list.onchange = () => list.selectedIndex && inMap(list.value);
      row.append(list);
    } else {
      for (const map of hello.maps) {
        const button = element("button", { textContent: `In ${map}`, onclick: () => inMap(map) });
        button.dataset.start = JSON.stringify(["map", map]);
        row.append(button);
        buttons.push(button);
      }
    }
    row.append(element("label", {}, "noise", seed));
    body.append(pictures, row);
    if (hello.starts.length) begin({ source: "data", start: hello.starts[0].start });
    else app.notify("Choose a picture to start from.");
  },

  /** The same start and noise again. */
  again: send,
};
