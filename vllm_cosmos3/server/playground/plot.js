// Actions as plots: one small curve for each number of an action row.

import { element } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 200;
const HEIGHT = 64;

/** Plots of an action object of the API. */
export function plots(action, composition) {
  const [count, numbers] = action.shape;
  const note = `${count} actions of ${numbers} numbers, ${action.units}${composition ? `: ${composition}` : ""}`;
  const grid = element("div", { className: "plots" });
  for (let index = 0; index < numbers; index += 1) {
    grid.append(plot(action.data.map((row) => row[index]), index));
  }
  return element("figure", { className: "actions" }, element("figcaption", {}, note), grid);
}

function plot(values, index) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  const spread = high - low || 1;
  const x = (place) => (place / Math.max(1, values.length - 1)) * WIDTH;
  const y = (value) => HEIGHT - 4 - ((value - low) / spread) * (HEIGHT - 8);
  const line = document.createElementNS(SVG, "polyline");
  line.setAttribute("points", values.map((value, place) => `${x(place).toFixed(1)},${y(value).toFixed(1)}`).join(" "));
  const picture = document.createElementNS(SVG, "svg");
  picture.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  picture.setAttribute("preserveAspectRatio", "none");
  picture.setAttribute("role", "img");
  picture.setAttribute("aria-label", `number ${index}: from ${short(low)} to ${short(high)}`);
  picture.append(line);
  const range = `${short(low)} … ${short(high)}`;
  return element("div", { className: "plot" }, picture, element("span", {}, `${index}`), element("span", {}, range));
}

const short = (value) => Number(value.toPrecision(3)).toString();
