// The viewer: one image, enlarged, with its tokens, its generation step by step, and its versions.

import { $, el } from "./dom.js";
import { comparedWith, current, newest, showStep } from "./versions.js";

let item = null;
let step = 0;
let followsLast = true; // whether the last step is shown when there is a new one
const mask = new Set(); // positions of the tokens to inpaint
let focused = 0; // the token that has or had the keyboard's focus
let onToken = null;

/**
 * Connects the controls. `handleToken(position, mode)` is called by clicks in the modes "inspect"
 * and "resample", `handleMode()` when the mode changes.
 */
export function connect(handleToken, handleMode) {
  onToken = handleToken;
  $("step").addEventListener("input", () => goToStep($("step").valueAsNumber));
  $("modes").addEventListener("change", () => { clearMask(); markSelected(-1); showMode(); handleMode(); });
  $("clear-mask").addEventListener("click", clearMask);
  showMode();
}

const mode = () => document.querySelector("input[name=mode]:checked").value;
export const shownItem = () => item;
export const maskedTokens = () => [...mask];

export function show(shown) {
  item = shown;
  followsLast = true;
  mask.clear();
  $("viewer").hidden = false;
  update();
}

/** Shows the current state of the item. */
export function update() {
  const version = current(item);
  const other = comparedWith(item);
  const last = version.steps.length - 1;
  if (followsLast || step > last) step = Math.max(last, 0);
  $("title").textContent = version.className;
  const facts = [version.note, `seed ${version.seed}`];
  if (version.passes) facts.push(`${version.passes} passes for ${version.coarse.length} labels`);
  if (item.counterpart) facts.unshift(version.model.name);
  $("subtitle").textContent = facts.join(" · ");
  const figures = [createFigure(version, true)];
  if (other && !version.parent && item.isFirst) figures.push(createFigure(other, false));
  else if (other) figures.unshift(createFigure(other, false));
  $("figures").classList.toggle("two", figures.length === 2);
  $("figures").replaceChildren(...figures);
  showFilmstrip(version);
  showVersions();
  showCodes(version);
  for (const id of ["resample-fine", "save-png", "save-settings"]) $(id).disabled = !version.codes;
  if (!version.model.has_fine_stage) $("resample-fine").disabled = true;
  markMask();
}

function createFigure(version, isCurrent) {
  const side = version.model.image_size;
  const image = el("img", { className: "large-image", alt: "", width: side, height: side });
  const frame = el("div", { className: "frame" }, image);
  const step = newest(version);
  frame.classList.toggle("empty-frame", !step);
  if (isCurrent) {
    image.id = "image";
    if (version.codes) frame.append(createTokens(version));
  } else if (step) {
    showInFrame(image, step, version);
    image.alt = `${version.className}: ${version.note}`;
  }
  const isEdited = Boolean(current(item).parent);
  const caption = isEdited ? version.note : item.counterpart ? version.model.name : "";
  return el("figure", {}, frame, el("figcaption", { textContent: caption }));
}

/** Shows a step in the image of a frame, with a line below the last row that is sampled. */
function showInFrame(image, step, { total }) {
  showStep(image, step);
  image.parentElement.classList.toggle("incomplete", Boolean(step.mask));
  image.parentElement.style.setProperty("--rows", `${(100 * (step.rows ?? total)) / total}%`);
}

// --- Tokens --------------------------------------------------------------------------------------

/** Creates a grid of a button per token. Arrow keys move; dragging in the mode "inpaint" masks. */
function createTokens(version) {
  const { grid } = version.model;
  focused = Math.min(focused, grid * grid - 1);
  const rows = Array.from({ length: grid }, (_, y) => el("div", { className: "tokens-row", attributes: { role: "row" } },
    ...Array.from({ length: grid }, (_, x) => {
      const position = y * grid + x;
      const label = `Row ${y + 1}, column ${x + 1}: label ${version.coarse[position]}, code ${version.codes[position]}`;
      return el("button", {
        type: "button", tabIndex: position === focused ? 0 : -1,
        attributes: { role: "gridcell", "data-token": position, "aria-label": label },
      });
    })));
  const tokens = el("div", { className: "tokens", id: "tokens", attributes: { role: "grid", "aria-label": "Tokens" } }, ...rows);
  connectClicks(tokens);
  connectDragging(tokens);
  tokens.addEventListener("keydown", (event) => {
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
    if (!dx && !dy) return;
    event.preventDefault();
    const x = Math.min(Math.max((focused % grid) + dx, 0), grid - 1);
    const y = Math.min(Math.max(Math.floor(focused / grid) + dy, 0), grid - 1);
    focusToken(y * grid + x);
  });
  return tokens;
}

function connectClicks(tokens) {
  tokens.addEventListener("click", (event) => {
    const cell = event.target.closest("[data-token]");
    if (!cell) return;
    focusToken(Number(cell.dataset.token));
    if (mode() !== "inpaint") onToken(focused, mode());
    else if (event.detail === 0) setMasked(focused, !mask.has(focused)); // by the keyboard
  });
  tokens.addEventListener("focusin", (event) => { if (mode() === "resample") markTail(Number(event.target.dataset.token)); });
}

function connectDragging(tokens) {
  const tokenAt = (event) => {
    const cell = document.elementFromPoint(event.clientX, event.clientY)?.closest("[data-token]");
    return cell && tokens.contains(cell) ? Number(cell.dataset.token) : null;
  };
  let adds = null; // whether the drag adds to the mask or removes from it
  tokens.addEventListener("pointerdown", (event) => {
    const position = tokenAt(event);
    if (mode() !== "inpaint" || position === null) return;
    event.preventDefault();
    adds = !mask.has(position);
    setMasked(position, adds);
    tokens.setPointerCapture(event.pointerId);
  });
  tokens.addEventListener("pointermove", (event) => {
    const position = tokenAt(event);
    if (adds !== null && position !== null) setMasked(position, adds);
    else if (mode() === "resample" && position !== null) markTail(position);
  });
  tokens.addEventListener("pointerleave", () => markTail(null));
  for (const end of ["pointerup", "pointercancel"]) tokens.addEventListener(end, () => { adds = null; });
}

const cells = () => [...document.querySelectorAll("#tokens [data-token]")];

function focusToken(position) {
  cells().forEach((cell, i) => { cell.tabIndex = i === position ? 0 : -1; });
  focused = position;
  cells()[position].focus();
}

/** Marks the token whose cluster is shown. */
export function markSelected(position) {
  cells().forEach((cell, i) => cell.classList.toggle("selected", i === position));
}

/** Marks the tokens that would be resampled from a position on. */
function markTail(position) {
  cells().forEach((cell, i) => cell.classList.toggle("tail", position !== null && i >= position));
}

function setMasked(position, isMasked) {
  if (isMasked) mask.add(position); else mask.delete(position);
  markMask();
}

function clearMask() {
  mask.clear();
  markMask();
}

function markMask() {
  cells().forEach((cell, i) => {
    cell.classList.toggle("masked", mask.has(i));
    cell.setAttribute("aria-selected", String(mask.has(i)));
  });
  $("resample-mask").disabled = $("clear-mask").disabled = !mask.size;
  displayCurrent();
}

function showMode() {
  $("hint").textContent = {
    inspect: "Click a token to see the codes of its cluster.",
    resample: "Click a token to resample it and all tokens after it.",
    inpaint: "Drag over tokens, or press Space on them, to mask them; then resample the mask.",
  }[mode()];
  $("mask-tools").hidden = mode() !== "inpaint";
  $("viewer").dataset.mode = mode();
}

// --- Steps ---------------------------------------------------------------------------------------

function showFilmstrip(version) {
  $("filmstrip").style.setProperty("--frames", Math.max(version.steps.length, version.total + 1));
  $("filmstrip").replaceChildren(...version.steps.map((one, i) => {
    const image = el("img", { alt: "" });
    showStep(image, one);
    const frame = el("button", { type: "button", tabIndex: -1, title: one.text, attributes: { "aria-label": one.text } }, image);
    frame.addEventListener("click", () => goToStep(i));
    return frame;
  }));
  $("step").max = Math.max(version.steps.length - 1, 0);
  $("step").disabled = version.steps.length < 2;
}

function goToStep(position) {
  step = position;
  followsLast = step === current(item).steps.length - 1;
  displayCurrent();
}

/** Shows the current step in the large frame. */
export function displayCurrent() {
  const { steps, className } = item ? current(item) : { steps: [] };
  if (!steps.length) { $("step-text").textContent = "Waiting for the first row"; return; }
  const { text } = steps[step];
  $("step").value = step;
  $("step").style.setProperty("--at", `${(100 * step) / Math.max(steps.length - 1, 1)}%`);
  $("step").setAttribute("aria-valuetext", text);
  $("step-text").textContent = text;
  display(steps[step], `${className}: ${text}`);
  [...$("filmstrip").children].forEach((frame, i) => frame.classList.toggle("shown", i === step));
}

/** Shows a step, or another image, in the large frame. */
export function display(shown, alt) {
  showInFrame($("image"), shown, current(item));
  $("image").alt = alt;
}

// --- Versions and codes --------------------------------------------------------------------------

function showVersions() {
  $("versions").replaceChildren(...item.versions.map((version, i) => {
    const tile = el("i", { className: "tile" });
    if (newest(version)) {
      tile.append(el("img", { alt: "" }));
      showStep(tile.firstChild, newest(version));
    }
    const button = el("button", { type: "button", className: "version", attributes: { "aria-pressed": String(i === item.shown) } },
      tile, el("span", { textContent: version.note }));
    button.addEventListener("click", () => {
      item.shown = i;
      item.onChange?.();
      show(item);
    });
    return button;
  }));
}

function showCodes({ model: { grid }, coarse, codes }) {
  const createTable = (caption, numbers) => el("table", {}, el("caption", { textContent: caption }), el("tbody", {},
    ...Array.from({ length: grid }, (_, y) => el("tr", {}, ...numbers.slice(y * grid, (y + 1) * grid).map((n) => el("td", { textContent: n }))))));
  $("codes").replaceChildren(...(codes ? [createTable("Coarse labels", coarse), createTable("Codes", codes)] : []));
}
