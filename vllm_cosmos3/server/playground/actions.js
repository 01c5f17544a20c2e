// What can be done with a result: buttons that the large view and the gallery share.

import { element, isVideo } from "./dom.js";
import { file, parameters, remove } from "./results.js";

/** Buttons for a finished result. ``uses`` are functions: again, vary, goOn, ask; null where one is not offered. */
export function buttons(found, uses, fail) {
  const name = found.kind === "image" ? found.image.prompt : found.job.prompt;
  const made = found.kind === "image" || found.job.status === "completed";
  const known = parameters(found);
  const offered = [
    ["Again", "Put its parameters into the form", () => uses.again(found.id, known)],
    ["Vary seed", "Make it again with another seed", () => uses.vary(found.id, known)],
    ["Continue", "Go on from its last frame", made && found.kind === "video" && uses.goOn ? () => uses.goOn(found.job) : null],
    ["Download", "Save the file", made ? () => download(found) : null],
    ["Ask", "Ask the reasoner about it", made && uses.ask ? async () => uses.ask(await file(found), name) : null],
    ["Delete", "Delete it from the server", () => remove(found.id)],
  ];
  return element("div", { className: "actions-of", role: "group", "aria-label": `What to do with ${name || found.id}` },
    ...offered.filter(([, , act]) => act).map(([label, title, act]) => {
      const button = element("button", { type: "button", className: "quiet", title }, label);
      button.addEventListener("click", async (event) => {
        event.stopPropagation();
        button.disabled = true;
        try {
          await act();
        } catch (error) {
          fail(error);
        } finally {
          button.disabled = false;
        }
      });
      return button;
    }));
}

async function download(found) {
  const blob = await file(found);
  const link = element("a", { href: URL.createObjectURL(blob), download: `${found.id}.${isVideo(blob.type) ? "mp4" : "png"}` });
  link.click();
  URL.revokeObjectURL(link.href);
}
