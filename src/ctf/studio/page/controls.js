// The form: what to draw, and how. Its state as an object, and as the fragment of a link.

import { $, el } from "./dom.js";

// Name, words, range and step of what can be set in each stage; defaults are the pipeline's.
const FIELDS = {
  "coarse-settings": [
    ["guidance", "Guidance", 0, 6, 0.1],
    ["temperature", "Temperature", 0.1, 2, 0.05],
    ["top_k", "Top-k", 0, null, 1],
  ],
  "fine-settings": [
    ["fine_guidance", "Guidance", 0, 6, 0.1],
    ["fine_temperature", "Temperature", 0.1, 2, 0.05],
    ["fine_top_k", "Top-k", 0, null, 1],
  ],
};
const NAMES = Object.values(FIELDS).flat().map(([name]) => name);
const MANY_CLASSES = 40;

let models = [];
export let model = null; // whose classes and defaults the form shows

export function build(known) {
  models = known;
  $("models").hidden = models.length < 2;
  const choices = models.map(({ name }) => [name, name]);
  if (models.length === 2) choices.push(["*", "Both"]);
  $("model-choices").replaceChildren(...choices.map(([value, text], i) =>
    el("label", {}, el("input", { type: "radio", name: "model", value, checked: i === 0 }), el("span", { textContent: text }))));
  for (const [place, fields] of Object.entries(FIELDS)) {
    for (const field of fields) $(place).append(row(...field));
  }
  $("model-choices").addEventListener("change", showModel);
  $("class-search").addEventListener("input", filterClasses);
  showModel();
}

/** A slider with its number, or a number where there is no upper end. */
function row(name, text, min, max, step) {
  const number = el("input", { type: "number", id: name, name, min, step, inputMode: "decimal" });
  const label = el("label", { htmlFor: name, textContent: text });
  if (max === null) {
    const none = el("span", { className: "unit", textContent: "0 is all" });
    return el("div", { className: "setting wide" }, label, none, number);
  }
  const slider = el("input", { type: "range", min, max, step, attributes: { "aria-label": `${text}, slider` } });
  const follow = () => {
    slider.value = number.value;
    slider.style.setProperty("--at", `${(100 * (slider.value - min)) / (max - min)}%`);
  };
  slider.addEventListener("input", () => { number.value = slider.value; follow(); });
  number.addEventListener("input", follow);
  return el("div", { className: "setting" }, label, slider, number);
}

function setNumber(name, value) {
  $(name).value = value;
  $(name).dispatchEvent(new Event("input"));
}

/** The models that are to draw: one, or both. */
export function chosenModels() {
  const value = new FormData($("controls")).get("model") ?? models[0].name;
  return value === "*" ? models : models.filter(({ name }) => name === value);
}

function showModel() {
  const [shown] = chosenModels();
  if (shown === model) return;
  const before = model && chosenClasses();
  model = shown;
  const names = model.class_names;
  $("class-search").hidden = names.length < MANY_CLASSES;
  $("classes").replaceChildren(...names.map((name, i) => el("label", { className: "chip" },
    el("input", { type: "checkbox", name: "class", value: i }), el("span", { textContent: name }))));
  $("upload-class").replaceChildren(...names.map((name, i) => el("option", { value: i, textContent: name })));
  $("count").max = model.images;
  $("fine-settings").hidden = !chosenModels().some(({ has_fine_stage: has }) => has);
  for (const name of NAMES) setNumber(name, model.sampling[name]);
  check(before ?? [0]);
}

function filterClasses() {
  const wanted = $("class-search").value.trim().toLowerCase();
  for (const chip of $("classes").children) {
    const { checked } = chip.firstChild;
    chip.hidden = !checked && !chip.textContent.toLowerCase().includes(wanted);
  }
}

function check(numbers) {
  for (const box of $("classes").querySelectorAll("input")) box.checked = numbers.includes(Number(box.value));
}

export function chosenClasses() {
  return [...$("classes").querySelectorAll("input:checked")].map(({ value }) => Number(value));
}

/** Settings that differ from the pipeline's own. */
export function settings() {
  const given = NAMES.map((name) => [name, $(name).valueAsNumber]);
  return Object.fromEntries(given.filter(([name, value]) => Number.isFinite(value) && value !== model.sampling[name]));
}

export function reset() {
  for (const name of NAMES) setNumber(name, model.sampling[name]);
}

/** What the form asks for; raises a TypeError in words where that cannot be. */
export function asked() {
  const classes = chosenClasses();
  const count = $("count").valueAsNumber;
  const seed = $("seed").valueAsNumber;
  if (!classes.length) throw new TypeError("Choose a class first.");
  if (!Number.isInteger(count) || count < 1) throw new TypeError("Of each: expected 1 or more.");
  if (classes.length * count > model.images) {
    throw new TypeError(`${classes.length * count} pictures; expected ${model.images} or fewer.`);
  }
  if (!Number.isInteger(seed) || seed < 0) throw new TypeError("Seed: expected a whole number.");
  return { classes, count, seed, settings: settings() };
}

export function toLink() {
  const fields = { classes: chosenClasses().join(","), count: $("count").value, seed: $("seed").value, ...settings() };
  if (models.length > 1) fields.model = new FormData($("controls")).get("model");
  return new URLSearchParams(fields).toString();
}

/** Fills the form from a link; says whether the link asked for anything. */
export function fromLink(fragment) {
  const fields = new URLSearchParams(fragment);
  if (!fields.has("classes")) return false;
  const radio = [...$("model-choices").querySelectorAll("input")].find(({ value }) => value === fields.get("model"));
  if (radio) { radio.checked = true; showModel(); }
  check(fields.get("classes").split(",").map(Number));
  for (const name of ["count", "seed"]) if (/^\d+$/.test(fields.get(name) ?? "")) $(name).value = fields.get(name);
  for (const name of NAMES) if (fields.has(name) && Number.isFinite(Number(fields.get(name)))) setNumber(name, fields.get(name));
  return true;
}
