// How the canvas looks: layers made from a drawing, and one frame of the editor.
import { boxOfAlpha, handlesOf, middle, placed, toScreen } from "./geometry.js";

const ACCENT = "#4aa8ff";
export const [TINT, LEAVES] = ["rgba(74, 168, 255, 0.38)", "rgba(255, 70, 50, 0.5)"]; // what is painted, what is vacated
const MOST = 1280; // layers of larger images are made at this size: they are for the eye only

export function layer(width, height) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [Math.max(1, Math.round(width)), Math.max(1, Math.round(height))];
  return canvas;
}

function trace(context, shape, erase) {
  const points = shape.brush ?? shape.erase ?? shape.outline;
  context.globalCompositeOperation = erase ? "destination-out" : "source-over";
  context.beginPath();
  if (shape.box) {
    const [x0, y0, x1, y1] = shape.box;
    context.rect(x0, y0, x1 - x0, y1 - y0);
  } else {
    context.moveTo(...points[0]);
    for (const point of points) context.lineTo(...point);
    if (points.length === 1) context.lineTo(points[0][0] + 0.01, points[0][1]); // a dot needs a length
  }
  if (shape.box || shape.outline) return context.fill();
  context.lineWidth = Math.max(shape.width, 1);
  context.stroke();
}

/** The layers of a drawing on an image [w, h]: what is painted (`base`, a mask, is painted before), and its box in image pixels. */
export function maskOf(shapes, [width, height], base) {
  const step = Math.max(1, Math.max(width, height) / MOST);
  const canvas = layer(width / step, height / step);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (base) context.drawImage(base, 0, 0, canvas.width, canvas.height);
  context.scale(1 / step, 1 / step);
  context.lineCap = context.lineJoin = "round";
  for (const shape of shapes) trace(context, shape, Boolean(shape.erase));
  const bytes = context.getImageData(0, 0, canvas.width, canvas.height).data;
  return { canvas, box: boxOfAlpha(bytes, canvas.width, canvas.height, step) };
}

/** A mask filled with an image or a colour. */
export function filled(mask, paint) {
  const canvas = layer(mask.width, mask.height);
  const context = canvas.getContext("2d");
  context.drawImage(mask, 0, 0);
  context.globalCompositeOperation = "source-in";
  if (typeof paint === "string") {
    context.fillStyle = paint;
    context.fillRect(0, 0, canvas.width, canvas.height);
  } else context.drawImage(paint, 0, 0, canvas.width, canvas.height);
  return canvas;
}

/** A mask as the alpha of a layer: an image whose white is painted, or what is "hidden" or "shown" by its transparency. */
export function alphaOf(image, kind = "white") {
  const canvas = layer(image.naturalWidth, image.naturalHeight);
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const plane = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < plane.data.length; i += 4) {
    const alpha = plane.data[i + 3];
    plane.data[i + 3] = { white: plane.data[i], hidden: 255 - alpha, shown: alpha }[kind];
  }
  context.putImageData(plane, 0, 0);
  return canvas;
}

function path(context, points) {
  context.beginPath();
  for (const point of points) context.lineTo(...point);
  context.closePath();
}

/** A line that is seen on any image: white on black. */
function outlined(context, width = 1.5) {
  context.setLineDash([]);
  [context.lineWidth, context.strokeStyle] = [width + 2, "rgba(0, 0, 0, 0.6)"];
  context.stroke();
  [context.lineWidth, context.strokeStyle] = [width, "#fff"];
  context.stroke();
}

function knob(context, [x, y], radius, colour = "#fff", square = false) {
  context.beginPath();
  if (square) context.rect(x - radius, y - radius, 2 * radius, 2 * radius);
  else context.arc(x, y, radius, 0, 7);
  [context.fillStyle, context.lineWidth, context.strokeStyle] = [colour, 1.5, "rgba(0, 0, 0, 0.8)"];
  context.fill();
  context.stroke();
}

/** One frame of an editor. */
export function drawFrame(context, editor) {
  const { area, view, size, scene } = editor;
  context.clearRect(0, 0, ...area);
  context.fillStyle = "#161616";
  context.fillRect(0, 0, ...area);
  if (!size) return drawText(context, area, editor.hint);
  context.save();
  context.translate(view.x, view.y);
  context.scale(view.scale, view.scale);
  context.imageSmoothingEnabled = view.scale < 4;
  if (scene.ground) {
    context.fillStyle = scene.ground;
    context.fillRect(0, 0, ...size);
  }
  if (scene.image) context.drawImage(scene.image, 0, 0, ...size);
  for (const [canvas, alpha] of scene.layers) {
    context.globalAlpha = alpha;
    context.drawImage(canvas, 0, 0, ...size);
  }
  context.globalAlpha = 1;
  if (scene.ghost) drawGhost(context, scene.ghost);
  if (scene.stroke) drawStroke(context, scene.stroke);
  context.restore();
  if (scene.ghost) drawHandles(context, scene.ghost, view, editor.rotates);
  scene.pairs.forEach((pair, i) => drawPair(context, pair.map((p) => toScreen(view, p)), i, scene.selected === i));
  if (scene.brush) drawBrush(context, scene.brush);
  if (editor.note) drawNote(context, area, editor.note);
}

/** Some words in the corner of the stage. */
function drawNote(context, [, height], text) {
  [context.font, context.textAlign] = ["11px sans-serif", "left"];
  context.fillStyle = "rgba(0, 0, 0, 0.6)";
  context.fillRect(0, height - 18, context.measureText(text).width + 12, 18);
  context.fillStyle = "#ddd";
  context.fillText(text, 6, height - 5);
}

function drawText(context, [width, height], text) {
  [context.fillStyle, context.font, context.textAlign] = ["#aaa", "13px sans-serif", "center"];
  const words = text.split(" ");
  const lines = [""];
  for (const word of words) {
    if (context.measureText(`${lines[lines.length - 1]} ${word}`).width > width - 40) lines.push("");
    lines[lines.length - 1] = `${lines[lines.length - 1]} ${word}`.trim();
  }
  lines.forEach((line, i) => context.fillText(line, width / 2, height / 2 + 18 * (i - (lines.length - 1) / 2)));
}

function drawGhost(context, { placement, cut, source, mirrored }) {
  const { centre, scale, angle, shift } = placement;
  context.save();
  context.translate(centre[0] + shift[0], centre[1] + shift[1]);
  context.rotate((angle * Math.PI) / 180);
  context.scale(mirrored ? -scale : scale, scale);
  context.translate(-centre[0], -centre[1]);
  context.drawImage(cut, 0, 0, ...source);
  context.restore();
}

function drawStroke(context, shape) {
  context.save();
  context.lineCap = context.lineJoin = "round";
  context.fillStyle = context.strokeStyle = shape.erase ? "rgba(255, 255, 255, 0.6)" : TINT;
  trace(context, shape, false);
  context.restore();
}

function drawHandles(context, { placement, box, active }, view, rotates) {
  const handles = handlesOf(placement, box, view);
  path(context, handles.corners);
  outlined(context, 1);
  if (!active) return;
  if (rotates) {
    context.beginPath();
    context.moveTo(...handles.top);
    context.lineTo(...handles.turn);
    outlined(context, 1);
    knob(context, handles.turn, 6, ACCENT);
  }
  for (const corner of handles.corners) knob(context, corner, 5, "#fff", true);
  const start = toScreen(view, placed({ ...placement, scale: 1, angle: 0, shift: [0, 0] }, middle(box)));
  arrow(context, start, toScreen(view, placed(placement, middle(box))));
}

function arrow(context, [ax, ay], [bx, by]) {
  const length = Math.hypot(bx - ax, by - ay);
  if (length < 12) return;
  const [u, v] = [(bx - ax) / length, (by - ay) / length];
  const head = (side) => [bx - 10 * u + side * 5 * v, by - 10 * v - side * 5 * u];
  context.beginPath();
  context.moveTo(ax, ay);
  context.lineTo(bx - 8 * u, by - 8 * v);
  outlined(context, 2);
  path(context, [[bx, by], head(1), head(-1)]);
  context.fillStyle = "#fff";
  context.fill();
}

function drawPair(context, [handle, target], index, selected) {
  arrow(context, handle, target);
  knob(context, handle, 5, selected ? ACCENT : "#fff");
  if (Math.hypot(handle[0] - target[0], handle[1] - target[1]) > 1) knob(context, target, 6, selected ? ACCENT : "#ffb030");
  [context.font, context.textAlign, context.lineWidth, context.strokeStyle, context.fillStyle] =
    ["bold 12px sans-serif", "left", 3, "rgba(0, 0, 0, 0.8)", "#fff"]; // prettier-ignore
  context.strokeText(String(index + 1), handle[0] + 8, handle[1] - 8);
  context.fillText(String(index + 1), handle[0] + 8, handle[1] - 8);
}

function drawBrush(context, { at, radius }) {
  context.beginPath();
  context.arc(...at, Math.max(radius, 1), 0, 7);
  outlined(context, 1);
}
