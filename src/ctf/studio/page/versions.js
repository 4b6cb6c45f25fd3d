// The images of the page: items of the gallery, and their versions.
//
// An item starts with one version; each edit adds another. A version is {model, classNumber,
// className, seed, settings, image, base64, codes, coarse, steps, rows, total, note, parent}. `steps`
// are {text, image}, from coarse to fine; `parent` is the version that was edited. Until a version is
// complete, it has no codes. With two models, items are in pairs of the same seed: `counterpart`.

import { pngUrl } from "./dom.js";

export const createItem = (version) => ({ versions: [version], shown: 0, counterpart: null, isFirst: true });

export const current = ({ versions, shown }) => versions[shown];

export function addVersion(item, version) {
  item.versions.push(version);
  item.shown = item.versions.length - 1;
}

export function createVersion(model, classNumber, seed, note, parent = null) {
  return {
    model, classNumber, className: model.class_names[classNumber], seed, note, parent,
    settings: null, image: null, base64: null, codes: null, coarse: null, steps: [], rows: 0, total: model.grid,
  };
}

/** Adds the preview that follows a row of coarse labels. */
export function addPreview(version, { rows, total }, base64) {
  Object.assign(version, { rows, total, image: pngUrl(base64) });
  const text = rows === total ? "All coarse labels" : `Row ${rows} of ${total}; other tokens show the mean of all clusters`;
  version.steps.push({ text, image: version.image });
}

export function complete(version, { image, codes, coarse, settings, seed }, text = "Final image") {
  Object.assign(version, { image: pngUrl(image), base64: image, codes, coarse, settings, seed, rows: version.total });
  version.steps.push({ text, image: version.image });
}

/** The version that is shown next to the current one: its parent, or that of the other model. */
export function comparedWith(item) {
  return current(item).parent ?? (item.counterpart && current(item.counterpart));
}

/** The settings file of an image all of whose codes are known. */
export function settingsWithCodes(settings, codes) {
  const { coarse, ...rest } = settings;
  return { ...rest, codes, keep: codes.map(() => true) };
}
