// The page: what its buttons do.

import * as api from "./api.js";
import * as cluster from "./cluster.js";
import { $, decodeBase64, download, pngUrl, randomSeed } from "./dom.js";
import * as form from "./form.js";
import * as gallery from "./gallery.js";
import { addPreview, addVersion, complete, createItem, createVersion, current, settingsWithCodes } from "./versions.js";
import * as view from "./view.js";
import * as viewer from "./viewer.js";

let items = [];
let running = null; // the AbortController of the current requests
let retry = null; // what the button of the error does
let maxBytes = Infinity; // of an image file

// --- Status and errors -----------------------------------------------------------------------------

function setStatus(text, busy = false) {
  $("status").textContent = text;
  $("status").classList.toggle("busy", busy);
}

function showError(error, button = "Try again") {
  const later = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  $("error-text").textContent = `${error.message}${later}`;
  $("error-button").textContent = button;
  $("error").hidden = false;
  setStatus("");
}

const hideError = () => { $("error").hidden = true; };

/** Does some work, which returns the status to show at its end. Other work, or Stop, aborts it. */
async function run(text, work) {
  running?.abort();
  const mine = (running = new AbortController());
  retry = () => run(text, work);
  hideError();
  setStatus(text, true);
  $("stop").hidden = false;
  $("start-page").hidden = true;
  try {
    const status = await work(mine.signal);
    if (running === mine) setStatus(status ?? "Done");
  } catch (error) {
    if (error.name === "AbortError") { if (running === mine) setStatus("Stopped"); }
    else if (error instanceof api.ApiError) showError(error);
    else throw error;
    removeIncomplete();
  } finally {
    if (running === mine) {
      running = null;
      $("stop").hidden = true;
    }
  }
}

/** Removes the versions that were not completed, and items without any. */
function removeIncomplete() {
  for (const item of items) {
    item.versions = item.versions.filter(({ codes }) => codes);
    item.shown = Math.max(Math.min(item.shown, item.versions.length - 1), 0);
  }
  items = items.filter(({ versions }) => versions.length);
  for (const item of items) if (!items.includes(item.counterpart)) item.counterpart = null;
  gallery.show(items, select);
  if (items.includes(viewer.shownItem())) select(viewer.shownItem());
  else if (items.length) select(items[0]);
  else { $("gallery").hidden = $("viewer").hidden = true; $("start-page").hidden = !$("error").hidden; }
}

function select(item) {
  item.onChange = () => gallery.update(item);
  cluster.clear();
  viewer.show(item);
  gallery.markSelected(item);
}

function refresh(changed) {
  changed.forEach(gallery.update);
  if (changed.includes(viewer.shownItem())) viewer.update();
}

// --- Generating images -----------------------------------------------------------------------------

/** Returns the handler of the events of a request for some versions. */
const eventHandler = (versions, changed) => (name, data) => {
  if (name === "queued") setStatus(data.ahead ? `Requests ahead in the queue: ${data.ahead}` : "Sampling", true);
  if (name !== "row") return;
  setStatus(`Coarse labels, row ${data.rows} of ${data.total}`, true);
  versions.forEach((version, i) => addPreview(version, data, data.images[i], data.labels[i]));
  refresh(changed);
};

/** Creates an item per image and model; items of the same seed are counterparts. */
function createItems(models, { classes, count, seed }) {
  const numbers = classes.flatMap((number) => Array(count).fill(number));
  const byModel = models.map((model) => numbers.map((number, i) => createItem(createVersion(model, number, seed + i, "sample"))));
  if (byModel.length === 2) {
    byModel[0].forEach((item, i) => {
      const other = byModel[1][i];
      Object.assign(item, { counterpart: other });
      Object.assign(other, { counterpart: item, isFirst: false });
    });
  }
  return byModel;
}

function generate() {
  let request;
  try {
    request = form.generateRequest();
  } catch (error) {
    if (!(error instanceof form.InvalidInput)) throw error;
    retry = () => { hideError(); error.field.focus(); };
    showError(error, "Edit");
    return;
  }
  history.replaceState(null, "", `#${form.toLink()}`);
  const models = form.chosenModels();
  run("Sending request", async (signal) => {
    const byModel = createItems(models, request);
    items = byModel[0].flatMap((item) => (item.counterpart ? [item, item.counterpart] : [item]));
    gallery.show(items, select);
    select(items[0]);
    if (matchMedia("(max-width: 820px)").matches) $("results").scrollIntoView({ behavior: "smooth" });
    await Promise.all(models.map(async (model, m) => {
      const versions = byModel[m].map(current);
      const body = { model: model.name, ...request };
      const { pictures } = await api.post("v1/generate", body, signal, eventHandler(versions, byModel[m]));
      versions.forEach((version, i) => complete(version, pictures[i]));
      refresh(byModel[m]);
    }));
  });
}

// --- Editing images --------------------------------------------------------------------------------

/** Adds a version of the shown image; `request(version, parent, signal, item)` returns its response. */
function edit(note, text, request) {
  const item = viewer.shownItem();
  const parent = current(item);
  if (!parent.codes) return;
  const version = createVersion(parent.model, parent.classNumber, randomSeed(), note, parent);
  run(text, async (signal) => {
    addVersion(item, version);
    select(item);
    const { pictures: [picture] } = await request(version, parent, signal, item);
    complete(version, picture);
    refresh([item]);
  });
}

function refine(version, { model, classNumber, coarse, steps }, signal) {
  version.steps = steps.slice(0, -1); // the coarse labels are the same
  const body = { model: model.name, classes: [classNumber], coarse: [coarse], seed: version.seed, settings: form.settings() };
  return api.post("v1/refine", body, signal);
}

const resampleFineStage = () => edit("fine stage resampled", "Sampling the fine stage", refine);

/** Resamples the tokens that are not in `keep`, a list of booleans. */
function resample(keep, note) {
  edit(note, "Resampling", (version, { model, classNumber, codes }, signal, item) => {
    version.keep = keep;
    const body = {
      model: model.name, classes: [classNumber], seed: version.seed, settings: form.settings(), codes: [codes], keep: [keep],
    };
    return api.post("v1/generate", body, signal, eventHandler([version], [item]));
  });
}

function resampleFrom(position) {
  const { codes, model: { grid } } = current(viewer.shownItem());
  const note = `resampled from row ${Math.floor(position / grid) + 1}, column ${(position % grid) + 1}`;
  resample(codes.map((_, i) => i < position), note);
}

function resampleMask() {
  const mask = viewer.maskedTokens();
  const { codes } = current(viewer.shownItem());
  resample(codes.map((_, i) => !mask.includes(i)), mask.length === 1 ? "1 token inpainted" : `${mask.length} tokens inpainted`);
}

function inspect(position) {
  const version = current(viewer.shownItem());
  viewer.markSelected(position);
  cluster.showLoading();
  run("Loading cluster", async (signal) => {
    const body = { model: version.model.name, class: version.classNumber, codes: version.codes, position, settings: form.settings() };
    const found = await api.post("v1/members", body, signal);
    const preview = (member) => {
      if (member) viewer.display({ image: pngUrl(member.image) }, `${version.className} with code ${member.code}`);
      else viewer.displayCurrent();
    };
    cluster.show(version, found, preview, (member) => replaceCode(version, position, member));
    return `Cluster ${found.cluster}: ${found.members.length} codes`;
  });
}

/** Adds a version with another member of a cluster, whose image is known already. */
function replaceCode(parent, position, { code, image }) {
  if (code === parent.codes[position]) return;
  const item = viewer.shownItem();
  const codes = parent.codes.with(position, code);
  const { coarse, seed } = parent;
  const version = createVersion(parent.model, parent.classNumber, seed, `code ${code} used`, parent);
  version.steps = parent.steps.slice(0, -1);
  complete(version, { image, codes, coarse, seed, settings: settingsWithCodes(parent.settings, codes) });
  addVersion(item, version);
  select(item);
  gallery.update(item);
}

/** Encodes an image file, and resamples its fine stage. */
function upload(file) {
  if (!file) return;
  if (file.size > maxBytes) { // the connection would be closed before there is a response
    retry = () => { hideError(); $("file").focus(); };
    showError(new Error(`${file.name}: got ${file.size} bytes, expected ${maxBytes} or fewer.`), "Close");
    return;
  }
  const [model] = form.chosenModels();
  const classNumber = Number($("upload-class").value);
  run("Encoding the image", async (signal) => {
    const { original, coarse, picture } = await api.encode(file, model.name, classNumber, signal);
    const version = createVersion(model, classNumber, 0, "reconstruction");
    version.steps = [{ text: "Uploaded image, cropped", image: pngUrl(original) }, { text: "All coarse labels", image: pngUrl(coarse) }];
    complete(version, picture, "Reconstruction from the codes");
    const item = createItem(version);
    items = [item, ...items];
    gallery.show(items, select);
    select(item);
    if (!model.has_fine_stage) return;
    const refined = createVersion(model, classNumber, randomSeed(), "fine stage resampled", version);
    const { pictures } = await refine(refined, version, signal);
    complete(refined, pictures[0]);
    addVersion(item, refined);
    select(item);
    gallery.update(item);
  });
}

// --- Downloads and links ---------------------------------------------------------------------------

const fileName = ({ className, seed }, suffix) => `${className}-${seed}.${suffix}`;

function savePng() {
  const version = current(viewer.shownItem());
  download(fileName(version, "png"), decodeBase64(version.base64), "image/png");
}

function saveSettings() {
  const version = current(viewer.shownItem());
  download(fileName(version, "json"), `${JSON.stringify(version.settings, null, 2)}\n`, "application/json");
}

async function copyLink() {
  const link = `${location.origin}${location.pathname}#${form.toLink()}`;
  history.replaceState(null, "", link);
  try {
    await navigator.clipboard.writeText(link);
    setStatus("Link copied");
  } catch {
    setStatus("The link is in the address bar");
  }
}

// --- Start -----------------------------------------------------------------------------------------

function connect() {
  $("form").addEventListener("submit", (event) => { event.preventDefault(); generate(); });
  const actions = {
    "start": generate, "stop": () => running?.abort(), "reset": form.reset, "random-seed": () => { $("seed").value = randomSeed(); },
    "resample-fine": resampleFineStage, "resample-mask": resampleMask, "save-png": savePng, "save-settings": saveSettings,
    "copy-link": copyLink,
  };
  for (const [id, action] of Object.entries(actions)) $(id).addEventListener("click", action);
  $("file").addEventListener("change", () => { upload($("file").files[0]); $("file").value = ""; });
  for (const name of ["dragover", "dragleave", "drop"]) {
    $("drop").addEventListener(name, (event) => {
      event.preventDefault();
      $("drop").classList.toggle("over", name === "dragover");
      if (name === "drop") upload(event.dataTransfer.files[0]);
    });
  }
  viewer.connect((position, mode) => (mode === "inspect" ? inspect(position) : resampleFrom(position)), cluster.clear);
}

async function start() {
  view.connect();
  $("error-button").addEventListener("click", () => retry());
  setStatus("Loading", true);
  try {
    const { models, upload_bytes: limit } = await api.models();
    maxBytes = limit;
    form.build(models);
    connect();
    setStatus("");
    $("start-page").hidden = false;
    document.body.dataset.ready = "true";
    if (form.fromLink(location.hash.slice(1))) generate();
  } catch (error) {
    if (!(error instanceof api.ApiError)) throw error;
    retry = () => location.reload();
    showError(error);
  }
}

start();
