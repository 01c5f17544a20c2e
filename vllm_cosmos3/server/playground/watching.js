// Unfinished jobs, followed until they end.
//
// A browser has few connections to one server: two jobs are followed by their event stream, which tells every
// step and shows previews, and the others are looked at now and then.

import { ApiError, eventsOf, get, send } from "./api.js";

const STREAMS = 2;
const EVERY = 2000; // milliseconds between looks

export const ended = (job) => job.status === "completed" || job.status === "failed";

const watched = new Set();
let streams = 0;

/** Follow a job. ``told`` gets {job}, {preview}, {gone} or {error}, until it has ended. */
export async function watch(id, told) {
  if (watched.has(id)) return;
  watched.add(id);
  try {
    while (!(await (streams < STREAMS ? stream(id, told) : look(id, told)))) await pause(EVERY);
  } finally {
    watched.delete(id);
  }
}

const pause = (milliseconds) => new Promise((resolve) => { setTimeout(resolve, milliseconds); });

/** Whether the job has ended, after following its events. */
async function stream(id, told) {
  streams += 1;
  try {
    for await (const { name, data } of eventsOf(await send(`v1/videos/${id}/events`))) {
      const value = JSON.parse(data);
      if (name === "preview") told({ preview: `data:image/jpeg;base64,${value.image}`, step: value.step });
      else if (name === "deleted" || name === "error") return gone(told);
      else {
        told({ job: value });
        if (ended(value)) return true;
      }
    }
    return false; // a proxy or a restart has closed it
  } catch (error) {
    return lost(error, told);
  } finally {
    streams -= 1;
  }
}

async function look(id, told) {
  try {
    const job = await get(`v1/videos/${id}`);
    told({ job });
    return ended(job);
  } catch (error) {
    return lost(error, told);
  }
}

function gone(told) {
  told({ gone: true });
  return true;
}

/** Whether there is nothing more to follow. */
function lost(error, told) {
  if (!(error instanceof ApiError)) {
    console.warn(error);
    return false;
  }
  if (error.status === 404) return gone(told);
  told({ error });
  return error.status === 401;
}
