// Our examples open with text that can be read: a template is otherwise fitted into the window whole, however small that makes it.
import { app } from "../../scripts/app.js";

const FLAG = "slipstreamView"; // in `extra` of an example; it is taken out, so that a saved workflow keeps the view of its user
const WIDTH = 1600; // of the window that the stored views are made for
const DELAYS = [100, 600]; // the frontend fits the view in a later frame

app.registerExtension({
  name: "slipstream.view",
  beforeConfigureGraph(graph) {
    const view = graph?.extra?.ds;
    if (!view || !graph.extra[FLAG]) return;
    delete graph.extra[FLAG];
    const scale = view.scale * Math.min(1, Math.max(0.75, window.innerWidth / WIDTH));
    const offset = [...view.offset];
    const show = () => {
      app.canvas.ds.changeScale(scale);
      [app.canvas.ds.offset[0], app.canvas.ds.offset[1]] = offset;
      app.canvas.setDirty(true, true);
    };
    for (const delay of DELAYS) setTimeout(show, delay);
  },
});
