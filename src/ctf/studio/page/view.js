// The look of the page: colours, pixels, and the illustration on the start page.

import { $, store, stored } from "./dom.js";

const THEMES = ["auto", "light", "dark"];

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme[0].toUpperCase() + theme.slice(1);
  $("theme").setAttribute("aria-label", `Colours: ${theme}`);
  store("theme", theme);
  drawIllustration();
}

function setSmooth(smooth) {
  document.documentElement.dataset.smooth = smooth;
  $("smooth").setAttribute("aria-pressed", String(smooth));
  store("smooth", smooth);
}

/** Draws a ball in three resolutions, from coarse to fine. */
function drawIllustration() {
  [...document.querySelectorAll(".illustration canvas")].forEach((canvas, i) => {
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

export function connect() {
  const theme = stored("theme");
  setTheme(THEMES.includes(theme) ? theme : "auto");
  setSmooth(stored("smooth") === "true");
  $("theme").addEventListener("click", () => {
    setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]);
  });
  $("smooth").addEventListener("click", () => setSmooth(document.documentElement.dataset.smooth !== "true"));
}
