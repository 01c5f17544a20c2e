// Results of this browser: which there are is remembered, what they are is the server's to say.

const NAME = `cosmos3-playground ${new URL(document.baseURI).pathname}`;
const MOST = 200;

/** Records, the newest first: {kind: "video", id} or an image with all that is known of it. */
export function records() {
  try {
    const found = JSON.parse(localStorage.getItem(NAME) ?? "[]");
    return Array.isArray(found) ? found.filter((each) => typeof each?.id === "string") : [];
  } catch {
    return [];
  }
}

export const remember = (record) => keep([record, ...records().filter((each) => each.id !== record.id)]);
export const forget = (id) => keep(records().filter((each) => each.id !== id));

function keep(list) {
  try {
    localStorage.setItem(NAME, JSON.stringify(list.slice(0, MOST)));
  } catch { /* a browser that keeps nothing */ }
}

/** Call back when another tab has changed the records. */
export function onOtherTab(changed) {
  addEventListener("storage", (event) => { if (event.key === NAME) changed(); });
}
