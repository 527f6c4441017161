// Workflows that were saved before these seeds lost their control ("fixed", "randomize", ...) hold one value more: it is left out.
import { app } from "../../scripts/app.js";

const CONTROLS = ["fixed", "increment", "decrement", "randomize"];
const CONTROL_AT = { SlipstreamSearchSchedule: 6, SlipstreamTrainLatentFill: 14 }; // place among the widget values

function leaveOut(graph) {
  for (const node of graph?.nodes ?? []) {
    const at = CONTROL_AT[node.type];
    const values = node.widgets_values;
    if (at !== undefined && Array.isArray(values) && CONTROLS.includes(values[at])) values.splice(at, 1);
  }
  for (const inner of graph?.definitions?.subgraphs ?? []) leaveOut(inner);
}

app.registerExtension({
  name: "slipstream_seeds",
  beforeConfigureGraph(graph) {
    leaveOut(graph);
  },
});
