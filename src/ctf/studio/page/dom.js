// Small helpers.

export const $ = (id) => document.getElementById(id);

/** Creates an element with properties, attributes (in `attributes`), and children. */
export function el(tag, properties = {}, ...children) {
  const { attributes = {}, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export const pngUrl = (base64) => `data:image/png;base64,${base64}`;

/** Downloads a file. */
export function download(name, content, type) {
  const url = URL.createObjectURL(new Blob([content], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

export const decodeBase64 = (base64) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));

export const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

// What this browser remembers. Behind a proxy, other programs can have the same origin, and pages
// in a frame may have no storage.
const key = (name) => `ctf-studio ${name}`;

export function stored(name, storage = "localStorage") {
  try {
    return window[storage].getItem(key(name));
  } catch {
    return null;
  }
}

export function store(name, value, storage = "localStorage") {
  try {
    window[storage].setItem(key(name), value);
  } catch {
    // It is forgotten when the page is closed.
  }
}
