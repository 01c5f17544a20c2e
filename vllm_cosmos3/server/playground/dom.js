// Elements of the page. Text from outside is always inserted as text.

export const find = (id) => document.getElementById(id);

/** A new element. Properties are set as they are; children are elements or texts. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Show a text, or hide its element if there is none. */
export function say(target, text) {
  target.textContent = text ?? "";
  target.hidden = !text;
}

export const isVideo = (type) => type.startsWith("video/");

/** A picture or clip of a blob, whose address lives as long as the element is used. */
export function media(blob, properties = {}) {
  const source = URL.createObjectURL(blob);
  return isVideo(blob.type)
    ? element("video", { src: source, controls: true, loop: true, playsInline: true, ...properties })
    : element("img", { src: source, alt: "", ...properties });
}

/** Seconds as people say them. */
export function duration(seconds) {
  if (seconds < 1) return "less than a second";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes} min` : `${(seconds / 3600).toFixed(1)} h`;
}
