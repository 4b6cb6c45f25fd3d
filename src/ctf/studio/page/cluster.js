// The cluster of a token: each member in its place in the image, and its probability.

import { $, el, pngUrl } from "./dom.js";

const MARGIN = 1; // tokens around the selected one
const SIDE = 72; // pixels

const message = (className, textContent) => $("cluster").replaceChildren(el("p", { className: `small ${className}`, textContent }));

export const clear = () => message("idle", "No token selected");

export const showLoading = () => message("loading", "Loading cluster …");

/** Shows the members; calls `preview(member or null)` on hover or focus, `choose(member)` on a click. */
export function show(version, { cluster, position, members }, preview, choose) {
  const { grid } = version.model;
  const [x, y] = [position % grid, Math.floor(position / grid)];
  const max = Math.max(...members.map(({ probability }) => probability), 1e-9);
  const list = el("ul", { className: "members" }, ...members.map((member) => {
    const isCurrent = member.code === version.codes[position];
    const canvas = el("canvas", { width: SIDE, height: SIDE, attributes: { "aria-hidden": "true" } });
    drawCrop(canvas, pngUrl(member.image), x, y, grid);
    const bar = el("span", { className: "bar" });
    bar.style.setProperty("--share", `${(100 * member.probability) / max}%`);
    const label = `Code ${member.code}, ${percent(member.probability)}${isCurrent ? ", in the image" : ""}`;
    const button = el("button", { type: "button", attributes: { "aria-pressed": String(isCurrent), "aria-label": label } },
      canvas, el("span", { className: "probability", textContent: percent(member.probability) }), bar,
      el("span", { className: "code", textContent: member.code }));
    for (const start of ["pointerenter", "focus"]) button.addEventListener(start, () => preview(member));
    for (const end of ["pointerleave", "blur"]) button.addEventListener(end, () => preview(null));
    button.addEventListener("click", () => choose(member));
    return el("li", {}, button);
  }));
  const count = members.length === 1 ? "1 code" : `${members.length} codes`;
  $("cluster").replaceChildren(
    el("h3", { textContent: `Cluster ${cluster} · ${count}` }),
    el("p", { className: "small", textContent: `Row ${y + 1}, column ${x + 1}. Probabilities are those of the fine model. Hover over a code to preview it in the image, click to use it.` }),
    list);
}

const percent = (p) => (p >= 0.0995 ? `${(100 * p).toFixed(0)} %` : p >= 0.0001 ? `${(100 * p).toPrecision(2)} %` : "< 0.01 %");

/** Draws the token at (x, y), with its surroundings and a frame around it. */
async function drawCrop(canvas, url, x, y, grid) {
  const image = new Image();
  image.src = url;
  await image.decode();
  const token = image.naturalWidth / grid; // pixels
  const side = (2 * MARGIN + 1) * token;
  const left = Math.min(Math.max((x - MARGIN) * token, 0), image.naturalWidth - side);
  const top = Math.min(Math.max((y - MARGIN) * token, 0), image.naturalWidth - side);
  const scale = SIDE / side;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = document.documentElement.dataset.smooth === "true";
  context.drawImage(image, left, top, side, side, 0, 0, SIDE, SIDE);
  context.strokeStyle = getComputedStyle(canvas).color;
  context.lineWidth = 1.5;
  context.strokeRect((x * token - left) * scale + 0.75, (y * token - top) * scale + 0.75, token * scale - 1.5, token * scale - 1.5);
}
