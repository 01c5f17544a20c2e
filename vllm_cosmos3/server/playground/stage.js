// The large view: a result in the making with its steps, or when it is done.

import { buttons } from "./actions.js";
import { duration, element, find, media } from "./dom.js";
import { plots } from "./plot.js";
import { file, remove, result, subscribe } from "./results.js";

let shown = null; // id
let built = ""; // what the view was built for
let uses = {};
let capability = null;
let parts = {};

/** Set the view up. ``found`` is the capability block. */
export function setUp(found, actions) {
  capability = found;
  uses = actions;
  subscribe((id) => { if (id === shown) render(); });
  render();
}

/** Show a result; no id shows none. */
export function select(id, { scroll = true } = {}) {
  shown = id;
  render();
  if (scroll && id) find("stage").scrollIntoView({ block: "nearest", behavior: "smooth" });
}

export const selected = () => shown;

function render() {
  const found = shown === null ? null : result(shown);
  const state = found ? `${found.id} ${statusOf(found)} ${found.error ? "error" : ""}` : "none";
  if (state !== built) {
    built = state;
    build(found);
  }
  if (found) refresh(found);
}

function statusOf(found) {
  if (found.kind === "image") return found.cancel ? "in_progress" : found.ended ? "gone" : "completed";
  return found.job.status;
}

function build(found) {
  const view = find("stage");
  view.className = `stage ${found ? statusOf(found) : "empty"}`;
  parts = {};
  if (!found || statusOf(found) === "gone") {
    view.replaceChildren(element("p", { className: "welcome" }, "Describe something and make it. What you make appears here."));
    return;
  }
  parts.frame = element("div", { className: "frame" });
  const prompt = found.kind === "image" ? found.image.prompt : found.job.prompt;
  parts.title = element("h2", {}, prompt || found.id);
  parts.status = element("p", { className: "status", role: "status" });
  const below = element("div", { className: "below" }, parts.title, parts.status);
  view.replaceChildren(parts.frame, below);
  ({ completed: buildDone, failed: buildFailed }[statusOf(found)] ?? buildRunning)(found, below);
}

function buildRunning(found, below) {
  parts.frame.append(element("div", { className: "waiting" }));
  parts.progress = element("progress", { max: 100, "aria-label": "Progress" });
  if (found.kind === "video") below.append(parts.progress);
  const cancel = element("button", { type: "button", id: "cancel" }, "Cancel");
  cancel.addEventListener("click", async () => {
    cancel.disabled = true;
    try {
      await remove(found.id);
      select(null);
    } catch (error) {
      cancel.disabled = false;
      tell(error);
    }
  });
  below.append(cancel);
}

async function buildDone(found, below) {
  below.append(buttons(found, uses, tell), facts(found));
  if (found.job?.action) below.append(plots(found.job.action, capability.action_domains[found.job.action.domain_name]?.composition));
  const { frame } = parts;
  try {
    const sound = found.job?.cosmos3.effective.generate_sound;
    const made = media(await file(found), { autoplay: !sound, muted: !sound });
    if (made.tagName === "IMG") made.alt = found.image.prompt;
    else made.setAttribute("aria-label", found.job.prompt || "the video");
    frame.replaceChildren(made);
  } catch (error) {
    tell(error);
  }
}

function buildFailed(found, below) {
  parts.frame.remove();
  const { code, message } = found.job.error;
  below.append(element("p", { className: "error" }, message, " ", element("code", {}, code)), buttons(found, uses, tell));
}

function tell(error) {
  parts.status.textContent = error.message;
  parts.status.classList.add("error");
}

function refresh(found) {
  if (found.kind === "image") {
    if (found.cancel) parts.status.textContent = "the picture is being made";
    return;
  }
  const { job, preview, step, error } = found;
  if (error) tell(error);
  if (!parts.progress) return;
  parts.progress.value = job.progress;
  if (!error) parts.status.textContent = saying(job);
  if (preview) {
    const picture = parts.frame.querySelector("img") ?? element("img", { className: "preview" });
    picture.src = preview;
    picture.alt = `what is coming, after ${step} steps`;
    if (!picture.isConnected) parts.frame.replaceChildren(picture);
  }
}

/** How far a job is, in words. */
export function saying({ status, cosmos3: { queue, phase, step, num_steps: steps, eta_s: eta } }) {
  const left = (seconds) => (seconds === null || seconds === undefined ? "" : ` · about ${duration(seconds)} left`);
  if (status === "queued") {
    const place = queue?.position;
    const ahead = place ? `in the queue, ${place} before it` : "in the queue, next";
    return ahead + left(queue?.eta_s);
  }
  if (phase === "denoise") return `step ${step} of ${steps}${left(eta)}`;
  return { encode: "reading the prompt", decode: "decoding" }[phase] ?? phase;
}

function facts(found) {
  const list = element("dl", { className: "facts" });
  const add = (name, value) => {
    if (value === null || value === undefined || value === "") return;
    list.append(element("div", {}, element("dt", {}, name), " ", element("dd", {}, String(value))));
  };
  if (found.kind === "image") {
    add("size", found.image.size);
    add("steps", found.image.fields.num_inference_steps);
    add("seed", found.image.fields.seed);
    return list;
  }
  const { job } = found;
  const { effective, warnings, upsampled_prompt: written } = job.cosmos3;
  add("mode", job.cosmos3.mode);
  add("size", job.size);
  add("length", `${job.num_frames} frames, ${Number(job.seconds).toFixed(2)} s`);
  add("steps", effective.num_inference_steps);
  add("of them reused", job.cosmos3.reused_steps || null);
  add("guidance", effective.guidance_scale);
  add("preset", effective.preset);
  add("seed", effective.seed);
  add("made in", duration(job.inference_time_s));
  add("prompt of the reasoner", written);
  for (const warning of warnings) add("note", warning);
  return list;
}
