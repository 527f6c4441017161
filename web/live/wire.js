// The messages of a live stream as stream/live/wire.py has them: a head of 24 bytes before each image. Pure functions.
export const [FRAME, RESULT, REPEAT] = [1, 2, 3];
const MAGIC = 0x50494c53; // "SLIP", least byte first

export function pack(kind, sequence, captured, body) {
  const message = new Uint8Array(24 + body.byteLength);
  const head = new DataView(message.buffer);
  head.setUint32(0, MAGIC, true);
  head.setUint32(4, kind, true);
  head.setBigUint64(8, BigInt(sequence), true);
  head.setFloat64(16, captured, true);
  message.set(new Uint8Array(body), 24);
  return message;
}

/** The parts of a message, or null for anything else. */
export function unpack(buffer) {
  if (buffer.byteLength < 24) return null;
  const head = new DataView(buffer);
  if (head.getUint32(0, true) !== MAGIC) return null;
  const [kind, sequence, captured] = [head.getUint32(4, true), Number(head.getBigUint64(8, true)), head.getFloat64(16, true)];
  return { kind, sequence, captured, body: buffer.slice(24) };
}

/** The nearest-rank percentile, as stream/queues.py computes it; null of nothing. */
export function percentile(values, percent) {
  const ordered = [...values].sort((a, b) => a - b);
  return ordered.length ? ordered[Math.min(Math.floor((ordered.length * percent) / 100), ordered.length - 1)] : null;
}

/** The largest middle part of a source (width, height) with the proportions of a target: [x, y, width, height]. */
export function middle(width, height, targetWidth, targetHeight) {
  const scale = Math.min(width / targetWidth, height / targetHeight);
  const [w, h] = [targetWidth * scale, targetHeight * scale];
  return [(width - w) / 2, (height - h) / 2, w, h];
}
