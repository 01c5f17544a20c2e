// Boxes and points that an answer names, and how they are drawn over the picture.

import { element } from "./dom.js";

const SCALE = 1000; // both count from 0 to 1000 along each side of the picture

/** Boxes and points of the JSON in an answer: [{bbox_2d, label}] or [{point_2d, label}]. */
export function marksIn(text) {
  const found = [];
  for (const value of jsonIn(text)) collect(value, found);
  return found;
}

function collect(value, found) {
  if (Array.isArray(value)) return value.forEach((item) => collect(item, found));
  if (value === null || typeof value !== "object") return undefined;
  const label = String(value.label ?? value.caption ?? "");
  const box = numbers(value.bbox_2d ?? value.box_2d, 4);
  const point = numbers(value.point_2d ?? value.point, 2);
  if (box) found.push({ box, label });
  else if (point) found.push({ point, label });
  else Object.values(value).forEach((item) => collect(item, found));
  return undefined;
}

const numbers = (value, count) =>
  Array.isArray(value) && value.length === count && value.every(Number.isFinite) ? value : null;

/** JSON arrays and objects in prose, outermost first. */
function* jsonIn(text) {
  for (let start = 0; start < text.length; start += 1) {
    if (!"[{".includes(text[start])) continue;
    const end = closing(text, start);
    if (end < 0) continue;
    try {
      yield JSON.parse(text.slice(start, end + 1));
      start = end;
    } catch { /* prose in brackets */ }
  }
}

function closing(text, start) {
  let depth = 0;
  let quoted = false;
  for (let place = start; place < text.length; place += 1) {
    const letter = text[place];
    if (quoted) {
      if (letter === "\\") place += 1;
      else if (letter === '"') quoted = false;
    } else if (letter === '"') quoted = true;
    else if ("[{".includes(letter)) depth += 1;
    else if ("]}".includes(letter) && (depth -= 1) === 0) return place;
  }
  return -1;
}

/** Draw marks over a picture, in place of earlier ones. */
export function draw(over, marks) {
  over.querySelectorAll(".mark").forEach((old) => old.remove());
  const percent = (value) => `${(Math.min(Math.max(value, 0), SCALE) / SCALE) * 100}%`;
  marks.forEach(({ box, point, label }, index) => {
    const made = element("div", { className: `mark ${box ? "box" : "point"} hue-${index % 6}` });
    if (label) made.append(element("span", {}, label));
    const [x1, y1, x2, y2] = box ?? [...point, ...point];
    made.style.left = percent(Math.min(x1, x2));
    made.style.top = percent(Math.min(y1, y2));
    made.classList.toggle("under", Math.min(y1, y2) < 80); // there is no room for a label above
    if (box) {
      made.style.width = percent(Math.abs(x2 - x1));
      made.style.height = percent(Math.abs(y2 - y1));
    }
    over.append(made);
  });
}
