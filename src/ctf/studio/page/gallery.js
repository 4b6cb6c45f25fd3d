// The gallery: a thumbnail of each item.

import { $, el } from "./dom.js";
import { current, newest, showStep } from "./versions.js";

const thumbnails = new Map(); // by item

/** Shows these items, counterparts in one group; `select(item)` is called by a click. */
export function show(items, select) {
  thumbnails.clear();
  const groups = [];
  for (const item of items) {
    const thumbnail = el("button", { type: "button", className: "thumbnail" }, el("img", { alt: "" }), el("span", { className: "thumbnail-name" }));
    thumbnail.addEventListener("click", () => select(item));
    thumbnails.set(item, thumbnail);
    const other = thumbnails.get(item.counterpart);
    if (other) other.parentElement.append(thumbnail);
    else groups.push(el("div", { className: "group" }, thumbnail));
  }
  $("gallery").replaceChildren(...groups);
  $("gallery").hidden = false;
  items.forEach(update);
}

export function update(item) {
  const thumbnail = thumbnails.get(item);
  if (!thumbnail) return;
  const version = current(item);
  const [image, name] = thumbnail.children;
  const step = newest(version);
  if (step) showStep(image, step);
  image.hidden = !step;
  name.textContent = item.counterpart ? version.model.name : version.className;
  thumbnail.classList.toggle("incomplete", !version.codes);
  thumbnail.style.setProperty("--rows", `${(100 * version.rows) / version.total}%`);
  const state = version.codes ? "" : ", in progress";
  thumbnail.setAttribute("aria-label", `${version.className}, seed ${version.seed}, ${version.model.name}${state}`);
}

export function markSelected(selected) {
  for (const [item, thumbnail] of thumbnails) thumbnail.setAttribute("aria-current", String(item === selected));
}
