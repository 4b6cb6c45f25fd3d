// The cluster of a token: every member as it would look in its place, and how likely it is.

import { $, el, png } from "./dom.js";

const MARGIN = 1; // tokens around the one that is shown
const TILE = 72; // pixels

export function clear() {
  $("cluster").replaceChildren(el("p", { className: "small idle", textContent: "No token is chosen yet." }));
}

export function waiting() {
  $("cluster").replaceChildren(el("p", { className: "small shimmer", textContent: "Looking inside …" }));
}

/** Shows the members; `preview(member or null)` while one is pointed at, `choose(member)` when taken. */
export function show(take, { cluster, position, members }, preview, choose) {
  const { grid } = take.model;
  const [x, y] = [position % grid, Math.floor(position / grid)];
  const most = Math.max(...members.map(({ probability }) => probability), 1e-9);
  const list = el("ul", { className: "members" }, ...members.map((member) => {
    const here = member.code === take.codes[position];
    const canvas = el("canvas", { width: TILE, height: TILE, attributes: { "aria-hidden": "true" } });
    patch(canvas, png(member.image), x, y, grid);
    const bar = el("span", { className: "bar" });
    bar.style.setProperty("--share", `${(100 * member.probability) / most}%`);
    const button = el("button", { type: "button", attributes: { "aria-pressed": String(here), "aria-label": `Code ${member.code}, ${percent(member.probability)}${here ? ", in the picture" : ""}` } },
      canvas, el("span", { className: "chance", textContent: percent(member.probability) }), bar,
      el("span", { className: "code", textContent: member.code }));
    for (const start of ["pointerenter", "focus"]) button.addEventListener(start, () => preview(member));
    for (const end of ["pointerleave", "blur"]) button.addEventListener(end, () => preview(null));
    button.addEventListener("click", () => choose(member));
    return el("li", {}, button);
  }));
  const count = members.length === 1 ? "1 code" : `${members.length} codes`;
  $("cluster").replaceChildren(
    el("h3", { textContent: `Cluster ${cluster} · ${count}` }),
    el("p", { className: "small", textContent: `Row ${y + 1}, column ${x + 1}. How likely each is under the fine model; point at one to see it in the picture, click to keep it.` }),
    list);
}

const percent = (p) => (p >= 0.0995 ? `${(100 * p).toFixed(0)} %` : p >= 0.0001 ? `${(100 * p).toPrecision(2)} %` : "< 0.01 %");

async function patch(canvas, address, x, y, grid) {
  const image = new Image();
  image.src = address;
  await image.decode();
  const cell = image.naturalWidth / grid;
  const side = (2 * MARGIN + 1) * cell;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = document.documentElement.dataset.smooth === "true";
  const left = Math.min(Math.max((x - MARGIN) * cell, 0), image.naturalWidth - side);
  const top = Math.min(Math.max((y - MARGIN) * cell, 0), image.naturalWidth - side);
  context.drawImage(image, left, top, side, side, 0, 0, TILE, TILE);
  const unit = TILE / side;
  context.strokeStyle = getComputedStyle(canvas).color;
  context.lineWidth = 1.5;
  context.strokeRect((x * cell - left) * unit + 0.75, (y * cell - top) * unit + 0.75, cell * unit - 1.5, cell * unit - 1.5);
}
