// The panel of Live Stream: ties live/panel.js to the node's widgets and the host's queue. One DOM widget, for both renderers.
// Its value holds source and view as JSON; every live setting lies in the node's own widgets, so that the saved workflow is what was seen.
import { app } from "../../scripts/app.js";
import { Panel } from "./live/panel.js";
import { chained, nodeOf, rootGraph } from "./nodes.js";

const NAMES = { negative: "negative_prompt" }; // settings whose widget has another name
const [HEIGHT, WIDTH] = [430, 460];
const KEY = "slipstream_live"; // of the tab: the streams that its nodes run
const OFF = { 2: "muted", 4: "bypassed" }; // modes of a node
const panels = new Set();

class NodePanel {
  constructor(node, name) {
    this.node = node;
    this.options = {};
    const root = document.createElement("div");
    this.panel = new Panel(root, {
      settings: {},
      compact: true,
      address: (id) => app.api.apiURL(`/slipstream/live/${id}`).replace(/^(https?:)?/, "").replace(/^(\/\/[^/]*)?/, location.origin.replace(/^http/, "ws")),
      start: () => this.queue(),
      stop: () => (this.unwanted = this.waiting),
      onSettings: (values) => this.write(values),
      onPanel: (values) => this.keep(values),
      onEnd: () => this.forget(),
    });
    this.widget = node.addDOMWidget(name, "SLIPSTREAM_LIVE", root, {
      hideOnZoom: false,
      getMinHeight: () => HEIGHT,
      getValue: () => JSON.stringify(this.options),
      setValue: (value) => this.load(value),
    });
    this.widget.onRemove = chained(this.widget.onRemove, () => this.remove());
    panels.add(this);
  }

  load(value) {
    let found = {};
    try {
      found = JSON.parse(value || "{}") ?? {};
    } catch {
      return;
    }
    this.loading = true;
    if (["camera", "screen", "file", "pushed"].includes(found.source)) this.panel.setSource(found.source);
    if (["both", "output"].includes(found.view)) this.panel.setView(found.view);
    this.loading = false;
  }

  keep(values) {
    Object.assign(this.options, values);
    if (this.widget && !this.loading) this.widget.callback?.(JSON.stringify(this.options));
  }

  widgetOf(setting) {
    return this.node.widgets?.find((w) => w.name === (NAMES[setting] ?? setting));
  }

  /** Write settings that were changed in the panel, or by another client, into the node's widgets. */
  write(values) {
    this.look(); // what was typed since goes out first, and is not overwritten
    for (const [name, given] of Object.entries(values)) {
      const widget = this.widgetOf(name);
      const value = Array.isArray(given) ? given.join(",") : given;
      if (!widget || widget.value === value) continue;
      widget.value = value;
      widget.callback?.(value, app.canvas, this.node);
    }
    this.seen = this.values();
    this.node.graph?.setDirtyCanvas?.(true, true);
    clearTimeout(this.storing);
    this.storing = setTimeout(() => {
      const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
      (tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker);
    }, 500);
  }

  values() {
    const found = Object.keys(this.panel.controls).map((name) => [name, this.widgetOf(name)?.value]);
    return Object.fromEntries(found.filter(([, value]) => value !== undefined));
  }

  /** Look for what was typed into the node's widgets: it takes effect in the running stream. */
  look() {
    if (!this.node.graph) return;
    const values = this.values();
    if (!this.seen) return this.settle();
    const changed = Object.entries(values).filter(([name, value]) => value !== this.seen[name]);
    if (!changed.length) return;
    this.seen = values;
    this.panel.setSettings(Object.fromEntries(changed));
    this.panel.send(Object.fromEntries(changed));
  }

  /** Take the node's values as known: a run that is queued now has them, and so has a workflow that was opened. */
  settle() {
    this.seen = this.values();
    this.panel.pending = {};
    this.panel.setSettings(this.seen);
  }

  async queue() {
    const off = OFF[this.node.mode];
    if (off) throw new Error(`The node is ${off}, and so it does not run. Press ${off === "muted" ? "Ctrl-M" : "Ctrl-B"} on it, then Start.`);
    [this.waiting, this.unwanted] = [true, false];
    this.settle();
    const queued = await app.queuePrompt(0);
    const marked = Object.keys(app.lastNodeErrors ?? {}).length > 0;
    if (marked || (queued === false && !(await isQueued()))) throw new Error("The workflow has a mistake. It is marked on the node.");
  }

  /** Join a stream; `place` is the graph and the execution id of the node, for a page that is loaded again. */
  connect(stream, place) {
    this.waiting = false;
    this.place = place;
    sessionStorage.setItem(KEY, JSON.stringify({ ...stored(), [place]: stream }));
    this.look(); // what was typed while the model was loading
    this.panel.connect(stream, this.unwanted);
    this.unwanted = false;
  }

  forget() {
    this.waiting = false;
    const streams = stored();
    delete streams[this.place];
    sessionStorage.setItem(KEY, JSON.stringify(streams));
  }

  /** The run ended before there was a stream: a mistake in the graph, or a cancel. */
  gaveUp(reason) {
    if (this.waiting) this.panel.ended(reason);
  }

  remove() {
    panels.delete(this);
    this.panel.destroy();
  }
}

/** Whether the host has a run of this node: older frontends (1.27) answer false for a run that they queued, too. */
async function isQueued() {
  const { queue_running: running, queue_pending: pending } = await (await app.api.fetchApi("/queue")).json();
  return [...running, ...pending].some(([, , prompt]) => Object.values(prompt).some((node) => node.class_type === "SlipstreamLiveStream"));
}

function stored() {
  try {
    return JSON.parse(sessionStorage.getItem(KEY)) ?? {};
  } catch {
    return {};
  }
}

const panelOf = (node) => [...panels].find((p) => p.node === node);

// Typing has no event that both renderers of all hosts send.
setInterval(() => panels.forEach((panel) => panel.look()), 300);

app.registerExtension({
  name: "slipstream.live",
  getCustomWidgets: () => ({
    SLIPSTREAM_LIVE: (node, name) => ({ widget: new NodePanel(node, name).widget, minWidth: WIDTH, minHeight: HEIGHT }),
  }),
  nodeCreated(node) {
    if (node.comfyClass === "SlipstreamLiveStream") node.setSize([Math.max(node.size[0], WIDTH), node.computeSize()[1]]);
  },
  setup() {
    app.api.addEventListener("slipstream.live", ({ detail }) => {
      panelOf(nodeOf(detail.node))?.connect(detail.stream, `${rootGraph().id}/${detail.node}`);
    });
    app.api.addEventListener("execution_error", ({ detail }) => panels.forEach((p) => p.gaveUp(detail.exception_message ?? "The run failed.")));
    app.api.addEventListener("execution_interrupted", () => panels.forEach((p) => p.gaveUp("Stopped.")));
  },
  afterConfigureGraph() {
    panels.forEach((panel) => panel.settle());
    // A page that was loaded again, or a workflow that was opened again, takes its stream up, if that still runs.
    for (const [place, stream] of Object.entries(stored())) {
      const [graph, id] = place.split("/");
      const panel = graph === rootGraph()?.id ? panelOf(nodeOf(id)) : null;
      if (panel && !panel.panel.running) panel.connect(stream, place);
    }
  },
});
