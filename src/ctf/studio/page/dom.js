// Small helpers for the page's elements.

export const $ = (id) => document.getElementById(id);

/** An element with properties, attributes (in `attributes`), and children. */
export function el(tag, properties = {}, ...children) {
  const { attributes = {}, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export const png = (base64) => `data:image/png;base64,${base64}`;

/** Offers bytes as a file. */
export function save(name, blob) {
  const address = URL.createObjectURL(blob);
  const anchor = el("a", { href: address, download: name });
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

export function bytes(base64) {
  return Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
}

export const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];
