// The HTTP API of this server. Paths are relative to the page, so that a root path is kept.

let key = ""; // in memory alone

export const useKey = (value) => { key = value; };

/** An error in the words of the API, with the field that it is about. */
export class ApiError extends Error {
  constructor(status, { message, code, param }) {
    super(message);
    this.status = status;
    this.code = code;
    this.param = param;
  }
}

/** The response to a request; an ApiError unless it is a success. */
export async function send(path, { headers = {}, ...options } = {}) {
  const authorization = key ? { Authorization: `Bearer ${key}` } : {};
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), {
      headers: { ...authorization, ...headers },
      ...options,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "the server cannot be reached", code: "unreachable" });
  }
  if (!response.ok) throw new ApiError(response.status, await facts(response));
  return response;
}

async function facts(response) {
  const text = await response.text();
  try {
    const { error } = JSON.parse(text);
    if (typeof error === "string") return { message: error };
    return error.message ? error : { message: JSON.stringify(error) };
  } catch {
    return { message: text.slice(0, 300) || `the server answered with status ${response.status}` };
  }
}

export const get = async (path) => (await send(path, { headers: { Accept: "application/json" } })).json();
export const blob = async (path) => (await send(path)).blob();

export async function post(path, body, options = {}) {
  const form = body instanceof FormData;
  const headers = form ? {} : { "Content-Type": "application/json" };
  return send(path, { method: "POST", headers, body: form ? body : JSON.stringify(body), ...options });
}

/** Server-sent events of a response, as {name, data}. */
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text = (text + value).replaceAll("\r\n", "\n");
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const event = { name: "message", data: "" };
      for (const line of part.split("\n")) {
        if (line.startsWith("event:")) event.name = line.slice(6).trim();
        if (line.startsWith("data:")) event.data += line.slice(5).trim();
      }
      if (event.data) yield event;
    }
  }
}
