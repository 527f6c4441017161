// The canvas of Move / Resize Object, Paste Object, Remove Object, Appearance, Drag Points and Place Subject: ties the editor in canvas/ to the host's widgets and images.
// One DOM widget a node, so that it works in the classic and in the Nodes 2.0 renderer. Its value is the JSON of core/drawing.py; what is
// placed (dx, dy, scale, angle, handles, targets, x, y) lies in the node's own widgets, as a person types it.
import { app } from "../../scripts/app.js";
import { Editor } from "./canvas/editor.js";
import { drawnSize, formatDrawing, formatPoints, parseDrawing, parsePairs } from "./canvas/geometry.js";
import { imageOf, wayTo } from "./canvas/sources.js";
import { chained } from "./nodes.js";

const MODES = { SlipstreamMove: "move", SlipstreamPaste: "paste", SlipstreamAppearance: "look", SlipstreamRemove: "look", SlipstreamDrag: "drag", SlipstreamSeedCanvas: "seed" };
const OTHER = "reference_canvas"; // the widget that is drawn on the image of the `reference`
const WIDGETS = ["dx", "dy", "scale", "angle", "about", "x", "y", "width", "height", "mirror", "colour", "background", "invert_keep"];
const KEY = "slipstream_canvas"; // of the results that nodes/canvas.py sends
const [HEIGHT, WIDTH] = [360, 380];
const canvases = new Set();

class NodeCanvas {
  text = "";
  ran = {}; // role -> { url, way } of what the last run sent, and the nodes that it came from
  shown = {}; // role -> URL that is loaded or loading
  broken = {}; // role -> URL that could not be loaded
  seen = ""; // the values that the editor has

  constructor(node, name) {
    this.node = node;
    this.other = name === OTHER;
    this.mode = MODES[node.comfyClass] ?? MODES[node.type] ?? "move";
    const root = document.createElement("div");
    this.editor = new Editor(root, {
      mode: this.mode,
      onChange: (values, done) => this.write(values, done),
      onWheel: (event) => window.LiteGraph?.vueNodesMode || app.canvas?.processMouseWheel?.(event),
    });
    this.widget = node.addDOMWidget(name, "SLIPSTREAM_CANVAS", root, {
      hideOnZoom: false,
      getMinHeight: () => HEIGHT,
      getValue: () => this.text,
      setValue: (value) => this.load(value),
    });
    this.widget.onRemove = chained(this.widget.onRemove, () => this.remove());
    node.onExecuted = chained(node.onExecuted, (output) => this.executed(output));
    canvases.add(this);
  }

  load(value) {
    const text = String(value ?? "");
    if (text === this.text) return;
    this.text = text;
    const shapes = parseDrawing(text);
    this.editor.drawnOn = drawnSize(text);
    this.editor.begin({ shapes });
    if (shapes.length && !["drag", "look"].includes(this.mode)) this.editor.setTool("place"); // what was painted waits for its place
  }

  /** Write what the editor changed into the node's widgets. */
  write(values, done) {
    const given = { ...values };
    if (values.pairs) [0, 1].forEach((end) => (given[["handles", "targets"][end]] = formatPoints(values.pairs.map((p) => p[end]))));
    // A drawing that an undo leaves as it is keeps the size that it was drawn on.
    const { shapes, pairs } = this.editor.state;
    const before = { shapes: parseDrawing(this.text), pairs: this.values().state.pairs ?? [] };
    if (["shapes", "pairs"].some((part) => values[part] && JSON.stringify(values[part]) !== JSON.stringify(before[part]))) {
      this.text = formatDrawing(shapes, this.editor.sourceSize, pairs.length > 0);
      this.editor.drawnOn = drawnSize(this.text);
      this.widget.callback?.(this.text);
    }
    for (const widget of this.node.widgets ?? []) {
      if (widget === this.widget || !(widget.name in given) || widget.value === given[widget.name]) continue;
      widget.value = given[widget.name];
      widget.callback?.(widget.value, app.canvas, this.node);
    }
    this.seen = this.values().text;
    this.node.graph?.setDirtyCanvas?.(true, true);
    if (!done) return;
    const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
    (tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker);
  }

  /** The values of the node's widgets, as the editor's state. */
  values() {
    const of = (name) => this.node.widgets?.find((w) => w.name === name)?.value;
    const found = WIDGETS.map((name) => [name, of(name)]).filter(([, value]) => value !== undefined);
    if (this.mode === "drag") found.push(["pairs", parsePairs(of("handles") ?? "", of("targets") ?? "")]);
    return { state: Object.fromEntries(found), text: JSON.stringify(found) };
  }

  /** Look for what was changed elsewhere: widgets that were typed into, images that were connected or loaded. */
  look() {
    if (!this.node.graph) return;
    const { state, text } = this.values();
    if (text !== this.seen) {
      const first = !this.seen;
      this.seen = text;
      this.editor.rotates = "angle" in state;
      this.editor.mirrors = "mirror" in state;
      if (first) this.editor.begin(state);
      else this.editor.setState(state);
    }
    this.show("image", this.other ? "reference" : "image");
    if (this.mode === "paste") this.show("reference", "reference");
    if (this.mode === "seed") this.fetch("reference", state.background === "picture" ? imageOf(this.node, ["picture"]) : null);
    const mask = imageOf(this.node, this.pathOf("mask"), true);
    this.fetch("mask", mask ?? (this.other ? null : this.last("mask")), !mask ? "white" : state.invert_keep ? "shown" : "hidden");
  }

  /** The inputs that lead to a role's image. */
  pathOf(role) {
    if (role === "mask") return [this.mode === "seed" ? "keep" : this.other ? "reference_mask" : "mask"];
    return role === "reference" ? ["reference", "image"] : ["image"];
  }

  /** What the last run sent for a role, unless the input has been connected to something else since. */
  last(role) {
    const { url, way } = this.ran[role] ?? {};
    return way === wayTo(this.node, this.pathOf(role)) ? url : null;
  }

  /** Show the image that leads to `from`, as the editor's `role`; where there is none, say why. */
  show(role, from) {
    const path = this.pathOf(from);
    const file = imageOf(this.node, path);
    const way = wayTo(this.node, path);
    let why = from === "reference" ? "Connect Invert Photo of the other image to `reference`." : "Connect `image`.";
    if (file) why = this.broken[role] === file ? "The image of Load Image cannot be shown. Choose another file." : "The image is loading.";
    else if (way) why = "Press Run: this image is shown after a run.";
    const last = file ? null : this.last(from);
    const note = last ? "Image of the last run" : ""; // what leads to it may have changed since
    if (why !== this.editor.absent[role] || note !== this.editor.notes[role]) {
      this.editor.absent[role] = why;
      this.editor.notes[role] = note;
      this.editor.refresh();
    }
    this.fetch(role, file ?? last);
  }

  fetch(role, url, kind = "") {
    if (this.shown[role] === kind + url) return;
    this.shown[role] = kind + url;
    const set = (image) => (role === "mask" ? this.editor.setMask(image, kind) : this.editor.setImage(role, image));
    if (!url) return set(null);
    const image = new Image();
    image.onload = () => this.shown[role] === kind + url && set(image);
    image.onerror = () => {
      this.broken[role] = url;
      if (this.shown[role] === kind + url) set(null);
    };
    image.src = url;
  }

  executed(output) {
    const sent = output?.[KEY];
    if (!Array.isArray(sent)) return;
    this.ran = {};
    for (const { role, filename, subfolder, type } of sent) {
      const url = app.api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
      this.ran[role] = { url, way: wayTo(this.node, this.pathOf(role)) };
    }
  }

  remove() {
    canvases.delete(this);
    this.editor.destroy();
  }
}

// The host zooms the graph by a pinch, and hears touches before the nodes do: those of a canvas are kept from it.
for (const name of ["touchstart", "touchmove", "touchend", "touchcancel"]) {
  const ours = (event) => event.target.closest?.(".slipstream-canvas .stage") && event.stopPropagation();
  window.addEventListener(name, ours, { capture: true, passive: true });
}

// Links, uploads and typing have no event that both renderers of all hosts send.
setInterval(() => document.hidden || canvases.forEach((canvas) => canvas.look()), 300);

app.registerExtension({
  name: "slipstream.canvas",
  getCustomWidgets: () => ({
    SLIPSTREAM_CANVAS: (node, name) => ({ widget: new NodeCanvas(node, name).widget, minWidth: WIDTH, minHeight: HEIGHT }),
  }),
  nodeCreated(node) {
    if (node.comfyClass in MODES) node.setSize([Math.max(node.size[0], WIDTH), node.computeSize()[1]]);
  },
});
