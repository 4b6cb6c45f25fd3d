// The stage: one picture, large, with its tokens to touch, its steps, and what it was made of.

import { $, el } from "./dom.js";
import { beside, current } from "./takes.js";

let shown = null; // the slot
let step = 0;
let following = true; // the newest step, while the picture grows
let painted = new Set();
let token = 0; // that the keyboard is at
let act = () => {};

/**
 * `onToken(position, mode)` is called for a token that is clicked to look inside or to redraw from,
 * `onMode()` when another one is chosen.
 */
export function connect(onToken, onMode) {
  act = onToken;
  $("step").addEventListener("input", () => goTo($("step").valueAsNumber));
  $("modes").addEventListener("change", () => { painted.clear(); look(-1); showMode(); mark(); onMode(); });
  $("clear").addEventListener("click", () => { painted.clear(); mark(); });
  showMode();
}

export const mode = () => document.querySelector("input[name=mode]:checked").value;
export const slotShown = () => shown;
export const paintedTokens = () => [...painted];

export function show(slot) {
  shown = slot;
  following = true;
  painted.clear();
  $("stage").hidden = false;
  update();
}

/** Draws the stage anew, of what the slot is now. */
export function update() {
  const take = current(shown);
  const other = beside(shown);
  const last = take.steps.length - 1;
  if (following || step > last) step = Math.max(last, 0);
  $("title").textContent = take.name;
  const facts = [take.note, `seed ${take.seed}`];
  if (shown.twin) facts.unshift(take.model.name);
  $("subtitle").textContent = facts.join(" · ");
  $("frames").classList.toggle("two", Boolean(other));
  const figures = [figure(take, true)];
  if (other && !take.from && shown.leads) figures.push(figure(other, false));
  else if (other) figures.unshift(figure(other, false));
  $("frames").replaceChildren(...figures);
  film(take);
  takes();
  codes(take);
  for (const id of ["details", "save-png", "save-settings"]) $(id).disabled = !take.codes;
  if (!take.model.has_fine_stage) $("details").disabled = true;
  mark();
}

function figure(take, live) {
  const image = el("img", { className: "picture", alt: "", width: take.model.image_size, height: take.model.image_size });
  const box = el("div", { className: "frame" }, image);
  box.classList.toggle("empty-frame", !take.image);
  if (live) {
    image.id = "picture";
    if (take.codes) box.append(overlay(take));
    box.classList.toggle("growing", !take.codes);
    box.style.setProperty("--rows", `${(100 * take.rows) / take.total}%`);
  } else if (take.image) {
    image.src = take.image;
    image.alt = `${take.name}: ${take.note}`;
  }
  const compared = shown.twin && !current(shown).from;
  const alone = !shown.twin && !current(shown).from;
  const caption = compared ? take.model.name : alone ? "" : take.note;
  return el("figure", { className: live ? "live" : "" }, box, el("figcaption", { textContent: caption }));
}

/** A button for each token, in rows: arrows move, Enter acts, dragging paints. */
function overlay(take) {
  const { grid } = take.model;
  token = Math.min(token, grid * grid - 1);
  const rows = [];
  for (let y = 0; y < grid; y++) {
    const cells = [];
    for (let x = 0; x < grid; x++) {
      const position = y * grid + x;
      cells.push(el("button", {
        type: "button", tabIndex: position === token ? 0 : -1,
        attributes: {
          role: "gridcell", "data-token": position,
          "aria-label": `Row ${y + 1}, column ${x + 1}: label ${take.coarse[position]}, code ${take.codes[position]}`,
        },
      }));
    }
    rows.push(el("div", { className: "tokens-row", attributes: { role: "row" } }, ...cells));
  }
  const tokens = el("div", { className: "tokens", id: "tokens", attributes: { role: "grid", "aria-label": "Tokens" } }, ...rows);
  const at = (event) => {
    const under = document.elementFromPoint(event.clientX, event.clientY)?.closest("[data-token]");
    return under && tokens.contains(under) ? Number(under.dataset.token) : null;
  };
  let adds = null; // whether a drag paints or wipes
  tokens.addEventListener("pointerdown", (event) => {
    const position = at(event);
    if (mode() !== "paint" || position === null) return;
    event.preventDefault();
    adds = !painted.has(position);
    paint(position, adds);
    tokens.setPointerCapture(event.pointerId);
  });
  tokens.addEventListener("pointermove", (event) => {
    const position = at(event);
    if (adds !== null && position !== null) paint(position, adds);
    else if (mode() === "from" && position !== null) tail(position);
  });
  tokens.addEventListener("pointerleave", () => tail(null));
  for (const end of ["pointerup", "pointercancel"]) tokens.addEventListener(end, () => { adds = null; });
  tokens.addEventListener("click", (event) => {
    const cell = event.target.closest("[data-token]");
    if (!cell) return;
    focus(Number(cell.dataset.token));
    if (mode() !== "paint") act(token, mode());
    else if (event.detail === 0) paint(token, !painted.has(token)); // by the keyboard
  });
  tokens.addEventListener("focusin", (event) => { if (mode() === "from") tail(Number(event.target.dataset.token)); });
  tokens.addEventListener("keydown", (event) => {
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
    if (!dx && !dy) return;
    event.preventDefault();
    const x = Math.min(Math.max((token % grid) + dx, 0), grid - 1);
    const y = Math.min(Math.max(Math.floor(token / grid) + dy, 0), grid - 1);
    focus(y * grid + x);
  });
  return tokens;
}

const cells = () => [...document.querySelectorAll("#tokens [data-token]")];

function focus(position) {
  for (const cell of cells()) cell.tabIndex = Number(cell.dataset.token) === position ? 0 : -1;
  token = position;
  cells()[position].focus();
}

function paint(position, add) {
  if (add) painted.add(position); else painted.delete(position);
  mark();
}

/** Shows what "redraw from" here would draw. */
function tail(position) {
  cells().forEach((cell, i) => cell.classList.toggle("doomed", position !== null && i >= position));
}

/** The token whose cluster is shown. */
export function look(position) {
  cells().forEach((cell, i) => cell.classList.toggle("looked", i === position));
}

function mark() {
  cells().forEach((cell, i) => {
    cell.classList.toggle("painted", painted.has(i));
    cell.setAttribute("aria-selected", String(painted.has(i)));
  });
  $("redraw").disabled = $("clear").disabled = !painted.size;
  goTo(step, false);
}

function showMode() {
  $("hint").textContent = {
    look: "Touch a token: its cluster, and what else it could be.",
    from: "Touch a token: all before it stays, it and the rest are drawn again.",
    paint: "Drag over tokens, or press Space on them, then draw them again.",
  }[mode()];
  $("paint-tools").hidden = mode() !== "paint";
  $("stage").dataset.mode = mode();
}

// --- steps ---------------------------------------------------------------------------------------

function film(take) {
  $("film").style.setProperty("--frames", Math.max(take.steps.length, take.total + 1));
  $("film").replaceChildren(...take.steps.map(({ text, image }, i) => {
    const frame = el("button", { type: "button", tabIndex: -1, title: text, attributes: { "aria-label": text } }, el("img", { src: image, alt: "" }));
    frame.addEventListener("click", () => goTo(i));
    return frame;
  }));
  $("step").max = Math.max(take.steps.length - 1, 0);
  $("step").disabled = take.steps.length < 2;
}

function goTo(wanted, byHand = true) {
  const { steps, name, image } = current(shown ?? { takes: [{ steps: [] }], shown: 0 });
  if (!steps.length) { $("step-text").textContent = "Waiting for the first row"; return; }
  step = Math.min(wanted, steps.length - 1);
  if (byHand) following = step === steps.length - 1;
  $("step").value = step;
  $("step").style.setProperty("--at", `${(100 * step) / Math.max(steps.length - 1, 1)}%`);
  $("step").setAttribute("aria-valuetext", steps[step].text);
  $("step-text").textContent = steps[step].text;
  if (image) display(steps[step].image, `${name}: ${steps[step].text}`);
  [...$("film").children].forEach((frame, i) => frame.classList.toggle("on", i === step));
}

/** Another picture in the large frame, for a while. */
export function display(image, text) {
  $("picture").src = image;
  $("picture").alt = text;
}

export function displayCurrent() {
  goTo(step, false);
}

// --- takes and codes -----------------------------------------------------------------------------

function takes() {
  $("takes").replaceChildren(...shown.takes.map((take, i) => {
    const button = el("button", { type: "button", className: "take", attributes: { "aria-pressed": String(i === shown.shown) } },
      take.image ? el("img", { src: take.image, alt: "" }) : el("i", { className: "blank" }), el("span", { textContent: take.note }));
    button.addEventListener("click", () => {
      shown.shown = i;
      shown.changed?.();
      show(shown);
    });
    return button;
  }));
}

function codes({ model, coarse, codes: drawn }) {
  const { grid } = model;
  if (!drawn) { $("codes").replaceChildren(); return; }
  const table = (caption, numbers) => el("table", {}, el("caption", { textContent: caption }), el("tbody", {},
    ...Array.from({ length: grid }, (_, y) => el("tr", {}, ...numbers.slice(y * grid, (y + 1) * grid).map((n) => el("td", { textContent: n }))))));
  $("codes").replaceChildren(table("Coarse labels", coarse), table("Codes", drawn));
}
