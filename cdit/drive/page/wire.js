// The connection: JSON to the server; from it, JSON with arrays.

const DTYPES = { uint8: Uint8Array, float32: Float32Array };

/** A message from the server: its fields, with `arrays` by name, each a typed array with its `shape`. */
export function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const message = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  let offset = 4 + length;
  for (const [name, [dtype, shape]] of Object.entries(message.arrays)) {
    const bytes = shape.reduce((product, side) => product * side, 1) * DTYPES[dtype].BYTES_PER_ELEMENT;
    const array = new DTYPES[dtype](buffer.slice(offset, offset + bytes));
    array.shape = shape;
    message.arrays[name] = array;
    offset += bytes;
  }
  return message;
}

/** Connects to the server of this page; `onMessage` gets unpacked messages, `onEnd` is called once. */
export function connect(onMessage, onEnd) {
  const address = new URL("drive" + location.search, location.href);
  address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  const socket = new WebSocket(address);
  socket.binaryType = "arraybuffer";
  socket.onmessage = (event) => onMessage(unpack(event.data));
  socket.onclose = (event) => onEnd(event.reason);
  return {
    send: (type, fields = {}) => socket.readyState === WebSocket.OPEN && socket.send(JSON.stringify({ type, ...fields })),
    sendBytes: (bytes) => socket.readyState === WebSocket.OPEN && socket.send(bytes),
  };
}
