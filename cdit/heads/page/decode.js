// Decodes the weights; the docstring of __init__.py describes the format.

const data = JSON.parse(document.getElementById("data").textContent);
const PATCHES = data.rows * data.columns;
const TOKENS = data.frames * PATCHES;

/** The rows of one section; `offset` is the start of its first plane. */
class Rows {
  constructor(bytes, offset, count, kept) {
    const plane = (width) => bytes.subarray(offset, (offset += width * count));
    this.kept = kept;
    this.peakLow = plane(1);
    this.peakHigh = plane(1);
    this.masses = Array.from({ length: data.frames }, () => plane(1));
    this.extra = data.extra ? plane(1) : null;
    this.values = plane(kept);
    this.gapLow = plane(kept);
    this.gapHigh = plane(kept);
    this.end = offset;
  }

  /**
   * The attention of one row.
   *
   * map: weight of each token of the past frames; the remainder of a frame is spread evenly over tokens not kept.
   * peak: the largest of them. masses: of each frame. extra: of the extra key. kept: sum of the kept weights.
   */
  read(row) {
    const peak = ((this.peakLow[row] + 256 * this.peakHigh[row]) / 65535) ** 2;
    const masses = this.masses.map((mass) => mass[row] / 255);
    const map = new Float32Array(TOKENS).fill(-1);
    const shown = new Float32Array(data.frames);
    const counts = new Uint16Array(data.frames);
    let smallest = peak;
    for (let i = row * this.kept, token = -1; i < (row + 1) * this.kept; i++) {
      token += this.gapLow[i] + 256 * this.gapHigh[i];
      map[token] = peak * (this.values[i] / 255) ** 2;
      smallest = Math.min(smallest, map[token]);
      const frame = Math.floor(token / PATCHES);
      shown[frame] += map[token];
      counts[frame]++;
    }
    for (let frame = 0; frame < data.frames; frame++) {
      const left = Math.max(0, masses[frame] - shown[frame]) / (PATCHES - counts[frame]);
      const even = Math.min(left, smallest); // no weight that was left out exceeds one that was kept
      for (let token = frame * PATCHES; token < (frame + 1) * PATCHES; token++) if (map[token] < 0) map[token] = even;
    }
    const kept = shown.reduce((sum, share) => sum + share, 0);
    return { map, peak, masses, extra: this.extra ? this.extra[row] / 255 : null, kept };
  }
}

/** Weights of a layer for one sample and time. */
class LayerWeights {
  constructor(bytes) {
    this.patches = new Rows(bytes, 0, data.heads * PATCHES, data.kept);
    this.means = new Rows(bytes, this.patches.end, data.heads, TOKENS);
  }

  patch(head, patch) {
    return this.patches.read(head * PATCHES + patch);
  }

  mean(head) {
    return this.means.read(head);
  }
}

async function inflate(base64) {
  const packed = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** LayerWeights by layer, for a sample and the index of a time; the last result is cached. */
const loadWeights = (() => {
  let loaded = { key: null };
  return (sample, time) => {
    const first = (sample * data.times.length + time) * data.layers.length;
    if (loaded.key !== first) {
      const layers = data.layers.map((_, i) => inflate(data.weights[first + i]).then((bytes) => new LayerWeights(bytes)));
      loaded = { key: first, weights: Promise.all(layers).then((all) => new Map(all.map((one, i) => [data.layers[i], one]))) };
    }
    return loaded.weights;
  };
})();
