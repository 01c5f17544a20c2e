// The chat: questions to the reasoner about a picture or clip, answered as they are written.

import { eventsOf, post } from "./api.js";
import { element, find, isVideo, media, say } from "./dom.js";
import { draw, marksIn } from "./marks.js";

const SUGGESTIONS = {
  "Describe": "Describe what is shown.",
  "Find things": 'Locate every object. Answer with JSON: [{"bbox_2d": [x1, y1, x2, y2], "label": "..."}]',
  "Point": 'Point to the main object. Answer with JSON: [{"point_2d": [x, y], "label": "..."}]',
  "What next": "What happens next?",
};
let model = "";
let about = null; // Blob
let messages = [];
let stop = null; // AbortController of the answer that is being written

/** Set the chat up for the model of this name. */
export function setUp(name) {
  model = name;
  for (const [label, text] of Object.entries(SUGGESTIONS)) {
    const button = element("button", { type: "button", className: "quiet" }, label);
    button.addEventListener("click", () => {
      find("question").value = text;
      find("question").focus();
    });
    find("suggestions").append(button);
  }
  find("ask-file").addEventListener("change", (event) => attach(event.target.files[0] ?? null));
  find("ask-clear").addEventListener("click", () => attach(null));
  find("forget").addEventListener("click", forget);
  find("stop").addEventListener("click", () => stop?.abort());
  find("ask-form").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  find("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      ask();
    }
  });
}

/** Talk about a picture or clip from now on. */
export function attach(blob, name = "") {
  about = blob;
  forget();
  const view = blob ? media(blob, { muted: true, autoplay: true }) : null;
  if (view?.tagName === "IMG") view.alt = name || blob.name || "the picture";
  if (view?.tagName === "VIDEO") view.setAttribute("aria-label", name || blob.name || "the clip");
  view?.addEventListener(view.tagName === "IMG" ? "load" : "loadedmetadata", () => {
    const [width, height] = [view.naturalWidth ?? view.videoWidth, view.naturalHeight ?? view.videoHeight];
    find("ask-view").style.setProperty("--ratio", width / height); // small clips are shown larger
  });
  find("ask-view").replaceChildren(...(view ? [view] : []));
  find("ask-clear").hidden = blob === null;
  if (blob === null) find("ask-file").value = "";
  find("question").focus();
}

function forget() {
  stop?.abort();
  messages = [];
  find("transcript").replaceChildren();
  draw(find("ask-view"), []);
  say(find("ask-error"), "");
}

async function ask() {
  const text = find("question").value.trim();
  if (!text || stop) return;
  say(find("ask-error"), "");
  stop = new AbortController();
  toggle();
  const content = [];
  try {
    if (about && !messages.length) content.push(await asContent(about));
    content.push({ type: "text", text });
    messages.push({ role: "user", content });
    bubble("user", text);
    find("question").value = "";
    await answer();
  } catch (error) {
    if (error.name !== "AbortError") say(find("ask-error"), error.message);
    if (messages.at(-1)?.role === "user") messages.pop(); // it may be asked again
  } finally {
    stop = null;
    toggle();
  }
}

function toggle() {
  find("stop").hidden = stop === null;
  find("send").hidden = stop !== null;
}

async function asContent(blob) {
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(blob);
  });
  return isVideo(blob.type) ? { type: "video_url", video_url: { url } } : { type: "image_url", image_url: { url } };
}

async function answer() {
  const body = { model, messages, stream: true, max_tokens: Number(find("longest").value) || 1024 };
  const { signal } = stop;
  const response = await post("v1/chat/completions", body, { signal });
  const shown = bubble("assistant", "");
  let text = "";
  let thought = "";
  try {
    for await (const { data } of eventsOf(response)) {
      if (data === "[DONE]") break;
      const { choices, error } = JSON.parse(data);
      if (error) throw new Error(error.message);
      const delta = choices[0]?.delta ?? {};
      text += delta.content ?? "";
      thought += delta.reasoning ?? delta.reasoning_content ?? "";
      shown.tell(text, thought);
    }
  } finally {
    shown.done();
    messages.push({ role: "assistant", content: text });
  }
  const marks = marksIn(text);
  draw(find("ask-view"), marks);
  const clip = find("ask-view").querySelector("video");
  if (marks.length && clip) {
    clip.pause();
    clip.currentTime = 0; // they are of one frame
  }
}

/** A message in the transcript, which may grow. */
function bubble(role, text) {
  const body = element("p", {}, text);
  const thought = element("p", {});
  const reasoning = element("details", { hidden: true }, element("summary", {}, "Reasoning"), thought);
  const item = element("li", { className: role }, element("span", { className: "who" }, role === "user" ? "You" : model), reasoning, body);
  item.setAttribute("aria-busy", String(role !== "user"));
  const list = find("transcript");
  list.append(item);
  const follow = () => { list.scrollTop = list.scrollHeight; };
  follow();
  return {
    tell(words, thoughts) {
      body.textContent = words;
      thought.textContent = thoughts;
      reasoning.hidden = !thoughts;
      follow();
    },
    done() { item.setAttribute("aria-busy", "false"); },
  };
}
