// Which image a canvas shows: that of the Load Image behind its input, through sub-graphs and reroutes, without a run.
import { app } from "../../../scripts/app.js";

const LOADERS = ["LoadImage", "LoadImageMask", "LoadImageOutput"];
const INPUT_OF_SUBGRAPH = -10; // the origin of a link that comes from outside

const linkOf = (graph, id) => graph?.getLink?.(id) ?? graph?.links?.get?.(id) ?? graph?.links?.[id];
const rootGraph = () => app.rootGraph ?? app.graph;

/** The node of the outer graph whose inside a graph is. */
function ownerOf(inner, graph = rootGraph()) {
  for (const node of graph?.nodes ?? graph?._nodes ?? []) {
    if (node.subgraph === inner) return node;
    const deeper = node.subgraph && ownerOf(inner, node.subgraph);
    if (deeper) return deeper;
  }
  return null;
}

/** [node, slot] that an input gets its value from, or null. */
function sourceOf(node, input) {
  const slot = typeof input === "number" ? node?.inputs?.[input] : node?.inputs?.find((i) => i.name === input);
  const link = slot && slot.link != null ? linkOf(node.graph, slot.link) : null;
  return link ? followed(node.graph, link) : null;
}

function followed(graph, link) {
  if (Number(link.origin_id) === INPUT_OF_SUBGRAPH) {
    const owner = ownerOf(graph);
    return owner && sourceOf(owner, link.origin_slot);
  }
  const origin = graph.getNodeById(link.origin_id);
  if (origin?.type === "Reroute") return sourceOf(origin, 0);
  if (!origin?.subgraph) return origin && [origin, link.origin_slot];
  const inner = linkOf(origin.subgraph, origin.subgraph.outputs?.[link.origin_slot]?.linkIds?.[0]);
  return inner ? followed(origin.subgraph, inner) : null;
}

/**
 * The URL of a loader's file: "name.png", "folder/name.png" or "name.png [output]".
 *
 * A JPEG comes as it is: the browser turns it as its EXIF says, as Load Image does, and it has no alpha that would hide a part.
 */
function urlOf(value, channel) {
  const [, path, type = "input"] = /^(.*?)(?: \[(\w+)\])?$/.exec(value);
  const at = path.lastIndexOf("/");
  const query = { filename: path.slice(at + 1), subfolder: path.slice(0, Math.max(at, 0)), type };
  if (channel !== "rgb" || !/\.jpe?g$/i.test(path)) query.channel = channel;
  return app.api.apiURL(`/view?${new URLSearchParams(query)}`);
}

/** The nodes and slots that a path leads through, as text; empty where its first input is not connected. `path` as in `imageOf`. */
export function wayTo(node, path) {
  const way = [];
  for (let found = [node, 0], i = 0; found && i < path.length; i++) {
    found = sourceOf(found[0], path[i]);
    if (found) way.push(`${found[0].id}:${found[1]}`);
  }
  return way.join(" ");
}

/**
 * The URL of the image that lies behind an input, or null where only a run can tell.
 *
 * `path` names the input, then the inputs of the nodes behind it. With `mask` the image is one whose alpha is 0 where the mask is 1.
 */
export function imageOf(node, path, mask = false) {
  let found = [node, 0];
  for (const name of path) found = found && sourceOf(found[0], name);
  if (!found) return null;
  const [origin, slot] = found;
  const file = origin.widgets?.find((w) => w.name === "image")?.value;
  if (!LOADERS.includes(origin.type) || typeof file !== "string" || !file || (slot === 1) !== mask) return null;
  return urlOf(file, mask ? "a" : "rgb");
}
