// Requests to the studio, as JSON or as a stream of events.

import { $ } from "./dom.js";

/** What the studio says of a request that it does not serve. */
export class Refused extends Error {
  constructor(status, reason, retryAfter = null) {
    super(reason);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** Asks for the token, once the studio wants one. */
function askForToken() {
  return new Promise((resolve) => {
    const gate = $("gate");
    gate.addEventListener("close", () => {
      sessionStorage.setItem("token", $("token").value);
      resolve();
    }, { once: true });
    gate.showModal();
  });
}

async function request(path, options = {}) {
  const headers = new Headers(options.headers);
  const token = sessionStorage.getItem("token");
  if (token) headers.set("Authorization", `Bearer ${token}`);
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The studio does not answer. Is it still running?");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) {
    await askForToken();
    return request(path, options);
  }
  const said = await answer.json().catch(() => ({ reason: answer.statusText }));
  const reason = said.where ? `${said.where}: ${said.reason}` : said.reason;
  throw new Refused(answer.status, reason, answer.headers.get("Retry-After"));
}

const asJson = (body) => ({
  method: "POST",
  body: JSON.stringify(body),
  headers: { "Content-Type": "application/json" },
});

export async function models() {
  return (await request("/v1/models")).json();
}

export async function post(path, body, signal) {
  return (await request(path, { ...asJson(body), signal })).json();
}

export async function upload(file, model, chosen, signal) {
  const query = new URLSearchParams({ model, class: chosen });
  const headers = { "Content-Type": file.type || "image/png" };
  return (await request(`/v1/encode?${query}`, { method: "POST", body: file, headers, signal })).json();
}

/** Draws; calls `on(name, data)` for each event before the last, and returns what that has. */
export async function generate(body, on, signal) {
  const options = asJson(body);
  options.headers.Accept = "text/event-stream";
  const answer = await request("/v1/generate", { ...options, signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refused(0, "The studio stopped in the middle.");
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const [, name, data] = event.match(/^event: (\w+)\ndata: (.*)$/s);
      const content = JSON.parse(data);
      if (name === "done") return content;
      if (name === "error") throw new Refused(content.status, content.reason);
      on(name, content);
    }
  }
}
