// Choosing a head: thumbnails by layer and head, and a sortable table.

const TYPES = [...new Set(data.table.map((info) => info.type).filter(Boolean))];
const MEASURES = [...new Set(data.table.flatMap((info) => Object.keys(info.measures)))];

/** Whether a row of the table is of the chosen time. */
const holds = (info, state) => info.time === data.times[state.time];

function typeOf(state, layer, head) {
  return data.table.find((info) => info.layer === layer && info.head === head && holds(info, state))?.type ?? "";
}
const typeClass = (type) => (type ? `type-${TYPES.indexOf(type) % 8}` : "");

/** The grid of thumbnails. `choose` is called with {layer, head}. */
class Thumbnails {
  constructor(container, choose) {
    this.box = container.parentElement;
    this.buttons = new Map();
    container.style.setProperty("--heads", data.heads);
    container.style.setProperty("--tile", (TILE_COLUMNS / TILE_ROWS) * (data.columns / data.rows));
    container.classList.toggle("strips", TILE_ROWS === 1);
    const axis = (kind, text) => container.append(element("span", { className: `axis ${kind}` }, text));
    axis("top left", TILE_ROWS === 1 ? "" : "head");
    for (let head = 0; head < data.heads; head++) axis("top", TILE_ROWS === 1 ? `head ${head}` : head);
    for (const layer of data.layers) {
      axis("left", `layer ${layer}`);
      for (let head = 0; head < data.heads; head++) {
        const canvas = element("canvas", {
          width: TILE_COLUMNS * (data.columns + 1) - 1,
          height: TILE_ROWS * (data.rows + 1) - 1,
        });
        const button = element("button", { type: "button", role: "radio", onclick: () => choose({ layer, head }) }, canvas);
        button.dataset.layer = layer;
        button.dataset.head = head;
        this.buttons.set(`${layer}/${head}`, button);
        container.append(button);
      }
    }
    container.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!step) return;
      event.preventDefault();
      choose(neighbour(...step));
    });
  }

  /** `rowOf(layer, head)` returns the attention that a thumbnail shows. */
  draw(state, rowOf, exists) {
    for (const button of this.buttons.values()) {
      const [layer, head] = [Number(button.dataset.layer), Number(button.dataset.head)];
      const type = typeOf(state, layer, head);
      paintThumbnail(button.firstChild, rowOf(layer, head), exists);
      button.className = `thumbnail ${typeClass(type)}`;
      button.title = type;
      button.setAttribute("aria-label", `layer ${layer}, head ${head}${type && `, ${type}`}`);
      button.setAttribute("aria-checked", String(layer === state.layer && head === state.head));
    }
    const current = this.buttons.get(`${state.layer}/${state.head}`);
    rove([...this.buttons.values()], current);
    if (current !== this.current) reveal(current, this.box);
    this.current = current;
  }
}

/** The table of heads. `choose` is called with {layer, head}, `sortBy` with {sort, descending}. */
class HeadTable {
  constructor(table, choose, sortBy) {
    this.box = table.parentElement;
    this.columns = ["head", ...(TYPES.length ? ["type"] : []), ...MEASURES];
    this.headers = this.columns.map((name) => {
      const explanation = data.explanations[name] ?? "";
      const button = element("button", { type: "button", title: explanation, onclick: () => sortBy(this.toggled(name)) }, withMinus(name));
      return element("th", { scope: "col", className: MEASURES.includes(name) ? "number" : "" }, button);
    });
    table.append(element("thead", {}, element("tr", {}, ...this.headers)));
    this.body = table.appendChild(element("tbody"));
    const ranges = MEASURES.map((name) => {
      const values = data.table.map((info) => info.measures[name] ?? null).filter((value) => value !== null);
      return [Math.min(...values), Math.max(...values)];
    });
    this.rows = data.table.map((info) => {
      const button = element("button", { type: "button", "aria-label": `layer ${info.layer}, head ${info.head}` });
      button.textContent = `L${info.layer} H${info.head}`;
      const cells = [element("th", { scope: "row" }, button)];
      if (TYPES.length) {
        const tag = element("span", { className: `tag ${typeClass(info.type)}`, title: info.reason || (data.explanations[info.type] ?? "") });
        tag.textContent = info.type;
        cells.push(element("td", {}, info.type ? tag : ""));
      }
      MEASURES.forEach((name, i) => {
        const value = info.measures[name] ?? null;
        const [low, high] = ranges[i];
        const cell = element("td", { className: "number" }, digits(value));
        cell.style.setProperty("--share", value === null || high === low ? 0 : (value - low) / (high - low));
        cells.push(cell);
      });
      const row = element("tr", { onclick: () => choose({ layer: info.layer, head: info.head }) }, ...cells);
      row.dataset.head = `${info.layer}/${info.head}`;
      return { info, row, button };
    });
    this.body.addEventListener("keydown", (event) => {
      const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const now = this.order.findIndex((item) => item.button === document.activeElement);
      const next = this.order[Math.max(0, Math.min(this.order.length - 1, now + step))];
      choose({ layer: next.info.layer, head: next.info.head });
    });
  }

  /** The sorting after a click on a column: numbers descending, names ascending; a second click reverses it. */
  toggled(name) {
    const first = MEASURES.includes(name);
    return { sort: name, descending: this.sorted.sort === name ? !this.sorted.descending : first };
  }

  draw(state) {
    this.sorted = { sort: state.sort, descending: state.descending };
    const rows = this.rows.filter(({ info }) => holds(info, state));
    this.order = sortedHeads(rows, state.sort, state.descending);
    if (this.order.length !== this.body.children.length || this.order.some((item, i) => this.body.children[i] !== item.row)) {
      this.body.replaceChildren(...this.order.map((item) => item.row));
    }
    this.columns.forEach((name, i) => {
      const direction = state.descending ? "descending" : "ascending";
      this.headers[i].setAttribute("aria-sort", name === state.sort ? direction : "none");
    });
    const key = `${state.layer}/${state.head}`;
    for (const { row } of rows) row.classList.toggle("chosen", row.dataset.head === key);
    const current = rows.find(({ row }) => row.dataset.head === key) ?? rows[0];
    rove(rows.map((item) => item.button), current?.button);
    if (current && current !== this.current) reveal(current.button, this.box);
    this.current = current;
  }
}

/** Sorted rows; heads without a value come last in either direction. */
function sortedHeads(rows, sort, descending) {
  const valueOf = ({ info }) => (sort === "type" ? info.type || null : info.measures[sort] ?? null);
  const inPlace = (a, b) => a.info.layer - b.info.layer || a.info.head - b.info.head;
  const direction = descending ? -1 : 1;
  if (sort === "head") return [...rows].sort((a, b) => direction * inPlace(a, b));
  return [...rows].sort((a, b) => {
    const [x, y] = [valueOf(a), valueOf(b)];
    if (x === null || y === null) return (x === null) - (y === null) || inPlace(a, b);
    return direction * ((x > y) - (x < y)) || inPlace(a, b);
  });
}
