// The sheet: a small picture for each slot.

import { $, el } from "./dom.js";
import { current } from "./takes.js";

const tiles = new Map(); // of each slot

/** Shows these slots; twins stand together. `select(slot)` is called when one is chosen. */
export function show(slots, select) {
  tiles.clear();
  const groups = [];
  for (const slot of slots) {
    const tile = el("button", { type: "button", className: "tile" }, el("img", { alt: "" }), el("span", { className: "tile-name" }));
    tile.addEventListener("click", () => select(slot));
    tiles.set(slot, tile);
    if (slot.twin && tiles.has(slot.twin)) tiles.get(slot.twin).parentElement.append(tile);
    else groups.push(el("div", { className: "group" }, tile));
  }
  $("sheet").replaceChildren(...groups);
  $("sheet").hidden = false;
  slots.forEach(update);
}

export function update(slot) {
  const tile = tiles.get(slot);
  if (!tile) return;
  const take = current(slot);
  const [image, name] = tile.children;
  if (take.image) image.src = take.image;
  image.hidden = !take.image;
  name.textContent = slot.twin ? take.model.name : take.name;
  tile.classList.toggle("growing", !take.codes);
  tile.style.setProperty("--rows", `${(100 * take.rows) / take.total}%`);
  tile.setAttribute("aria-label", `${take.name}, seed ${take.seed}, ${take.model.name}${take.codes ? "" : ", being drawn"}`);
}

export function mark(slot) {
  for (const [other, tile] of tiles) tile.setAttribute("aria-current", String(other === slot));
}
