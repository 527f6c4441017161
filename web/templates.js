// Our examples stand in the template browser in the order of their numbers: the host lists them as the disk does.
import { app } from "../../scripts/app.js";

const PACK = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2));
const listed = app.api.getWorkflowTemplates;

if (listed) {
  app.api.getWorkflowTemplates = async function (...given) {
    const found = await listed.apply(this, given);
    found?.[PACK]?.sort?.();
    return found;
  };
}
