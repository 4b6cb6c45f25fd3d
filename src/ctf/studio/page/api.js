// Requests to the API: JSON, or a stream of events.

import { $ } from "./dom.js";

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

function askForToken() {
  return new Promise((resolve) => {
    const dialog = $("token-dialog");
    dialog.addEventListener("close", () => {
      sessionStorage.setItem("token", $("token").value);
      resolve();
    }, { once: true });
    dialog.showModal();
  });
}

async function request(path, options = {}) {
  const headers = new Headers(options.headers);
  const token = sessionStorage.getItem("token");
  if (token) headers.set("Authorization", `Bearer ${token}`);
  const response = await receive(fetch(path, { ...options, headers }), "The studio does not respond. Is it still running?");
  if (response.ok) return response;
  if (response.status === 401) {
    await askForToken();
    return request(path, options);
  }
  const { reason, where } = await response.json().catch(() => ({ reason: response.statusText }));
  throw new ApiError(response.status, where ? `${where}: ${reason}` : reason, response.headers.get("Retry-After"));
}

const asJson = (body) => ({
  method: "POST",
  body: JSON.stringify(body),
  headers: { "Content-Type": "application/json" },
});

const requestJson = async (path, options) => receive((await request(path, options)).json());

export const models = () => requestJson("/v1/models");

export const post = (path, body, signal) => requestJson(path, { ...asJson(body), signal });

export function encode(file, model, classNumber, signal) {
  const query = new URLSearchParams({ model, class: classNumber });
  const headers = { "Content-Type": file.type || "image/png" };
  return requestJson(`/v1/encode?${query}`, { method: "POST", body: file, headers, signal });
}

/** Samples images; calls `onEvent(name, data)` for each event but the last, whose data it returns. */
export async function generate(body, onEvent, signal) {
  const options = asJson(body);
  options.headers.Accept = "text/event-stream";
  const response = await request("/v1/generate", { ...options, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await receive(reader.read());
    if (done) throw new ApiError(0, LOST);
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const [, name, json] = event.match(/^event: (\w+)\ndata: (.*)$/s);
      const data = JSON.parse(json);
      if (name === "done") return data;
      if (name === "error") throw new ApiError(data.status, data.reason);
      onEvent(name, data);
    }
  }
}
