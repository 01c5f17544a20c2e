// What is known of results: loaded from the server, followed until they end, told to whoever shows them.
//
// A result is {id, kind, job | image, preview, step, error}. ``kind`` is "video" or "image".

import { blob, get, send } from "./api.js";
import { forget, onOtherTab, records, remember } from "./records.js";
import { ended, watch } from "./watching.js";

const PAGE = 24;
const known = new Map();
const listeners = new Set();
const files = new Map(); // addresses of what was downloaded, by path

export const result = (id) => known.get(id);
export const subscribe = (listener) => { listeners.add(listener); };
const tell = (id) => listeners.forEach((listener) => listener(id));

/** Change what is known of a result. */
export function update(id, changes) {
  known.set(id, { ...known.get(id), id, ...changes });
  tell(id);
}

/** A new video, which this browser remembers. */
export function addVideo(job) {
  remember({ kind: "video", id: job.id });
  update(job.id, { kind: "video", job });
  follow(job);
}

/** A new image, which this browser remembers. */
export function addImage(image) {
  remember({ kind: "image", ...image });
  update(image.id, { kind: "image", image });
}

/** Delete a result, or stop making it. */
export async function remove(id) {
  const { kind, cancel } = known.get(id);
  if (cancel) cancel();
  else if (kind === "video") await send(`v1/videos/${id}`, { method: "DELETE" });
  drop(id);
}

function drop(id) {
  forget(id);
  known.delete(id);
  tell(id);
}

/** Ids of this browser's results on a page, the newest first, and whether there are more. */
export async function mine(count) {
  const list = records();
  const shown = list.slice(0, count);
  const there = await Promise.all(shown.map((record) => load(record)));
  const waiting = [...known.values()].filter((each) => each.cancel).map((each) => each.id);
  return { ids: [...waiting, ...shown.filter((_, place) => there[place]).map((each) => each.id)], more: list.length > count };
}

async function load(record) {
  if (record.kind === "image") {
    if (!known.has(record.id)) update(record.id, { kind: "image", image: record });
    return true;
  }
  const before = known.get(record.id)?.job;
  if (before && ended(before)) return true;
  try {
    const job = await get(`v1/videos/${record.id}`);
    update(job.id, { kind: "video", job });
    follow(job);
    return true;
  } catch (error) {
    if (error.status !== 404) throw error;
    drop(record.id);
    return false;
  }
}

/** Ids of the videos of everybody, the newest first, and whether there are more. */
export async function all(count) {
  const ids = [];
  let page = { has_more: true, last_id: null };
  while (page.has_more && ids.length < count) {
    page = await get(`v1/videos?limit=${PAGE}${page.last_id ? `&after=${page.last_id}` : ""}`);
    for (const job of page.data) {
      update(job.id, { kind: "video", job });
      follow(job);
      ids.push(job.id);
    }
  }
  return { ids, more: page.has_more };
}

export { PAGE, onOtherTab };

function follow(job) {
  if (ended(job)) return;
  watch(job.id, ({ job: now, preview, step, gone, error }) => {
    if (gone) drop(job.id);
    else if (now) update(job.id, { job: now, error: null });
    else if (preview) update(job.id, { preview, step });
    else update(job.id, { error });
  });
}

/** Where the file of a finished result is. */
export const path = ({ kind, id, image }, variant = "video") =>
  kind === "image" ? image.path : `v1/videos/${id}/content?variant=${variant}`;

/** The file of a finished result, downloaded once: thumbnails are small, clips are asked for when they are shown. */
export function file(found, variant = "video") {
  const place = path(found, variant);
  if (!files.has(place)) {
    files.set(place, blob(place).catch((error) => {
      files.delete(place);
      throw error;
    }));
  }
  return files.get(place);
}

/** What a result was made from, in the words of a request. */
export function parameters({ kind, job, image }) {
  if (kind === "image") return { mode: "text2image", ...image.fields };
  const { mode, effective, sources, continued_from: before } = job.cosmos3;
  const asked = (name) => sources[name] === "request";
  const fields = { prompt: job.prompt, seed: effective.seed };
  for (const name of ["fps", "guidance_scale", "negative_prompt", "generate_sound", "num_inference_steps", "domain_name",
    "raw_action_dim", "image_size", "action_chunk_size", "preset"]) {
    if (asked(name)) fields[name] = effective[name];
  }
  if (!mode.includes("dynamics") && mode !== "policy" && mode !== "transfer") {
    fields.num_frames = effective.num_frames;
    if (!before) fields.size = `${effective.width}x${effective.height}`;
  }
  return { mode, continue_from: before, ...fields };
}
