// The form with the settings. Its state can be read as an object, and stored in a link.

import { $, el } from "./dom.js";

// Name, label, minimum, maximum and step of the settings of each stage.
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
const MANY_CLASSES = 40; // from which on there is a search field

let models = [];
let model = null; // whose classes and default settings the form shows

/** A value that cannot be sent; `field` is the element to correct it in. */
export class InvalidInput extends Error {
  constructor(reason, field) {
    super(reason);
    this.field = field;
  }
}

export function build(available) {
  models = available;
  $("models").hidden = models.length < 2;
  const choices = models.map(({ name }) => [name, name]);
  if (models.length === 2) choices.push(["*", "Both"]);
  $("model-choices").replaceChildren(...choices.map(([value, text], i) =>
    el("label", {}, el("input", { type: "radio", name: "model", value, checked: i === 0 }), el("span", { textContent: text }))));
  for (const [fieldset, fields] of Object.entries(FIELDS)) {
    for (const field of fields) $(fieldset).append(createSetting(...field));
  }
  $("model-choices").addEventListener("change", showModel);
  $("class-search").addEventListener("input", filterClasses);
  showModel();
}

/** Creates a number field, and a slider for it if there is a maximum. */
function createSetting(name, text, min, max, step) {
  const number = el("input", { type: "number", id: name, name, min, step, inputMode: "decimal" });
  const label = el("label", { htmlFor: name, textContent: text });
  if (max === null) {
    return el("div", { className: "setting" }, label, el("span", { className: "unit", textContent: "0 = off" }), number);
  }
  const slider = el("input", { type: "range", min, max, step, attributes: { "aria-label": `${text}, slider` } });
  const updateSlider = () => {
    slider.value = number.value;
    slider.style.setProperty("--at", `${(100 * (slider.value - min)) / (max - min)}%`);
  };
  slider.addEventListener("input", () => { number.value = slider.value; updateSlider(); });
  number.addEventListener("input", updateSlider);
  return el("div", { className: "setting" }, label, slider, number);
}

function setNumber(name, value) {
  $(name).value = value;
  $(name).dispatchEvent(new Event("input"));
}

const modelChoice = () => new FormData($("form")).get("model") ?? models[0].name;

/** The models to sample from: one, or two to compare. */
export function chosenModels() {
  const choice = modelChoice();
  return choice === "*" ? models : models.filter(({ name }) => name === choice);
}

function showModel() {
  const [chosen] = chosenModels();
  if (chosen === model) return;
  const checked = model ? chosenClasses() : [0];
  model = chosen;
  const names = model.class_names;
  $("class-search").hidden = names.length < MANY_CLASSES;
  $("classes").replaceChildren(...names.map((name, i) => el("label", { className: "chip" },
    el("input", { type: "checkbox", name: "class", value: i }), el("span", { textContent: name }))));
  $("upload-class").replaceChildren(...names.map((name, i) => el("option", { value: i, textContent: name })));
  $("count").max = model.images;
  $("fine-settings").hidden = !chosenModels().some(({ has_fine_stage: has }) => has);
  reset();
  checkClasses(checked);
}

function filterClasses() {
  const text = $("class-search").value.trim().toLowerCase();
  for (const chip of $("classes").children) {
    chip.hidden = !chip.firstChild.checked && !chip.textContent.toLowerCase().includes(text);
  }
}

function checkClasses(numbers) {
  for (const box of $("classes").querySelectorAll("input")) box.checked = numbers.includes(Number(box.value));
}

function chosenClasses() {
  return [...$("classes").querySelectorAll("input:checked")].map(({ value }) => Number(value));
}

/** The settings that differ from the model's. */
export function settings() {
  const values = NAMES.map((name) => [name, $(name).valueAsNumber]);
  return Object.fromEntries(values.filter(([name, value]) => Number.isFinite(value) && value !== model.sampling[name]));
}

export function reset() {
  for (const name of NAMES) setNumber(name, model.sampling[name]);
}

/** What to generate, as the API takes it; throws InvalidInput. */
export function generateRequest() {
  const classes = chosenClasses();
  const count = $("count").valueAsNumber;
  const seed = $("seed").valueAsNumber;
  if (!classes.length) throw new InvalidInput("Choose a class first.", $("classes").querySelector("input"));
  if (!Number.isInteger(count) || count < 1) throw new InvalidInput("Images per class: expected 1 or more.", $("count"));
  if (classes.length * count > model.images) {
    throw new InvalidInput(`Got ${classes.length * count} images, expected ${model.images} or fewer.`, $("count"));
  }
  if (!Number.isInteger(seed) || seed < 0) throw new InvalidInput("Seed: expected a whole number.", $("seed"));
  return { classes, count, seed, settings: settings() };
}

/** The form as the fragment of a link. */
export function toLink() {
  const fields = { classes: chosenClasses().join(","), count: $("count").value, seed: $("seed").value, ...settings() };
  if (models.length > 1) fields.model = modelChoice();
  return new URLSearchParams(fields).toString();
}

/** Fills in the form from a link; returns whether the link had settings. */
export function fromLink(fragment) {
  const fields = new URLSearchParams(fragment);
  if (!fields.has("classes")) return false;
  const radio = [...$("model-choices").querySelectorAll("input")].find(({ value }) => value === fields.get("model"));
  if (radio) { radio.checked = true; showModel(); }
  checkClasses(fields.get("classes").split(",").map(Number));
  for (const name of ["count", "seed"]) if (/^\d+$/.test(fields.get(name) ?? "")) $(name).value = fields.get(name);
  for (const name of NAMES) if (fields.has(name) && Number.isFinite(Number(fields.get(name)))) setNumber(name, fields.get(name));
  return true;
}
