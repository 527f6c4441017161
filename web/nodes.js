// What our extensions share: finding nodes, and calling after what was there before. Pure but for the host's app.
import { app } from "../../scripts/app.js";

export const rootGraph = () => app.rootGraph ?? app.graph;

/** The node of an execution id: "5", or "10:3" for node 3 in the subgraph of node 10. */
export function nodeOf(id) {
  let graph = rootGraph();
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return node;
}

export function chained(before, after) {
  return function (...given) {
    const result = before?.apply(this, given);
    after(...given);
    return result;
  };
}
