// Pure geometry of the canvas: no page, no host. Points are [x, y] and boxes [x0, y0, x1, y1] in pixels of the image, y down.

export const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
export const distance = ([ax, ay], [bx, by]) => Math.hypot(ax - bx, ay - by);
export const round = (value, step) => Number((Math.round(value / step) * step).toFixed(4));

// ---------------------------------------------------------------------------------------------------------------- view

/** The view that shows an image [w, h] whole in the middle of an area [w, h]: screen = image * scale + [x, y]. */
export function fitted([width, height], [across, down], margin = 6) {
  const scale = Math.max(Math.min((across - 2 * margin) / width, (down - 2 * margin) / height), 1e-3);
  return { scale, x: (across - width * scale) / 2, y: (down - height * scale) / 2 };
}

export const toScreen = (view, [x, y]) => [x * view.scale + view.x, y * view.scale + view.y];
export const toImage = (view, [x, y]) => [(x - view.x) / view.scale, (y - view.y) / view.scale];

/** A view that is `factor` times as large, where the screen point `at` shows what it showed. */
export function zoomed(view, at, factor, least = 0.02, most = 40) {
  const scale = clamp(view.scale * factor, least, most);
  const grown = scale / view.scale;
  return { scale, x: at[0] - (at[0] - view.x) * grown, y: at[1] - (at[1] - view.y) * grown };
}

export const panned = (view, [dx, dy]) => ({ ...view, x: view.x + dx, y: view.y + dy });

// ----------------------------------------------------------------------------------------------------------- placement

/** Where a placement {centre, scale, angle, shift} takes a point: centre + scale * R(angle) (p - centre) + shift, as edit/geometry.py. */
export function placed({ centre, scale, angle, shift }, [x, y]) {
  const [sine, cosine] = [Math.sin((angle * Math.PI) / 180), Math.cos((angle * Math.PI) / 180)];
  const [u, v] = [x - centre[0], y - centre[1]];
  return [centre[0] + shift[0] + scale * (cosine * u - sine * v), centre[1] + shift[1] + scale * (sine * u + cosine * v)];
}

export const middle = ([x0, y0, x1, y1]) => [(x0 + x1) / 2, (y0 + y1) / 2];
export const corners = ([x0, y0, x1, y1]) => [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]; // prettier-ignore

/** What stays in place when the object is scaled or turned, after its shift. */
export const pivot = ({ centre, shift }) => [centre[0] + shift[0], centre[1] + shift[1]];

/** The handles of an object with a box, on the screen: its corners, and one to turn it, 26 screen pixels above. */
export function handlesOf(placement, box, view) {
  const at = (p) => toScreen(view, placed(placement, p));
  const [x0, y0, x1] = box;
  const [top, centre] = [at([(x0 + x1) / 2, y0]), at(middle(box))];
  const length = distance(top, centre) || 1;
  const out = [(top[0] - centre[0]) / length, (top[1] - centre[1]) / length];
  return { corners: corners(box).map(at), top, turn: [top[0] + 26 * out[0], top[1] + 26 * out[1]] };
}

/** What a press at a screen point takes hold of: "turn", "scale", "move" (inside the box) or null. */
export function gripAt({ turn, corners }, at, reach = 9) {
  if (turn && distance(turn, at) <= reach) return "turn";
  // The middle of a small object is no corner, or it could not be moved.
  const inside = within(corners, at);
  const side = Math.min(distance(corners[0], corners[1]), distance(corners[1], corners[2]));
  if (corners.some((corner) => distance(corner, at) <= (inside ? Math.min(reach, side / 3) : reach))) return "scale";
  return inside ? "move" : null;
}

/** Whether a point lies in a convex polygon. */
export function within(polygon, [x, y]) {
  const sides = polygon.map(([ax, ay], i) => {
    const [bx, by] = polygon[(i + 1) % polygon.length];
    return (bx - ax) * (y - ay) - (by - ay) * (x - ax);
  });
  return sides.every((side) => side >= 0) || sides.every((side) => side <= 0);
}

/** The scale after a corner was pulled from one point to another. */
export function scaledBy(placement, from, to, least = 0.125, most = 8) {
  const fixed = pivot(placement);
  return clamp(round((placement.scale * distance(to, fixed)) / Math.max(distance(from, fixed), 1e-3), 0.01), least, most);
}

/** The angle in degrees, over (-180, 180], after the handle was turned from one point to another; `snap` rounds it. */
export function turnedBy(placement, from, to, snap = 1) {
  const [cx, cy] = pivot(placement);
  const turn = Math.atan2(to[1] - cy, to[0] - cx) - Math.atan2(from[1] - cy, from[0] - cx);
  const angle = round(placement.angle + (turn * 180) / Math.PI, snap);
  return angle - 360 * Math.ceil((angle - 180) / 360);
}

// ------------------------------------------------------------------------------------------------------------- drawing

const KINDS = ["box", "outline", "brush", "erase"];

/** The shapes of a stored drawing (the JSON of core/drawing.py); none for a text that is not one. */
export function parseDrawing(text) {
  try {
    const shapes = JSON.parse(text || "{}").shapes ?? [];
    return shapes.filter((shape) => KINDS.some((kind) => Array.isArray(shape[kind])));
  } catch {
    return [];
  }
}

/** The size [w, h] of the image that a stored drawing was drawn on, or null. */
export function drawnSize(text) {
  try {
    return JSON.parse(text || "{}").size ?? null;
  } catch {
    return null;
  }
}

/** The JSON of shapes that were drawn on an image [w, h]; an empty text for none, unless `more` (points) was drawn on it. */
export const formatDrawing = (shapes, size, more = false) => (shapes.length || more ? JSON.stringify({ size: size ?? undefined, shapes }) : "");

/** The points of a stroke with one more, unless that is nearer than a sixth of its width: a stroke stays readable. */
export function extended(points, point, width) {
  const last = points[points.length - 1];
  const next = point.map((v) => round(v, 0.5));
  return last && distance(last, next) < Math.max(1, width / 6) ? points : [...points, next];
}

/** A box of whole pixels with its corners in order, clipped to an image [w, h]; null when it holds no pixel. */
export function boxBetween([ax, ay], [bx, by], [width, height]) {
  const box = [Math.min(ax, bx), Math.min(ay, by), Math.max(ax, bx), Math.max(ay, by)].map(Math.round);
  const [x0, y0, x1, y1] = [clamp(box[0], 0, width), clamp(box[1], 0, height), clamp(box[2], 0, width), clamp(box[3], 0, height)];
  return x1 > x0 && y1 > y0 ? [x0, y0, x1, y1] : null;
}

/** The box of the painted pixels of an alpha plane (RGBA bytes, w x h) of which one pixel is `step` image pixels; null for none. */
export function boxOfAlpha(bytes, width, height, step = 1) {
  let [x0, y0, x1, y1] = [width, height, -1, -1];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (bytes[4 * (y * width + x) + 3] < 128) continue;
      if (x < x0) x0 = x;
      if (x > x1) x1 = x;
      if (y < y0) y0 = y;
      y1 = y;
    }
  }
  return x1 < 0 ? null : [x0, y0, x1 + 1, y1 + 1].map((v) => v * step);
}

// -------------------------------------------------------------------------------------------------------------- points

const numbers = (text) => text.match(/[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?/gi)?.map(Number) ?? [];
const pairUp = (flat) => Array.from({ length: Math.floor(flat.length / 2) }, (_, i) => [flat[2 * i], flat[2 * i + 1]]);
const point = (p) => (Array.isArray(p) ? [Number(p[0]), Number(p[1])] : [Number(p.x), Number(p.y)]);

/** The points of a text in any form of core/points.py; none for a text that is not one. */
export function parsePoints(text) {
  try {
    let found = JSON.parse(text || "[]");
    if (!Array.isArray(found)) found = found.positive ?? [found];
    if (found.length === 1 && Array.isArray(found[0]) && typeof found[0][0] === "object") found = found[0];
    return found.map(point).filter((p) => p.every(Number.isFinite));
  } catch {
    return pairUp(numbers(text.replaceAll("->", " ").replaceAll(":", " ")));
  }
}

/** [handle, target] pairs of two lists, or of arrows in the first. */
export function parsePairs(handles, targets) {
  const wanted = parsePoints(targets);
  if (wanted.length || !handles.trim()) return parsePoints(handles).slice(0, wanted.length).map((h, i) => [h, wanted[i]]);
  try {
    return JSON.parse(handles).map((spline) => [point(spline[0]), point(spline[spline.length - 1])]);
  } catch {
    const flat = parsePoints(handles);
    return Array.from({ length: Math.floor(flat.length / 2) }, (_, i) => [flat[2 * i], flat[2 * i + 1]]);
  }
}

export const formatPoints = (points) => JSON.stringify(points.map(([x, y]) => ({ x: round(x, 0.5), y: round(y, 0.5) })));

/** [index, end] of the pair whose target (1) or handle (0) lies under a point, or null. */
export function pairAt(pairs, at, reach) {
  for (let i = pairs.length - 1; i >= 0; i--) for (const end of [1, 0]) if (distance(pairs[i][end], at) <= reach) return [i, end];
  return null;
}

/** Strokes around the drags that may change where nothing was painted, as `around` in nodes/edit.py. */
export function around(pairs, [width, height]) {
  const longest = Math.max(...pairs.map(([h, t]) => distance(h, t)));
  return pairs.map((pair) => ({ brush: pair, width: 2 * Math.max(2 * longest, 0.1 * Math.min(width, height)) }));
}

// ---------------------------------------------------------------------------------------------------------- seed canvas

/** The size of a canvas [w, h], of which 0 follows the photo [w, h], and the scale at which the photo fills it: `canvas_size` in cow/canvas.py. */
export function seedCanvas(photo, [width, height], grid = 8) {
  if (width && height) return { size: [width, height], filling: 1 };
  const filling = width ? width / photo[0] : height ? height / photo[1] : 1;
  const [wide, high] = photo.map((side) => Math.max(grid, Math.round((side * filling) / grid) * grid));
  return { size: [width || wide, height || high], filling };
}

/** Where a subject of a size [w, h] lies on a canvas [w, h], as `place` in cow/canvas.py: `share` of the room, on a grid of 8. */
export function seedBox(subject, canvas, scale, share, grid = 8) {
  const size = subject.map((s) => Math.max(1, Math.round(s * scale)));
  const at = [0, 1].map((i) => {
    const room = canvas[i] - size[i];
    return share[i] === 1 || room < 0 ? room : Math.min(Math.round((share[i] * room) / grid) * grid, room);
  });
  return [at[0], at[1], at[0] + size[0], at[1] + size[1]];
}

/** The shares of the room at which a subject of a size [w, h] has its corner at a point; 0.5 where there is no room. */
export const seedShare = (size, canvas, corner) =>
  [0, 1].map((i) => (canvas[i] > size[i] ? round(clamp(corner[i] / (canvas[i] - size[i]), 0, 1), 0.001) : 0.5));

// -------------------------------------------------------------------------------------------------------------- history

/** States to go back to. Equal states in a row count once. */
export class History {
  #past = [];
  #at = -1;

  push(state) {
    const text = JSON.stringify(state);
    if (text === this.#past[this.#at]) return;
    this.#past = [...this.#past.slice(0, this.#at + 1), text].slice(-200);
    this.#at = this.#past.length - 1;
  }

  /** The state `by` steps away, or null at the end. */
  go(by) {
    const at = this.#at + by;
    if (at < 0 || at >= this.#past.length) return null;
    this.#at = at;
    return JSON.parse(this.#past[at]);
  }

  can(by) {
    return this.#at + by >= 0 && this.#at + by < this.#past.length;
  }
}
