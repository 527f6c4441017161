// Warnings of Slipstream's nodes: a toast, and a text on the node until it runs again. Nothing is saved in the workflow.
// Events: "slipstream.warning" while a node runs; the standard "executed" when it ends, or when its result is cached.
import { app } from "../../scripts/app.js";
import { nodeOf, rootGraph } from "./nodes.js";

const NAME = "slipstream_warnings";
const MARGIN = 10;
const PADDING = 6;
const LINE = 16;
const FONT = `12px/${LINE}px sans-serif`;
const entries = new Map(); // graph id -> Map(execution id of the node -> [{ text, by, type }])
let running = null; // the id of the graph whose prompt runs

function entriesOf(graphId) {
  if (!entries.has(graphId)) entries.set(graphId, new Map());
  return entries.get(graphId);
}

/** Input names in backticks as this node shows them: a renamed widget by its label. */
function withLabels(node, text) {
  const shown = (name) => [...(node.widgets ?? []), ...(node.inputs ?? [])].find((w) => w.name === name && w.label)?.label;
  return text.replace(/`([^`]+)`/g, (_, name) => "`" + (shown(name) ?? name) + "`");
}

function makeElement(texts) {
  const element = document.createElement("div");
  const content = document.createElement("div");
  element.style.cssText = "overflow: auto; pointer-events: auto;";
  content.style.cssText =
    `padding: ${PADDING}px 8px; border-radius: 6px; border-left: 3px solid #e0a030; background: rgba(224, 160, 48, 0.18);` +
    `font: ${FONT}; color: var(--input-text, #ddd); white-space: normal; overflow-wrap: anywhere; user-select: text;`;
  content.setAttribute("role", "alert");
  for (const text of texts) {
    const line = document.createElement("div");
    line.textContent = `\u26a0 ${text}`;
    content.append(line);
  }
  element.append(content);
  return element;
}

/** Height of the texts at the node's width; the element itself has none before the browser has drawn it. */
function heightOf(node, texts) {
  const context = document.createElement("canvas").getContext("2d");
  context.font = FONT;
  const width = Math.max(node.size[0] - 2 * MARGIN - 24, 60);
  const lines = (text) => {
    let count = 1;
    let line = "";
    for (const word of text.split(" ")) {
      const longer = line ? `${line} ${word}` : word;
      if (line && context.measureText(longer).width > width) [count, line] = [count + 1, word];
      else line = longer;
    }
    return count;
  };
  return 2 * PADDING + LINE * texts.map((text) => lines(`\u26a0 ${text}`)).reduce((a, b) => a + b, 0);
}

function resize(node, by) {
  node.setSize([node.size[0], Math.max(node.size[1] + by, 0)]);
  node.graph?.setDirtyCanvas?.(true, true);
}

function hide(node) {
  const widget = node.widgets?.find((w) => w.name === NAME);
  if (!widget) return;
  node.removeWidget(widget);
  resize(node, -widget.slipstreamHeight);
}

/** Show these texts on a node, in place of those that it shows; an empty list removes them. */
function show(node, given) {
  const texts = given.map((text) => withLabels(node, text));
  const value = texts.join("\n");
  if ((node.widgets?.find((w) => w.name === NAME)?.value ?? "") === value) return;
  hide(node);
  if (!texts.length) return;
  const element = makeElement(texts);
  const height = heightOf(node, texts) + 2 * MARGIN;
  const widget = node.addDOMWidget(NAME, NAME, element, {
    serialize: false,
    hideOnZoom: false,
    margin: MARGIN,
    getMinHeight: () => height,
    getValue: () => value,
    setValue: () => {},
  });
  widget.serialize = false;
  widget.slipstreamHeight = height;
  keepSavedSize(node);
  resize(node, widget.slipstreamHeight);
}

/** The workflow is saved with the size that the node has without its warning. */
function keepSavedSize(node) {
  if (node.slipstreamSavedSize) return;
  node.slipstreamSavedSize = true;
  const before = node.onSerialize;
  node.onSerialize = function (saved) {
    before?.call(this, saved);
    const widget = this.widgets?.find((w) => w.name === NAME);
    if (widget && saved.size) saved.size = [saved.size[0], saved.size[1] - widget.slipstreamHeight];
  };
}

/** Another workflow may have another node of this id: its class decides. */
function draw(id, list) {
  const node = nodeOf(id);
  if (node) show(node, list.filter((e) => e.type === "" || e.type === node.comfyClass).map((e) => e.text));
}

function refresh(id) {
  if (running !== rootGraph()?.id) return; // another workflow is open: shown when its own is opened again
  draw(id, entriesOf(running).get(id) ?? []);
}

function change(id, update) {
  const list = entriesOf(running);
  list.set(id, update(list.get(id) ?? []));
  refresh(id);
}

function onStart() {
  running = rootGraph()?.id ?? null;
}

function onWarning({ detail }) {
  const { node: id, by, class_type: type, text } = detail;
  const node = nodeOf(id);
  const ours = running === rootGraph()?.id && node && (type === "" || node.comfyClass === type);
  if ((entriesOf(running).get(id) ?? []).some((e) => e.text === text)) return;
  change(id, (old) => [...old, { text, by, type }]);
  app.extensionManager?.toast?.add({
    severity: "warn",
    summary: ours ? node.title : detail.title,
    detail: ours ? withLabels(node, text) : text,
    life: 10000,
  });
}

/** A node starts: what it, or what another node's sampler said while it ran, no longer holds. */
function onExecuting({ detail }) {
  if (detail == null) return;
  const id = String(detail);
  for (const owner of [...entriesOf(running).keys()]) change(owner, (old) => old.filter((e) => owner !== id && e.by !== id));
}

function onExecuted({ detail }) {
  const id = String(detail.display_node ?? detail.node);
  const texts = [...new Set(detail.output?.warnings ?? [])]; // a node that ran once for each of a list repeats itself
  const type = nodeOf(id)?.comfyClass ?? "";
  if (!type.startsWith("Slipstream")) return; // others may use the same key
  change(id, (old) => [...texts.map((text) => ({ text, by: id, type })), ...old.filter((e) => e.by !== id)]);
}

app.registerExtension({
  name: "slipstream.warnings",
  setup() {
    app.api.addEventListener("execution_start", onStart);
    app.api.addEventListener("slipstream.warning", onWarning);
    app.api.addEventListener("executing", onExecuting);
    app.api.addEventListener("executed", onExecuted);
  },
  afterConfigureGraph() {
    for (const [id, list] of entriesOf(rootGraph()?.id)) draw(id, list);
  },
});
