// Requests to the server, error messages, and streamed answers.

import { tab } from "./storage.js";

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

let key = tab.get("api-key") ?? "";

export function setKey(value, remember) {
  key = value;
  tab.set("api-key", remember && value ? value : null);
}

export const getKey = () => key;
export const isKeyRemembered = () => tab.get("api-key") !== null;

export async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  try {
    return await fetch(path, { ...options, headers, cache: "no-store", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError" || error.name === "TimeoutError") throw error;
    throw new ServerError("The server does not respond.", 0);
  }
}

async function detail(response) {
  try {
    const { error, message } = JSON.parse(await response.text());
    return error?.message ?? message ?? "";
  } catch {
    return "";
  }
}

export async function errorOf(response) {
  const said = await detail(response);
  const words = {
    401: "The server needs an API key. Enter it in the settings.",
    403: "The server does not allow this.",
    413: "The message is too large for the server.",
    429: "The server's queue is full. Try again in a moment.",
    503: "The server accepts no new requests now.",
  };
  const text = words[response.status] ?? (said || `The server answered with status ${response.status}.`);
  const more = words[response.status] && said && response.status !== 401 ? ` (${said})` : "";
  return new ServerError(text + more, response.status);
}

// The data of each server-sent event.
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The answer was cut off: the server closed the connection.", 0);
    }
    if (part.done) return;
    const lines = (held + part.value).split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  }
}

// The parts of a streamed chat completion: {choices, usage, …}. Throws ServerError.
export async function* complete(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw await errorOf(response);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const part = JSON.parse(data);
    if (part.error) throw new ServerError(part.error.message ?? String(part.error), 500);
    yield part;
  }
  throw new ServerError("The answer was cut off: the server closed the connection.", 0);
}

// {name, root, sees, maxLength} of the server's model.
export async function model() {
  const response = await request("v1/models", { signal: AbortSignal.timeout(10000) });
  if (!response.ok) throw await errorOf(response);
  const first = (await response.json()).data?.[0] ?? {};
  const kinds = first.input_modalities ?? first.modalities ?? first.architecture?.input_modalities ?? [];
  return { name: first.id ?? "", root: first.root ?? first.id ?? "", sees: kinds.includes("image"), maxLength: first.max_model_len };
}

// "ready", "draining", "broken" or "gone".
export async function state() {
  const signal = AbortSignal.timeout(5000);
  try {
    const ready = await request("ready", { signal });
    if (ready.ok) return "ready";
    const health = await request("health", { signal });
    return health.ok ? "draining" : "broken";
  } catch {
    return "gone";
  }
}
