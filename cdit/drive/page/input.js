// User input: held keys, and presses and drags on the dream.

const KEYS = {
  KeyW: [1, 0, 0], ArrowUp: [1, 0, 0], KeyS: [-1, 0, 0], ArrowDown: [-1, 0, 0],
  KeyQ: [0, 1, 0], KeyE: [0, -1, 0],
  KeyA: [0, 0, 1], ArrowLeft: [0, 0, 1], KeyD: [0, 0, -1], ArrowRight: [0, 0, -1],
};
const MOVED = 8; // pixels from which a press is a drag

/** Calls `onChange` with forward, left and turn, each from −1 to 1; `shortcuts` are functions by key code. */
export function listenToKeys(onChange, shortcuts) {
  const held = new Set();
  const change = () => {
    const sum = [0, 0, 0];
    for (const code of held) KEYS[code].forEach((value, i) => (sum[i] += value));
    onChange(sum.map((value) => Math.max(-1, Math.min(1, value))));
  };
  const elsewhere = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return true;
    const { tagName, type } = event.target;
    if (tagName === "SELECT" || (tagName === "INPUT" && ["number", "text"].includes(type))) return true;
    if (tagName === "INPUT" && type === "range") return event.code.startsWith("Arrow");
    return ["BUTTON", "SUMMARY", "INPUT"].includes(tagName) && event.code === "Space";
  };
  addEventListener("keydown", (event) => {
    if (elsewhere(event)) return;
    if (event.code in KEYS) {
      event.preventDefault();
      if (!held.has(event.code)) change(held.add(event.code));
    } else if (event.code in shortcuts) {
      event.preventDefault();
      if (!event.repeat || event.code === "Backspace") shortcuts[event.code](event.repeat);
    }
  });
  // A clicked or chosen control would otherwise capture the keys that drive.
  const clicked = "button, summary, input[type=checkbox], input[type=range]";
  addEventListener("click", (event) => event.detail && event.target.closest(clicked)?.blur());
  addEventListener("change", (event) => event.target.tagName === "SELECT" && event.target.blur());
  addEventListener("keyup", (event) => held.delete(event.code) && change());
  const release = () => held.size && change(held.clear());
  addEventListener("blur", release);
  document.addEventListener("visibilitychange", release);
}

/** A drag on a picture steers like a joystick, unless `onChange` is null; other presses call `onClick` with x and y from 0 to 1. */
export function listenToPointer(picture, onChange, onClick) {
  let start = null;
  let stick = null;
  picture.addEventListener("pointerdown", (event) => {
    if (event.button || start) return;
    start = { x: event.clientX, y: event.clientY, id: event.pointerId };
    picture.setPointerCapture(event.pointerId);
  });
  picture.addEventListener("pointermove", (event) => {
    if (!onChange || !start || event.pointerId !== start.id) return;
    const [dx, dy] = [event.clientX - start.x, event.clientY - start.y];
    if (!stick && Math.hypot(dx, dy) < MOVED) return;
    const box = picture.getBoundingClientRect();
    if (!stick) {
      stick = document.createElement("div");
      stick.className = "stick";
      stick.append(document.createElement("i"));
      Object.assign(stick.style, { left: `${start.x - box.left}px`, top: `${start.y - box.top}px` });
      picture.append(stick);
    }
    const reach = Math.max(48, 0.22 * box.width);
    const scale = Math.max(1, Math.hypot(dx, dy) / reach);
    const [right, up] = [dx / reach / scale, -dy / reach / scale];
    stick.firstChild.style.transform = `translate(${right * 2.2}rem, ${-up * 2.2}rem)`;
    onChange([Math.abs(up) < 0.12 ? 0 : up, 0, Math.abs(right) < 0.12 ? 0 : -right]);
  });
  const end = (event) => {
    if (!start || event.pointerId !== start.id) return;
    if (stick) {
      stick.remove();
      onChange([0, 0, 0]);
    } else if (event.type === "pointerup") {
      const box = picture.getBoundingClientRect();
      onClick((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
    }
    start = stick = null;
  };
  picture.addEventListener("pointerup", end);
  picture.addEventListener("pointercancel", end);
}
