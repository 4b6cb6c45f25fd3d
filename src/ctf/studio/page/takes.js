// What is on the page: slots, one for each picture of the sheet, each with its takes.
//
// A take is one way that a picture was drawn: {model, number, name, seed, settings, image, codes,
// coarse, steps, note, from}. `steps` are {text, image}, from coarse to fine; `from` is the take
// that it was made of. A take that is being drawn has no codes yet.

import { png } from "./dom.js";

export const mean = "The rest is the mean of all clusters.";

export function slot(take, twin = null) {
  return { takes: [take], shown: 0, twin };
}

export const current = ({ takes, shown }) => takes[shown];

/** A take of which nothing is known but what was asked for. */
export function begin(model, number, seed, note, from = null) {
  return {
    model, number, seed, note, from, name: model.class_names[number],
    settings: null, image: null, codes: null, coarse: null, steps: [], rows: 0, total: model.grid,
  };
}

export function grow(take, { rows, total }, image) {
  const all = rows === total;
  const text = all ? "All coarse labels" : `Row ${rows} of ${total}. ${mean}`;
  Object.assign(take, { rows, total, image: png(image) });
  take.steps.push({ text, image: take.image });
}

export function finish(take, picture, text = "With details") {
  const { image, codes, coarse, settings, seed } = picture;
  Object.assign(take, { image: png(image), base64: image, codes, coarse, settings, seed, rows: take.total });
  take.steps.push({ text, image: take.image });
}

/** What the take shows next to it: the one it was made of, or the other pipeline's. */
export function beside(shown) {
  return current(shown).from ?? (shown.twin && current(shown.twin));
}

/** The settings file of a picture all of whose codes are given. */
export function givenCodes(settings, codes) {
  const { coarse, ...rest } = settings;
  return { ...rest, codes, keep: codes.map(() => true) };
}
