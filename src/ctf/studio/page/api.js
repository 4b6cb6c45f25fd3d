// Requests to the API: JSON, or a stream of events.

import { $, store, stored } from "./dom.js";

/** The error response to a request; status 0 if there was no response. */
export class ApiError extends Error {
  constructor(status, reason, retryAfter = null) {
    super(reason);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

const LOST = "The connection to the studio was lost.";

/** Waits for a promise of the network; if the connection fails, throws an ApiError. */
async function receive(promise, reason = LOST) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, reason);
  }
}

let token = stored("token", "sessionStorage");

function askForToken() {
  return new Promise((resolve) => {
    const dialog = $("token-dialog");
    dialog.addEventListener("close", () => {
      token = $("token").value;
      store("token", token, "sessionStorage");
      resolve();
    }, { once: true });
    dialog.showModal();
  });
}

/** Text as the bytes of UTF-8: what a header can contain. */
const asHeader = (text) => String.fromCharCode(...new TextEncoder().encode(text));

/** Sends a request; addresses are relative, as a proxy may serve the studio under a path. */
async function request(path, options = {}) {
  const headers = new Headers(options.headers);
  if (token) headers.set("X-CTF-Token", asHeader(token)); // a proxy may need Authorization for itself
  const response = await receive(fetch(path, { ...options, headers }), "The studio does not respond. Is it still running?");
  const type = response.headers.get("Content-Type") ?? "";
  if (response.ok && type.startsWith("text/html")) throw new ApiError(0, "A proxy answered with a page of its own. Reload to log in again.");
  if (response.ok) return response;
  const status = `${response.status} ${response.statusText}`.trim();
  const { reason, where } = await response.json().catch(() => ({}));
  if (response.status === 401 && reason) {
    await askForToken();
    return request(path, options);
  }
  if (!reason) throw new ApiError(response.status, `A proxy in front of the studio refused the request: ${status}.`);
  throw new ApiError(response.status, where ? `${where}: ${reason}` : reason, response.headers.get("Retry-After"));
}

export const models = async () => receive((await request("v1/models")).json());

/** Sends a task; calls `onEvent(name, data)` for each event but the last, whose data it returns. */
async function compute(path, options, onEvent = () => {}) {
  // A stream: unlike silence until there is a result, it does not make proxies close the connection.
  const headers = { ...options.headers, Accept: "text/event-stream" };
  const response = await request(path, { method: "POST", ...options, headers });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await receive(reader.read());
    if (done) throw new ApiError(0, LOST);
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const [, name, json] = event.match(/^event: (\w+)\ndata: (.*)$/s) ?? [];
      if (!name) continue; // a comment
      const data = JSON.parse(json);
      if (name === "done") return data;
      if (name === "error") throw new ApiError(data.status, data.reason);
      onEvent(name, data);
    }
  }
}

export function post(path, body, signal, onEvent) {
  const headers = { "Content-Type": "application/json" };
  return compute(path, { body: JSON.stringify(body), headers, signal }, onEvent);
}

export function encode(file, model, classNumber, signal) {
  const query = new URLSearchParams({ model, class: classNumber });
  const headers = { "Content-Type": file.type.startsWith("image/") ? file.type : "image/png" };
  return compute(`v1/encode?${query}`, { body: file, headers, signal });
}
