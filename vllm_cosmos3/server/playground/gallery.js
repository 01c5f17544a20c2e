// The gallery: what this browser has made, or everything on the server.

import { buttons } from "./actions.js";
import { element, find } from "./dom.js";
import { PAGE, all, file, mine, onOtherTab, result, subscribe } from "./results.js";
import { saying, select, selected } from "./stage.js";

let uses = {};
let fail = () => {};
let everybody = false;
let count = PAGE;
let ids = [];

/** Set the gallery up; errors go to ``failed``. */
export async function setUp(actions, failed) {
  uses = actions;
  fail = failed;
  subscribe(changed);
  onOtherTab(load);
  find("gallery-more").addEventListener("click", () => {
    count += PAGE;
    load();
  });
  for (const [id, value] of [["scope-mine", false], ["scope-all", true]]) {
    find(id).addEventListener("click", () => {
      everybody = value;
      count = PAGE;
      find("scope-mine").setAttribute("aria-pressed", String(!value));
      find("scope-all").setAttribute("aria-pressed", String(value));
      load();
    });
  }
  await load();
  const running = ids.find((id) => ["queued", "in_progress"].includes(result(id)?.job?.status));
  if (running ?? ids[0]) select(running ?? ids[0], { scroll: false });
}

async function load() {
  try {
    const found = await (everybody ? all(count) : mine(count));
    ids = found.ids;
    find("gallery-more").hidden = !found.more;
    render();
  } catch (error) {
    fail(error);
  }
}

function changed(id) {
  const found = result(id);
  const gone = !found || found.ended;
  if (gone) ids = ids.filter((each) => each !== id);
  else if (!ids.includes(id) && !everybody) ids = [id, ...ids];
  if (gone && selected() === id) select(null, { scroll: false });
  if (gone || !card(id)) render();
  else refresh(card(id), found);
}

const card = (id) => find("gallery").querySelector(`[data-id="${CSS.escape(id)}"]`);

function render() {
  const list = find("gallery");
  const there = new Map([...list.children].map((each) => [each.dataset.id, each]));
  list.replaceChildren(...ids.filter((id) => result(id)).map((id) => {
    const made = there.get(id) ?? create(id);
    refresh(made, result(id));
    return made;
  }));
  find("gallery-empty").hidden = list.children.length > 0;
}

function create(id) {
  const view = element("button", { type: "button", className: "thumbnail" });
  view.addEventListener("click", () => select(id));
  const made = element("li", {}, view, element("p", { className: "caption" }), element("p", { className: "small" }));
  made.dataset.id = id;
  return made;
}

function refresh(made, found) {
  const [view, caption, small] = made.children;
  const job = found.job ?? null;
  const name = job ? job.prompt : found.image.prompt;
  const status = job ? job.status : found.cancel ? "in_progress" : "completed";
  caption.textContent = name || found.id;
  view.setAttribute("aria-label", `Show ${name || found.id}`);
  if (status === "completed") small.textContent = told(found);
  else small.textContent = status === "failed" ? job.error.message : job ? saying(job) : "being made";
  if (made.dataset.status === status) return;
  made.dataset.status = status;
  made.querySelector(".actions-of")?.remove();
  view.replaceChildren(element("span", { className: "waiting" }));
  if (status === "completed") picture(view, found);
  if (status === "failed") view.replaceChildren(element("span", { className: "failed" }, "failed"));
  if (status === "completed" || status === "failed") made.append(buttons(found, uses, fail));
}

async function picture(view, found) {
  try {
    const source = URL.createObjectURL(await file(found, "thumbnail"));
    view.replaceChildren(element("img", { src: source, alt: "" }));
  } catch (error) {
    view.replaceChildren(element("span", { className: "failed" }, error.code === "expired" ? "deleted by the server" : error.message));
  }
}

function told({ job, image }) {
  if (image) return [image.size, `seed ${image.fields.seed}`].join(" · ");
  return [job.size, `${Number(job.seconds).toFixed(1)} s`, `seed ${job.cosmos3.seed}`].join(" · ");
}
