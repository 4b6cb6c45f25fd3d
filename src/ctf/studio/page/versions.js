// The images of the page: items of the gallery, and their versions.
//
// An item starts with one version; each edit adds another. A version is {model, classNumber,
// className, seed, settings, base64, codes, coarse, keep, steps, rows, total, note, parent}. `steps` are
// {text, image, rows, mask}, from coarse to fine, where `mask` covers what is not sampled yet; `keep`
// says which tokens are those of `parent`, the version that was edited. Until a version is complete, it
// has no codes. With two models, items are in pairs of the same seed: `counterpart`.

import { pngUrl } from "./dom.js";

export const createItem = (version) => ({ versions: [version], shown: 0, counterpart: null, isFirst: true });

export const current = ({ versions, shown }) => versions[shown];

/** The newest step of a version, if there is one. */
export const newest = ({ steps }) => steps.at(-1);

export function addVersion(item, version) {
  item.versions.push(version);
  item.shown = item.versions.length - 1;
}

export function createVersion(model, classNumber, seed, note, parent = null) {
  return {
    model, classNumber, className: model.class_names[classNumber], seed, note, parent,
    settings: null, base64: null, codes: null, coarse: null, keep: null, steps: [], rows: 0, total: model.grid,
  };
}

/** Adds the preview that follows a row of coarse labels; the first `labels` of its own are sampled. */
export function addPreview(version, { total }, base64, labels) {
  const { grid } = version.model;
  const rows = Math.floor(labels / grid);
  Object.assign(version, { rows, total });
  const isWhole = rows === total;
  const text = isWhole ? "All coarse labels" : `Row ${rows} of ${total}; the hatched part is not sampled yet`;
  version.steps.push({ text, image: pngUrl(base64), rows, mask: isWhole ? null : createMask(version, labels) });
}

/** Returns the URL of a CSS mask of the labels that are sampled and the tokens that are kept. */
function createMask({ model: { grid }, rows, keep }, labels) {
  const kept = (keep ?? []).map((isKept, i) => (isKept && i >= labels ? `M${i % grid} ${Math.floor(i / grid)}h1v1h-1z` : ""));
  const path = `M0 0h${grid}v${rows}H0zM0 ${rows}h${labels % grid}v1H0z${kept.join("")}`;
  const svg = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${grid} ${grid}" shape-rendering="crispEdges"><path d="${path}"/></svg>`;
  return `url("data:image/svg+xml,${encodeURIComponent(svg)}")`;
}

/** Shows a step in an image element; what is not sampled yet is transparent. */
export function showStep(element, { image, mask = null }) {
  element.src = image;
  element.style.maskImage = mask ?? "";
}

export function complete(version, { image, codes, coarse, settings, seed, passes = null }, text = "Final image") {
  Object.assign(version, { base64: image, codes, coarse, settings, seed, passes, rows: version.total });
  version.steps.push({ text, image: pngUrl(image) });
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
