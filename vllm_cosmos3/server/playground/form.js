// The form of a request: fields of the mode that is chosen, sent as JSON or, with a file, as a form.

import { post } from "./api.js";
import { element, find, media, say } from "./dom.js";
import { MODES, offered } from "./modes.js";
import { addImage, addVideo, result, update } from "./results.js";

const BY_CLIP = new Set(["edge", "blur"]); // controls that the server computes from an ordinary clip
const inputs = new Map(); // files of this session's requests, by result
let capability = null;
let mode = "";
let input = null; // File
let before = null; // job that is gone on from
let select = () => {};

const distilled = () => capability.checkpoint_kind.startsWith("distilled");
const defaults = () => capability.defaults[mode] ?? {};
const named = (name) => find("request").querySelector(`[name="${CSS.escape(name)}"]`);
const show = (id, shown) => { find(id).hidden = !shown; };

/** Set the form up for what a checkpoint can do. ``selected`` is called with the id of a new result. */
export function setUp(found, selected) {
  capability = found;
  select = selected;
  const names = offered(capability);
  const radios = names.map((name) => {
    const radio = element("input", { type: "radio", name: "mode", value: name, id: `mode-${name}` });
    radio.addEventListener("change", () => choose(name));
    return element("label", {}, radio, element("span", {}, MODES[name].label));
  });
  find("modes").replaceChildren(find("modes").querySelector("legend"), ...radios);
  find("domain").replaceChildren(...Object.keys(capability.action_domains).map((name) => new Option(name)));
  if (capability.checkpoint_kind === "policy-droid") find("domain").value = "droid_lerobot";
  const tiers = ["256", "480", "704", "720"].filter((tier) => tier in capability.resolutions);
  find("tier").replaceChildren(new Option("that of the embodiment", ""), ...tiers.map((tier) => new Option(`${tier}p`, tier)));
  find("preset").replaceChildren(new Option("that of the server", ""), ...capability.presets.map((name) => new Option(name)));
  show("preset-field", capability.presets.length > 1);
  show("upsample-field", capability.prompt_upsampling);
  show("preview-field", capability.preview);
  choose(names[0]);
  listen();
}

function listen() {
  const form = find("request");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit();
  });
  form.addEventListener("input", (event) => event.target.removeAttribute("aria-invalid"));
  find("size").addEventListener("change", () => show("custom-field", find("size").value === "custom"));
  find("seconds").addEventListener("input", () => {
    const frames = Number(find("seconds").value) * rate();
    find("frames").value = frames ? Math.max(5, 4 * Math.round((frames - 1) / 4) + 1) : "";
  });
  for (const id of ["frames", "fps"]) find(id).addEventListener("input", tellSeconds);
  find("dice").addEventListener("click", () => { find("seed").value = draw(); });
  find("domain").addEventListener("change", tellDomain);
  find("input-file").addEventListener("change", (event) => take(event.target.files[0] ?? null));
  find("input-clear").addEventListener("click", () => take(null));
  find("continues-clear").addEventListener("click", () => goOn(null));
  const drop = find("drop");
  drop.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
  });
}

const draw = () => crypto.getRandomValues(new Uint32Array(1))[0];
const rate = () => Number(find("fps").value) || defaults().fps || 24;

function tellSeconds() {
  const frames = Number(find("frames").value);
  find("seconds").value = frames ? (frames / rate()).toFixed(2).replace(/\.?0+$/, "") : "";
}

function choose(name) {
  mode = name;
  const row = MODES[mode];
  find(`mode-${mode}`).checked = true;
  if (mode !== "image2video") before = null;
  show("continues", before !== null);
  show("input-field", Boolean(row.input) && before === null);
  show("control-field", row.control);
  for (const id of ["domain-field", "tier-field", "chunk-field"]) show(id, row.actions);
  show("action-field", row.rows);
  show("size-field", row.size && before === null);
  show("custom-field", false);
  show("length-fields", row.length);
  show("sound-field", row.sound && capability.sound && before === null);
  show("fps-field", row.length && before === null);
  for (const id of ["steps-field", "guidance-field"]) show(id, !distilled());
  if (row.input) {
    const kind = row.input === "image" ? "picture" : "clip";
    find("input-label").textContent = row.inputLabel;
    find("input-button").textContent = `Choose a ${kind}`;
    find("input-file").accept = `${row.input}/*`;
    if (input && !input.type.startsWith(row.input)) take(null);
  }
  const { width, height, num_frames: frames, num_inference_steps: steps, guidance_scale: guidance, fps } = defaults();
  const usual = row.input ? "like the input" : `${width} x ${height}`;
  const tiers = Object.entries(capability.resolutions).map(([tier, sizes]) => {
    const group = element("optgroup", { label: `${tier}p` });
    group.append(...sizes.map((size) => new Option(size.replace("x", " x "), size)));
    return group;
  });
  find("size").replaceChildren(new Option(`${usual} (default)`, ""), ...tiers, new Option("another …", "custom"));
  find("frames").placeholder = frames ?? "";
  find("seconds").placeholder = frames ? (frames / fps).toFixed(1) : "";
  find("fps").placeholder = fps ?? "";
  find("steps").placeholder = steps ?? "30";
  find("guidance").placeholder = guidance ?? "";
  tellDomain();
  tellSeconds();
  fail(null);
}

function tellDomain() {
  const row = capability.action_domains[find("domain").value];
  if (!row) return;
  find("domain-hint").textContent = `${row.composition}; ${row.fps} frames a second`;
  find("chunk").placeholder = row.action_chunk_size;
  const widths = [row.raw_action_dim, ...row.other_widths].filter((width) => width !== null);
  find("action-width").replaceChildren(...widths.map((width) => new Option(width, width)));
  show("width-field", MODES[mode].actions && widths.length > 1);
}

function take(file) {
  input = file;
  find("input-view").replaceChildren(...(file ? [media(file, { muted: true })] : []));
  find("input-file").removeAttribute("aria-invalid");
  show("input-clear", file !== null);
  find("input-hint").textContent = file ? file.name : "or drop it here";
  if (!file) find("input-file").value = "";
}

/** Make the next request go on from a finished video. */
export function goOn(job) {
  before = job;
  if (job) {
    find("continues-text").textContent = job.prompt || job.id;
    if (!find("prompt").value) find("prompt").value = job.prompt;
  }
  choose("image2video");
  find("prompt").focus();
}

/** Put the parameters of a result into the form. */
export function fill(id, { mode: name, continue_from: earlier, ...fields }) {
  find("request").reset();
  before = earlier ? result(earlier)?.job ?? { id: earlier, prompt: earlier } : null;
  choose(name);
  if (before) find("continues-text").textContent = before.prompt;
  for (const [field, value] of Object.entries(fields)) {
    const target = named(field);
    if (!target) continue;
    if (target.type === "checkbox") target.checked = value;
    else target.value = value;
  }
  if (fields.size) {
    const listed = [...find("size").options].some((option) => option.value === fields.size);
    find("size").value = listed ? fields.size : "custom";
    find("custom-size").value = fields.size;
    show("custom-field", !listed);
  }
  tellDomain();
  if (fields.raw_action_dim) find("action-width").value = fields.raw_action_dim;
  tellSeconds();
  take(inputs.get(id) ?? null);
}

/** Send what a result was made from again, with another seed. */
export async function vary(id, found) {
  fill(id, { ...found, seed: draw() });
  await submit();
}

/** The fields that are shown and filled in. */
function fields() {
  const found = {};
  for (const target of find("request").elements) {
    if (!target.name || target.type === "radio" || target.type === "file") continue;
    if (target.closest("[hidden]")) continue;
    if (target.type === "checkbox") {
      if (target.checked) found[target.name] = true;
    } else if (target.value.trim() !== "") {
      found[target.name] = target.type === "number" || target.name === "image_size" || target.name === "raw_action_dim"
        ? Number(target.value) : target.value;
    }
  }
  if (!find("size-field").hidden && !["", "custom"].includes(find("size").value)) found.size = find("size").value;
  if (before) found.continue_from = before.id;
  if (MODES[mode].actions) found.action_mode = mode;
  return found;
}

async function submit() {
  fail(null);
  find("submit").disabled = true;
  try {
    await (mode === "text2image" ? makeImage() : makeVideo());
  } catch (error) {
    fail(error);
  } finally {
    find("submit").disabled = false;
  }
}

async function makeVideo() {
  const { control, action, ...body } = fields();
  if (action) body.action = rows(action);
  const { input: wanted } = MODES[mode];
  const file = wanted && !before ? input : null;
  if (wanted && !before && !file) {
    const error = new Error(`choose a ${wanted === "image" ? "picture" : "clip"} first`);
    throw Object.assign(error, { param: "input_reference" });
  }
  if (control && BY_CLIP.has(control)) body[control] = true;
  const job = await (await post("v1/videos", file ? asForm(body, file, control) : body)).json();
  if (file) inputs.set(job.id, file);
  addVideo(job);
  select(job.id);
}

function rows(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw Object.assign(new Error(`the actions are not JSON: ${error.message}`), { param: "action" });
  }
}

function asForm(body, file, control) {
  const form = new FormData();
  for (const [name, value] of Object.entries(body)) {
    form.append(name, typeof value === "object" ? JSON.stringify(value) : value);
  }
  if (control && !BY_CLIP.has(control)) {
    form.append("control_reference", file);
    form.append("control_type", control);
  } else form.append("input_reference", file);
  return form;
}

async function makeImage() {
  const { preview, ...body } = fields();
  const waiting = `pending-${crypto.randomUUID()}`;
  const abort = new AbortController();
  const image = { fields: body, prompt: body.prompt ?? "" };
  update(waiting, { kind: "image", image, cancel: () => abort.abort() });
  select(waiting);
  try {
    const sent = { ...body, response_format: "url" };
    const made = await (await post("v1/images/generations", sent, { signal: abort.signal })).json();
    const path = made.data[0].url.match(/v1\/images\/.*$/)[0];
    const { effective } = made.cosmos3;
    const id = path.split("/")[2];
    addImage({ ...image, id, path, size: made.size, created: made.created, fields: { ...body, seed: effective.seed, num_inference_steps: effective.num_inference_steps } });
    select(id);
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  } finally {
    update(waiting, { ended: true, cancel: null });
  }
}

/** Say an error, and mark the field that it names. */
function fail(error) {
  for (const marked of find("request").querySelectorAll("[aria-invalid]")) marked.removeAttribute("aria-invalid");
  say(find("request-error"), error ? sentence(error.message) : "");
  if (!error?.param) return;
  const name = error.param.split(".").pop();
  const target = name === "size" && find("custom-field").hidden ? find("size")
    : named(["image", "video"].includes(name) ? "input_reference" : name);
  if (!target || target.closest("[hidden]")) return;
  target.closest("details")?.setAttribute("open", "");
  target.setAttribute("aria-invalid", "true");
  target.focus();
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);
