// The page: what the buttons do.

import * as api from "./api.js";
import * as cluster from "./cluster.js";
import * as controls from "./controls.js";
import { $, bytes, el, png, randomSeed, save } from "./dom.js";
import * as sheet from "./sheet.js";
import * as stage from "./stage.js";
import { begin, current, finish, givenCodes, grow, slot as newSlot } from "./takes.js";

let slots = [];
let running = null; // the AbortController of what is being drawn
let again = null; // what to do on "try again"

// --- telling ---------------------------------------------------------------------------------------

function say(text, busy = false) {
  $("status").textContent = text;
  $("status").classList.toggle("busy", busy);
}

function complain(error, offer = "Try again") {
  const later = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  const retry = el("button", { type: "button", textContent: offer });
  retry.addEventListener("click", () => again?.());
  $("notice").replaceChildren(el("p", { textContent: `${error.message}${later}` }), retry);
  $("notice").hidden = false;
  say("");
}

const hush = () => { $("notice").hidden = true; };

/** Runs one thing that takes its time, and says what it returns; another one, or Stop, ends it. */
async function run(text, work) {
  running?.abort();
  const mine = (running = new AbortController());
  again = () => run(text, work);
  hush();
  say(text, true);
  $("stop").hidden = false;
  $("empty").hidden = true;
  try {
    const said = await work(mine.signal);
    if (running === mine) say(said ?? "Done");
  } catch (error) {
    if (error.name === "AbortError") { if (running === mine) say("Stopped"); }
    else if (error instanceof api.Refused || error instanceof TypeError) complain(error);
    else throw error;
    forgetUnfinished();
  } finally {
    if (running === mine) {
      running = null;
      $("stop").hidden = true;
    }
  }
}

/** Takes that were stopped are gone. */
function forgetUnfinished() {
  for (const slot of slots) {
    slot.takes = slot.takes.filter(({ codes }) => codes);
    slot.shown = Math.max(Math.min(slot.shown, slot.takes.length - 1), 0);
  }
  const gone = new Set(slots.filter(({ takes }) => !takes.length));
  slots = slots.filter((slot) => !gone.has(slot));
  for (const slot of slots) if (gone.has(slot.twin)) slot.twin = null;
  sheet.show(slots, select);
  if (slots.includes(stage.slotShown())) select(stage.slotShown());
  else if (slots.length) select(slots[0]);
  else { $("sheet").hidden = $("stage").hidden = true; $("empty").hidden = !$("notice").hidden; }
}

function onEvent(takes, each) {
  return (name, data) => {
    if (name === "queued") say(data.ahead ? `${data.ahead} before you in the line` : "Drawing", true);
    if (name !== "row") return;
    say(`Coarse labels, row ${data.rows} of ${data.total}`, true);
    takes.forEach((take, i) => grow(take, data, data.images[i]));
    each();
  };
}

function select(slot) {
  slot.changed = () => sheet.update(slot);
  cluster.clear();
  stage.show(slot);
  sheet.mark(slot);
}

function refresh(changed) {
  changed.forEach(sheet.update);
  if (changed.includes(stage.slotShown())) stage.update();
}

// --- drawing ---------------------------------------------------------------------------------------

function generate() {
  let asked;
  try {
    asked = controls.asked();
  } catch (error) {
    again = () => { hush(); $("classes").querySelector("input")?.focus(); };
    complain(error, "Mend it");
    return;
  }
  history.replaceState(null, "", `#${controls.toLink()}`);
  const models = controls.chosenModels();
  const numbers = asked.classes.flatMap((number) => Array(asked.count).fill(number));
  run("Asking", async (signal) => {
    const ofModel = models.map((model) => numbers.map((number, i) => newSlot(begin(model, number, asked.seed + i, "first"))));
    if (ofModel.length === 2) ofModel[0].forEach((slot, i) => { Object.assign(slot, { twin: ofModel[1][i], leads: true }); ofModel[1][i].twin = slot; });
    slots = ofModel[0].flatMap((slot) => (slot.twin ? [slot, slot.twin] : [slot]));
    sheet.show(slots, select);
    select(slots[0]);
    if (matchMedia("(max-width: 820px)").matches) $("work").scrollIntoView({ behavior: "smooth" });
    await Promise.all(models.map(async (model, m) => {
      const takes = ofModel[m].map(current);
      const body = { model: model.name, ...asked };
      const { pictures } = await api.generate(body, onEvent(takes, () => refresh(ofModel[m])), signal);
      takes.forEach((take, i) => finish(take, pictures[i]));
      refresh(ofModel[m]);
    }));
  });
}

/** Draws another take of the picture on the stage. */
function another(note, text, draw) {
  const slot = stage.slotShown();
  const from = current(slot);
  if (!from.codes) return;
  const take = begin(from.model, from.number, randomSeed(), note, from);
  run(text, async (signal) => {
    slot.takes.push(take);
    slot.shown = slot.takes.length - 1;
    select(slot);
    const { pictures: [picture] } = await draw(take, from, signal, () => refresh([slot]));
    finish(take, picture);
    refresh([slot]);
  });
}

function newDetails() {
  another("new details", "Fine stage", (take, from, signal) => {
    // The coarse steps are the same ones.
    take.steps = from.steps.slice(0, -1);
    const body = { model: from.model.name, classes: [from.number], coarse: [from.coarse], seed: take.seed, settings: controls.settings() };
    return api.post("/v1/refine", body, signal);
  });
}

function redraw(keep, note) {
  another(note, "Redrawing", (take, from, signal, each) => {
    const body = {
      model: from.model.name, classes: [from.number], seed: take.seed, settings: controls.settings(),
      codes: [from.codes], keep: [keep],
    };
    return api.generate(body, onEvent([take], each), signal);
  });
}

function onToken(position, mode) {
  const take = current(stage.slotShown());
  if (mode === "look") { look(take, position); return; }
  const { grid } = take.model;
  redraw(take.codes.map((_, i) => i < position), `from row ${Math.floor(position / grid) + 1}, column ${(position % grid) + 1}`);
}

function look(take, position) {
  stage.look(position);
  cluster.waiting();
  run("Looking inside", async (signal) => {
    const body = { model: take.model.name, class: take.number, codes: take.codes, position, settings: controls.settings() };
    const found = await api.post("/v1/members", body, signal);
    const preview = (member) => (member ? stage.display(png(member.image), `${take.name} with code ${member.code}`) : stage.displayCurrent());
    cluster.show(take, found, preview, (member) => swap(take, position, member));
    return `Cluster ${found.cluster}: ${found.members.length} codes`;
  });
}

/** Another member is put in: a take that needs no drawing. */
function swap(from, position, member) {
  if (member.code === from.codes[position]) return;
  const slot = stage.slotShown();
  const codes = from.codes.with(position, member.code);
  const take = begin(from.model, from.number, from.seed, `code ${member.code} put in`, from);
  take.steps = from.steps.slice(0, -1);
  finish(take, { image: member.image, codes, coarse: from.coarse, seed: from.seed, settings: givenCodes(from.settings, codes) });
  slot.takes.push(take);
  slot.shown = slot.takes.length - 1;
  select(slot);
  sheet.update(slot);
}

// --- a picture from outside ------------------------------------------------------------------------

function upload(file) {
  if (!file) return;
  const [model] = controls.chosenModels();
  const number = Number($("upload-class").value);
  run("Reading the picture", async (signal) => {
    const { original, coarse, picture } = await api.upload(file, model.name, number, signal);
    const take = begin(model, number, 0, "reconstruction");
    take.steps = [{ text: "Your picture, cut to the model’s size", image: png(original) }, { text: "All coarse labels", image: png(coarse) }];
    finish(take, picture, "Reconstruction from its codes");
    const slot = newSlot(take);
    slots = [slot, ...slots];
    sheet.show(slots, select);
    select(slot);
    if (!model.has_fine_stage) return;
    const redrawn = begin(model, number, randomSeed(), "details redrawn", take);
    const body = { model: model.name, classes: [number], coarse: [take.coarse], seed: redrawn.seed, settings: controls.settings() };
    const { pictures } = await api.post("/v1/refine", body, signal);
    redrawn.steps = take.steps.slice(0, -1);
    finish(redrawn, pictures[0]);
    slot.takes.push(redrawn);
    slot.shown = 1;
    select(slot);
    sheet.update(slot);
  });
}

// --- to take away ----------------------------------------------------------------------------------

const fileName = (take, end) => `${take.name}-${take.seed}.${end}`;

function savePng() {
  const take = current(stage.slotShown());
  save(fileName(take, "png"), new Blob([bytes(take.base64)], { type: "image/png" }));
}

function saveSettings() {
  const take = current(stage.slotShown());
  const text = `${JSON.stringify(take.settings, null, 2)}\n`;
  save(fileName(take, "json"), new Blob([text], { type: "application/json" }));
}

async function share() {
  const link = `${location.origin}/#${controls.toLink()}`;
  history.replaceState(null, "", link);
  try {
    await navigator.clipboard.writeText(link);
    say("Link copied");
  } catch {
    say("The link is in the address bar");
  }
}

// --- the view --------------------------------------------------------------------------------------

const THEMES = { auto: "as the system", light: "light", dark: "dark" };

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme[0].toUpperCase() + theme.slice(1);
  $("theme").setAttribute("aria-label", `Colours: ${THEMES[theme]}`);
  localStorage.setItem("theme", theme);
  ghosts();
}

function setSmooth(smooth) {
  document.documentElement.dataset.smooth = smooth;
  $("smooth").setAttribute("aria-pressed", String(smooth));
  localStorage.setItem("smooth", smooth);
}

/** The pictures of the empty page: one ball, from coarse to fine. */
function ghosts() {
  [...document.querySelectorAll(".ghosts canvas")].forEach((canvas, i) => {
    const context = canvas.getContext("2d");
    const count = [4, 8, 32][i];
    const side = canvas.width / count;
    context.fillStyle = getComputedStyle(canvas).color;
    context.clearRect(0, 0, canvas.width, canvas.height);
    for (let y = 0; y < count; y++) {
      for (let x = 0; x < count; x++) {
        const [u, v] = [((x + 0.5) / count) * 2.3 - 1.15, ((y + 0.5) / count) * 2.3 - 1.15];
        const height = Math.sqrt(Math.max(0, 1 - u * u - v * v));
        context.globalAlpha = height ? 0.12 + 0.88 * Math.max(0, -0.45 * u - 0.6 * v + 0.66 * height) : 0.04;
        context.fillRect(x * side, y * side, side, side);
      }
    }
  });
}

function connect() {
  $("controls").addEventListener("submit", (event) => { event.preventDefault(); generate(); });
  $("start").addEventListener("click", generate);
  $("stop").addEventListener("click", () => running?.abort());
  $("reset").addEventListener("click", controls.reset);
  $("dice").addEventListener("click", () => { $("seed").value = randomSeed(); });
  $("details").addEventListener("click", newDetails);
  $("redraw").addEventListener("click", () => {
    const painted = new Set(stage.paintedTokens());
    redraw(current(stage.slotShown()).codes.map((_, i) => !painted.has(i)), painted.size === 1 ? "1 token redrawn" : `${painted.size} tokens redrawn`);
  });
  $("save-png").addEventListener("click", savePng);
  $("save-settings").addEventListener("click", saveSettings);
  $("share").addEventListener("click", share);
  $("file").addEventListener("change", () => { upload($("file").files[0]); $("file").value = ""; });
  for (const name of ["dragover", "dragleave", "drop"]) {
    $("drop").addEventListener(name, (event) => {
      event.preventDefault();
      $("drop").classList.toggle("over", name === "dragover");
      if (name === "drop") upload(event.dataTransfer.files[0]);
    });
  }
  $("theme").addEventListener("click", () => {
    const names = Object.keys(THEMES);
    setTheme(names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length]);
  });
  $("smooth").addEventListener("click", () => setSmooth(document.documentElement.dataset.smooth !== "true"));
  stage.connect(onToken, cluster.clear);
}

async function start() {
  const theme = localStorage.getItem("theme");
  setTheme(theme in THEMES ? theme : "auto");
  setSmooth(localStorage.getItem("smooth") === "true");
  say("Loading", true);
  try {
    const { models } = await api.models();
    controls.build(models);
    connect();
    say("");
    $("empty").hidden = false;
    document.body.dataset.ready = "true";
    if (controls.fromLink(location.hash.slice(1))) generate();
  } catch (error) {
    if (!(error instanceof api.Refused)) throw error;
    again = () => location.reload();
    complain(error);
  }
}

start();
