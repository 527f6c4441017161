// The canvas: paint an object on an image, place it, pull points. Knows nothing of the host: see ../canvas.js.
//
// new Editor(element, { mode, onChange }): mode "move" (paint and place on one image), "paste" and "seed" (paint on one, place on another),
// "drag", or "look" (paint alone). The state is plain: { shapes, dx, dy, scale, angle, about, pairs, x, y, width, height, mirror }; onChange gets what changed.
import * as geometry from "./geometry.js";
import { LEAVES, TINT, alphaOf, drawFrame, filled, maskOf } from "./painter.js";

const STYLE = `
.slipstream-canvas { display: flex; flex-direction: column; gap: 4px; width: 100%; height: 100%; min-height: 320px; box-sizing: border-box;
  font: 12px/16px sans-serif; color: var(--input-text, #ddd); position: relative; user-select: none; }
.slipstream-canvas .bar { display: flex; flex-wrap: wrap; gap: 3px; align-items: center; }
.slipstream-canvas button { font: inherit; color: inherit; background: var(--comfy-input-bg, #333); border: 1px solid var(--border-color, #555);
  border-radius: 4px; padding: 2px 7px; min-width: 26px; cursor: pointer; }
.slipstream-canvas button[aria-pressed=true] { background: #2a6fb0; border-color: #4aa8ff; color: #fff; }
.slipstream-canvas button:disabled { opacity: 0.35; cursor: default; }
.slipstream-canvas input[type=range] { width: 64px; margin: 0 2px; }
.slipstream-canvas .stage { flex: 1 1 0; min-height: 200px; position: relative; border-radius: 4px; overflow: hidden; }
.slipstream-canvas canvas { position: absolute; inset: 0; width: 100%; height: 100%; touch-action: none; display: block; }
.slipstream-canvas .keys { position: absolute; width: 1px; height: 1px; opacity: 0; padding: 0; border: 0; resize: none; pointer-events: none; }
.slipstream-canvas:focus-within .stage { outline: 1px solid #4aa8ff; }
.slipstream-canvas .foot { flex-wrap: nowrap; }
.slipstream-canvas .says { flex: 1 1 0; min-width: 0; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; opacity: 0.85; }
`;

const TOOLS = {
  brush: ["Paint", "Paint the object (B)"],
  box: ["Box", "Pull a box around the object (R)"],
  outline: ["Lasso", "Draw a line around the object (L)"],
  erase: ["Erase", "Take away what was painted too much (E)"],
  place: ["Move", "Move, resize and turn the object (V)"],
  pull: ["Pull", "Press on a point and pull it to its target; a click pins it (V)"],
};
const KEYS = { b: "brush", r: "box", l: "outline", e: "erase" };
const OF_MODE = {
  move: ["brush", "box", "outline", "erase", "place"],
  paste: ["brush", "box", "outline", "erase", "place"],
  seed: ["brush", "box", "outline", "erase", "place"],
  drag: ["pull", "brush", "erase"],
  look: ["brush", "box", "outline", "erase"],
};
const REACH = { mouse: 10, pen: 12, touch: 22 }; // screen pixels within which a press takes hold of a handle or a point
const START = { shapes: [], dx: 0, dy: 0, scale: 1, angle: 0, about: "object", pairs: [], x: 0.5, y: 1, width: 512, height: 512, mirror: false };

function element(kind, properties = {}, children = []) {
  const made = Object.assign(document.createElement(kind), properties);
  made.append(...children);
  return made;
}

export class Editor {
  state = structuredClone(START);
  images = { image: null, reference: null }; // HTMLImageElement or null
  base = null; // the connected mask, as alpha
  rotates = true;
  mirrors = false;
  view = null;
  area = [1, 1];
  selected = null;
  absent = {}; // role -> why there is no image, in one sentence
  notes = {}; // role -> what to know about its image, in some words
  drawnOn = null; // size [w, h] of the image that shapes and points were drawn on, where that is known
  #gesture = null;
  #history = new geometry.History();
  #pointers = new Map();
  #cursor = null;
  #mask = null;
  #frame = 0;

  constructor(root, { mode, onChange = () => {}, onWheel = () => {} }) {
    Object.assign(this, { root, mode, onChange, onWheel, tool: mode === "drag" ? "pull" : "brush", width: null });
    this.#build();
    this.#listen();
    this.#history.push(this.#kept());
    this.refresh();
  }

  // --------------------------------------------------------------------------------------------------------- from outside

  /** An image (HTMLImageElement, loaded) to draw on or to place on; null for none. */
  setImage(role, image) {
    this.images[role] = image;
    this.view = this.#mask = null;
    this.refresh();
  }

  /** The connected mask, of a `kind` of `alphaOf`. */
  setMask(image, kind) {
    this.base = image ? alphaOf(image, kind) : null;
    this.#mask = null;
    this.refresh();
  }

  /** Values that were changed elsewhere. */
  setState(values) {
    const before = this.#canvas();
    Object.assign(this.state, values);
    if (values.shapes) this.#mask = null;
    if (this.#canvas() !== before) this.view = null;
    this.#history.push(this.#kept());
    this.refresh();
  }

  /** Values that a workflow was saved with: what an undo ends at. */
  begin(values) {
    this.#history = new geometry.History();
    this.setState(values);
  }

  resized() {
    this.view = null;
    this.refresh();
  }

  destroy() {
    this.observer.disconnect();
    cancelAnimationFrame(this.#frame);
  }

  // --------------------------------------------------------------------------------------------------------------- parts

  #build() {
    this.root.classList.add("slipstream-canvas");
    this.root.dataset.captureWheel = "true"; // Nodes 2.0 leaves the wheel to what has the focus only with this
    const button = (text, title, act, name) => {
      const made = element("button", { type: "button", textContent: text, title });
      made.dataset.act = name;
      made.addEventListener("click", () => (act(), this.refresh(), this.keys.focus({ preventScroll: true })));
      return made;
    };
    this.tools = OF_MODE[this.mode].map((tool) => button(...TOOLS[tool], () => this.setTool(tool), tool));
    this.slider = element("input", { type: "range", min: 1, max: 100, title: "Width of the brush ([ and ])" });
    this.slider.addEventListener("input", () => ((this.width = Number(this.slider.value)), this.refresh()));
    this.mirrorButton = button("Mirror", "Mirror the subject", () => this.commit({ mirror: !this.state.mirror }), "mirror");
    this.undoButton = button("\u21b6", "Undo (Ctrl+Z)", () => this.undo(-1), "undo");
    this.redoButton = button("\u21b7", "Redo (Ctrl+Shift+Z)", () => this.undo(1), "redo");
    const others = [
      this.undoButton,
      this.redoButton,
      button("Fit", "Show the whole image (0); click on it, then the wheel zooms, the middle button or Space pans", () => (this.view = null), "fit"),
      button("Clear", "Remove everything that was drawn", () => this.clear(), "clear"),
    ];
    this.says = element("div", { className: "says" });
    this.canvas = element("canvas");
    this.stage = element("div", { className: "stage" }, [this.canvas]);
    // Focus lies on a text field, so that the page leaves Delete, Ctrl+Z and the arrows to it.
    this.keys = element("textarea", { className: "keys", readOnly: true, tabIndex: 0 });
    this.keys.setAttribute("aria-label", "Canvas: arrow keys move, Delete removes, Ctrl+Z undoes");
    const bar = element("div", { className: "bar" }, [...this.tools, this.slider, this.mirrorButton]);
    const foot = element("div", { className: "bar foot" }, [this.says, ...others]);
    // In the node, not in the head of the page that all packs share.
    this.root.append(element("style", { textContent: STYLE }), bar, this.stage, foot, this.keys);
    this.observer = new ResizeObserver(() => this.resized());
    this.observer.observe(this.stage);
  }

  #listen() {
    const stage = this.canvas;
    for (const name of ["pointerdown", "pointermove", "pointerup", "pointercancel"]) {
      stage.addEventListener(name, (event) => this.#pointer(event));
    }
    for (const name of ["mousedown", "click", "dblclick", "contextmenu"]) stage.addEventListener(name, (event) => event.stopPropagation());
    stage.addEventListener("pointerleave", () => ((this.#cursor = null), this.refresh()));
    stage.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    this.root.addEventListener("pointerdown", (event) => event.stopPropagation());
    this.keys.addEventListener("keydown", (event) => this.#key(event));
    this.keys.addEventListener("keyup", (event) => event.key === " " && (this.space = false));
    this.keys.addEventListener("blur", () => (this.space = false));
  }

  // -------------------------------------------------------------------------------------------------------------- scenes

  #canvas() {
    return `${this.state.width} ${this.state.height}`;
  }

  /** The canvas {size, filling} that a subject is placed on. */
  get ground() {
    return geometry.seedCanvas(this.sourceSize, [this.state.width, this.state.height]);
  }

  /** The image that is painted on. */
  get source() {
    return this.mode === "paste" ? this.images.reference : this.images.image;
  }

  get sourceSize() {
    return this.source ? [this.source.naturalWidth, this.source.naturalHeight] : null;
  }

  /** What to know about the image that is shown. */
  get note() {
    return this.notes[this.mode === "paste" && !this.placing ? "reference" : "image"] ?? "";
  }

  /** Whether the object is placed on another image than the one that it is painted on. */
  get apart() {
    return this.mode === "paste" || this.mode === "seed";
  }

  get placing() {
    return this.tool === "place";
  }

  /** The size [w, h] of what is shown now, or null. */
  get size() {
    if (!this.apart || !this.placing) return this.sourceSize;
    if (this.mode === "seed") return this.sourceSize && this.ground.size;
    return this.images.image ? [this.images.image.naturalWidth, this.images.image.naturalHeight] : null;
  }

  get mask() {
    if (!this.sourceSize) return null;
    if (!this.#mask) {
      this.#mask = maskOf(this.state.shapes, this.sourceSize, this.base);
      if (this.#mask.box && this.mode !== "drag") this.#mask.cut = filled(this.#mask.canvas, this.source);
      if (this.#mask.box) this.#mask.tint = filled(this.#mask.canvas, this.mode === "move" ? LEAVES : TINT);
    }
    return this.#mask;
  }

  get placement() {
    const { dx, dy, scale, angle, about, x, y } = this.state;
    const { box } = this.mask;
    const centre = about === "image" ? this.sourceSize.map((s) => s / 2) : geometry.middle(box);
    if (this.mode !== "seed") return { centre, scale, angle: this.rotates ? angle : 0, shift: [dx, dy] };
    const size = [box[2] - box[0], box[3] - box[1]];
    const target = geometry.seedBox(size, this.ground.size, scale * this.ground.filling, [x, y]);
    const [from, to] = [geometry.middle(box), geometry.middle(target)];
    return { centre: from, scale: (target[2] - target[0]) / size[0], angle: 0, shift: [to[0] - from[0], to[1] - from[1]] };
  }

  /** What a frame shows. */
  get scene() {
    const { mask, state } = this;
    const painted = Boolean(mask?.box);
    const [away, drag] = [this.apart && this.placing, this.mode === "drag"];
    const scene = { layers: [], pairs: drag ? state.pairs : [], selected: this.selected, stroke: this.#gesture?.shape };
    scene.image = away ? (this.mode === "seed" ? this.images.reference : this.images.image) : this.source;
    if (away && this.mode === "seed") scene.ground = state.colour ?? "#808080";
    if (painted && !away) scene.layers.push([mask.tint, this.mode === "move" && !this.placing ? 0.8 : 1]);
    if (drag && !painted && state.pairs.length && this.sourceSize) {
      const free = maskOf(geometry.around(state.pairs, this.sourceSize), this.sourceSize, null).canvas;
      scene.layers.push([filled(free, TINT), 0.5]);
    }
    if (painted && !drag && this.mode !== "look" && (this.placing || (this.mode === "move" && this.#moved()))) {
      scene.ghost = { placement: this.placement, box: mask.box, cut: mask.cut, source: this.sourceSize, active: this.placing };
      scene.ghost.mirrored = this.mode === "seed" && state.mirror;
    }
    if (this.#cursor && ["brush", "erase"].includes(this.tool) && this.view) {
      scene.brush = { at: this.#cursor, radius: (this.brushWidth / 2) * this.view.scale };
    }
    return scene;
  }

  #moved() {
    const { dx, dy, scale, angle } = this.state;
    return dx !== 0 || dy !== 0 || scale !== 1 || angle !== 0;
  }

  /** The brush in image pixels: 8 % of the short side until it is set. */
  get brushWidth() {
    const short = this.sourceSize ? Math.min(...this.sourceSize) : 512;
    return this.width ?? Math.max(2, Math.round(0.08 * short));
  }

  /** What to do next, in one sentence. */
  get hint() {
    const { state, mask } = this;
    const absent = this.sourceSize ? this.absent.image : this.absent[this.mode === "paste" ? "reference" : "image"];
    if (!this.size) return absent ?? "Connect `image`.";
    if ((state.shapes.length || state.pairs.length) && this.drawnOn && String(this.drawnOn) !== String(this.sourceSize)) {
      return `Drawn on ${this.drawnOn.join(" x ")} pixels: check it, or press Clear.`;
    }
    if (this.mode === "drag") {
      const count = state.pairs.length;
      const out = state.pairs.findIndex((pair) => pair.some((p) => p.some((v, i) => v < 0 || v > this.sourceSize[i])));
      if (out >= 0) return `Point ${out + 1} lies outside the image. Press Clear.`;
      return count ? `${count} ${count > 1 ? "points" : "point"}. Paint what may change, or leave it to the shaded area.` : "Press on a point and pull it to where it should go.";
    }
    if (!mask?.box) return "Paint the object, or pull a box around it.";
    if (this.mode === "look") return "This is the object.";
    if (!this.placing) return this.mode === "move" && this.#moved() ? this.#values() : "Then press Move and pull it to its place.";
    if (this.mode === "seed" && this.#tooLarge()) return "Larger than the canvas: pull a corner inwards.";
    return this.#moved() || this.mode === "seed" ? this.#values() : "Pull the object to its place; corners resize it.";
  }

  /** Whether the host would refuse the subject: it crops half a cell of the latents. */
  #tooLarge() {
    const [x0, y0, x1, y1] = this.mask.box;
    const { size, filling } = this.ground;
    const subject = [x1 - x0, y1 - y0].map((side) => Math.round(side * this.state.scale * filling));
    return subject.some((side, i) => side > size[i] + 4);
  }

  #values() {
    const { dx, dy, scale, angle, x, y } = this.state;
    const size = scale === 1 ? "" : `, ${Math.round(100 * scale)} %`;
    if (this.mode === "seed") return `x ${x}, y ${y}${size || ", 100 %"}`;
    return `${Math.abs(dx)} ${dx < 0 ? "left" : "right"}, ${Math.abs(dy)} ${dy < 0 ? "up" : "down"}${size}${angle ? `, ${angle}\u00b0` : ""}`;
  }

  /** Draw the next frame, with the bar and the words below. */
  refresh() {
    cancelAnimationFrame(this.#frame);
    this.#frame = requestAnimationFrame(() => this.draw());
    this.#fit();
    const names = OF_MODE[this.mode];
    this.tools.forEach((button, i) => button.setAttribute("aria-pressed", String(names[i] === this.tool)));
    this.undoButton.disabled = !this.#history.can(-1);
    this.redoButton.disabled = !this.#history.can(1);
    this.mirrorButton.style.display = this.mirrors ? "" : "none";
    this.slider.style.display = ["brush", "erase"].includes(this.tool) ? "" : "none";
    if (this.sourceSize) this.slider.max = Math.max(8, Math.round(Math.min(...this.sourceSize) / 3));
    this.slider.value = this.brushWidth;
    this.says.textContent = this.says.title = this.hint;
    this.canvas.style.cursor = { place: "move", pull: "pointer", brush: "none", erase: "none" }[this.tool] ?? "crosshair";
  }

  #fit() {
    this.area = [this.stage.clientWidth, this.stage.clientHeight];
    if (this.size && !this.view && this.area[0]) this.view = geometry.fitted(this.size, this.area);
  }

  draw() {
    this.#fit();
    const [width, height] = this.area;
    if (!width || !height) return;
    const shown = this.canvas.getBoundingClientRect().width / width || 1;
    const ratio = geometry.clamp(shown * (window.devicePixelRatio || 1), 1, 3);
    const pixels = [Math.round(width * ratio), Math.round(height * ratio)];
    if (this.canvas.width !== pixels[0] || this.canvas.height !== pixels[1]) [this.canvas.width, this.canvas.height] = pixels;
    const context = this.canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    drawFrame(context, this);
  }

  // -------------------------------------------------------------------------------------------------------------- changes

  setTool(tool) {
    const size = String(this.size);
    this.#drop();
    this.tool = tool;
    if (String(this.size) !== size || this.apart) this.view = null;
    this.refresh();
  }

  #kept() {
    const { shapes, dx, dy, scale, angle, pairs, x, y, mirror } = this.state;
    return { shapes, dx, dy, scale, angle, pairs, x, y, mirror };
  }

  #change(values, done) {
    Object.assign(this.state, values);
    if (values.shapes) this.#mask = null;
    this.onChange(values, done);
  }

  /** A change of a gesture that is not finished. */
  #during(values) {
    this.#gesture.changed = true;
    this.#change(values, false);
  }

  /** A change that can be undone. */
  commit(values) {
    this.#change(values, true);
    this.#history.push(this.#kept());
    this.refresh();
  }

  /** Go through the history; in the middle of a gesture, take back what that did so far. */
  undo(by) {
    const state = this.#history.go(this.#gesture?.changed ? 0 : by);
    this.#gesture = null;
    if (state) this.#change(state, true);
    this.selected = null;
    this.refresh();
  }

  /** End a gesture that is not finished, and take back what it did so far. */
  #drop() {
    if (this.#gesture?.changed) this.undo(0);
    this.#gesture = null;
  }

  clear() {
    const start = ["seed", "look"].includes(this.mode) ? {} : { dx: 0, dy: 0, scale: 1, angle: 0 };
    this.selected = null;
    this.commit(this.mode === "drag" ? { shapes: [], pairs: [] } : { shapes: [], ...start });
    this.setTool(OF_MODE[this.mode][0]);
  }

  // -------------------------------------------------------------------------------------------------------------- pointer

  /** The place of an event on the stage, whatever the page scales it by. */
  #at(event) {
    const rect = this.canvas.getBoundingClientRect();
    return [
      ((event.clientX - rect.left) * this.canvas.clientWidth) / rect.width,
      ((event.clientY - rect.top) * this.canvas.clientHeight) / rect.height,
    ];
  }

  #pointer(event) {
    const at = this.#at(event);
    if (event.type === "pointerdown") {
      if (event.button > 1 || !this.view) return;
      this.#pointers.set(event.pointerId, at);
      this.canvas.setPointerCapture(event.pointerId);
      event.preventDefault();
      event.stopPropagation();
      this.keys.focus({ preventScroll: true });
      this.#drop(); // a second finger: what the first one did was the beginning of a pinch
      const pans = this.#pointers.size > 1 || event.button === 1 || this.space;
      this.#gesture = pans ? { kind: "pan", last: at } : this.#begin(at, geometry.toImage(this.view, at), REACH[event.pointerType] ?? REACH.mouse);
    } else if (event.type === "pointermove") {
      event.stopPropagation();
      this.#cursor = at;
      if (this.#pointers.size > 1) this.#pinch(event.pointerId, at);
      else if (this.#gesture) this.#move(at, geometry.toImage(this.view, at), event);
      if (this.#pointers.has(event.pointerId)) this.#pointers.set(event.pointerId, at);
    } else {
      event.stopPropagation();
      const held = this.#pointers.delete(event.pointerId);
      if (held && this.#gesture && event.type === "pointerup") this.#end();
      if (held) this.#drop();
    }
    this.refresh();
  }

  #pinch(id, at) {
    const [, other] = [...this.#pointers].find(([key]) => key !== id) ?? [];
    const before = this.#pointers.get(id);
    if (!other || !before) return;
    const factor = geometry.distance(at, other) / Math.max(geometry.distance(before, other), 1);
    this.view = geometry.panned(geometry.zoomed(this.view, other, factor), [(at[0] - before[0]) / 2, (at[1] - before[1]) / 2]);
  }

  /** The gesture that a press begins, or null; it takes hold of what is within `reach` screen pixels. */
  #begin(at, point, reach) {
    if (this.tool === "pull") {
      const hit = geometry.pairAt(this.state.pairs, point, reach / this.view.scale);
      const pairs = hit ? structuredClone(this.state.pairs) : [...this.state.pairs, [this.#inside(point), this.#inside(point)]];
      const [index, end] = hit ?? [pairs.length - 1, 1];
      this.selected = index;
      return { kind: "pull", pairs, index, end };
    }
    if (this.placing) {
      if (!this.mask?.box) return null;
      const { placement } = this;
      const handles = geometry.handlesOf(placement, this.mask.box, this.view);
      const kind = geometry.gripAt(this.rotates ? handles : { ...handles, turn: null }, at, reach);
      return kind && { kind, placement, from: point };
    }
    if (this.tool === "box" || this.tool === "outline") return { kind: this.tool, from: point, points: geometry.extended([], point, 1) };
    return { kind: "stroke", points: geometry.extended([], point, 1) };
  }

  #inside([x, y]) {
    const [width, height] = this.sourceSize;
    return [geometry.clamp(geometry.round(x, 1), 0, width), geometry.clamp(geometry.round(y, 1), 0, height)];
  }

  #move(at, point, event) {
    const gesture = this.#gesture;
    if (gesture.kind === "pan") {
      this.view = geometry.panned(this.view, [at[0] - gesture.last[0], at[1] - gesture.last[1]]);
      gesture.last = at;
    } else if (gesture.kind === "pull") {
      gesture.pairs[gesture.index][gesture.end] = this.#inside(point);
      this.#during({ pairs: gesture.pairs });
    } else if (gesture.placement) this.#during(this.#dragged(gesture, point, event));
    else if (gesture.kind === "box") {
      const box = geometry.boxBetween(gesture.from, point, this.sourceSize);
      gesture.shape = box ? { box } : null;
    } else {
      gesture.points = geometry.extended(gesture.points, point, this.tool === "outline" ? 12 : this.brushWidth);
      gesture.shape = this.#stroke(gesture.points);
    }
  }

  #stroke(points) {
    return this.tool === "outline" ? { outline: points } : { [this.tool]: points, width: this.brushWidth };
  }

  /** The values that a handle pulled to a point gives. */
  #dragged({ kind, placement, from }, point, event) {
    if (kind === "turn") return { angle: geometry.turnedBy(placement, from, point, event.shiftKey ? 15 : 1) };
    if (kind === "scale") {
      const scale = geometry.scaledBy(placement, from, point, this.mode === "seed" ? 0.01 : 0.125, this.mode === "seed" ? 16 : 8);
      return this.mode === "seed" ? this.#seeded(scale / this.ground.filling, geometry.pivot(placement)) : { scale };
    }
    // What was taken hold of stays in the image: an object that is pulled out of sight cannot be pulled back.
    const held = this.size.map((side, i) => geometry.clamp(point[i], Math.min(0, from[i]), Math.max(side, from[i])));
    const by = [held[0] - from[0], held[1] - from[1]];
    if (this.mode === "seed") return this.#seeded(this.state.scale, geometry.pivot({ ...placement, shift: placement.shift.map((s, i) => s + by[i]) }));
    return { dx: Math.round(placement.shift[0] + by[0]), dy: Math.round(placement.shift[1] + by[1]) };
  }

  /** The values of a subject that is placed about a point of the canvas. */
  #seeded(scale, centre) {
    const { box } = this.mask;
    const { size: canvas, filling } = this.ground;
    const whole = [box[2] - box[0], box[3] - box[1]].map((side) => side * filling);
    const most = Math.floor(1000 * Math.min(canvas[0] / whole[0], canvas[1] / whole[1])) / 1000;
    const size = whole.map((s) => s * Math.min(scale, most));
    const [x, y] = geometry.seedShare(size, canvas, [centre[0] - size[0] / 2, centre[1] - size[1] / 2]);
    return { scale: Math.min(scale, most), x, y };
  }

  #end() {
    const gesture = this.#gesture;
    this.#gesture = null;
    if (gesture.kind === "pan") return;
    if (gesture.kind === "pull") return this.commit({ pairs: gesture.pairs });
    if (gesture.placement) return this.commit({});
    const shape = gesture.shape ?? (gesture.kind === "stroke" ? this.#stroke(gesture.points) : null);
    if (!shape || (shape.outline && shape.outline.length < 3)) return;
    this.commit({ shapes: [...this.state.shapes, shape] });
    // A box or a line around it is a whole object: what comes next is its place.
    if (this.tool !== "brush" && this.tool !== "erase" && this.mode !== "look") this.setTool("place");
  }

  #wheel(event) {
    if (!this.view || !(event.ctrlKey || this.root.contains(document.activeElement))) return this.onWheel(event);
    event.preventDefault();
    event.stopPropagation();
    this.view = geometry.zoomed(this.view, this.#at(event), Math.exp(-event.deltaY / 400));
    this.refresh();
  }

  // ----------------------------------------------------------------------------------------------------------------- keys

  #key(event) {
    const done = this.#pressed(event.key, event.shiftKey, event.ctrlKey || event.metaKey);
    if (!done) return;
    event.preventDefault();
    event.stopPropagation();
    this.refresh();
  }

  /** Whether a key did something. */
  #pressed(key, shift, control) {
    const letter = key.toLowerCase();
    if (control) {
      if (letter === "z") this.undo(shift ? 1 : -1);
      else if (letter === "y") this.undo(1);
      else return false;
      return true;
    }
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key]?.map((v) => v * (shift ? 10 : 1));
    if (step) return this.#nudge(step);
    if (key === "Escape") return this.#escape();
    if (key === "Delete" || key === "Backspace") return this.#remove();
    if (key === "[" || key === "]") this.width = Math.max(1, Math.round(this.brushWidth * (key === "[" ? 0.8 : 1.25)));
    else if (key === " ") this.space = true;
    else if (key === "0") this.view = null;
    else if (letter === "v" && this.mode !== "look") this.setTool(this.mode === "drag" ? "pull" : "place");
    else if (OF_MODE[this.mode].includes(KEYS[letter])) this.setTool(KEYS[letter]);
    else return false;
    return true;
  }

  #nudge(step) {
    const { state } = this;
    if (this.mode === "drag") {
      if (!state.pairs[this.selected]) return false;
      const pairs = structuredClone(state.pairs);
      pairs[this.selected][1] = this.#inside(pairs[this.selected][1].map((v, i) => v + step[i]));
      this.commit({ pairs });
    } else if (!this.mask?.box || this.mode === "look") return false;
    else if (this.mode === "seed") {
      const { placement } = this;
      const centre = geometry.pivot(placement).map((v, i) => v + 8 * step[i]);
      this.commit(this.#seeded(state.scale, centre));
    } else this.commit({ dx: state.dx + step[0], dy: state.dy + step[1] });
    return true;
  }

  #escape() {
    if (this.#gesture) this.#drop();
    else if (this.selected !== null) this.selected = null;
    else this.keys.blur();
    return true;
  }

  #remove() {
    if (this.mode === "drag" && this.selected !== null) {
      const pairs = this.state.pairs.filter((_, i) => i !== this.selected);
      this.selected = null;
      this.commit({ pairs });
    } else this.clear();
    return true;
  }
}
