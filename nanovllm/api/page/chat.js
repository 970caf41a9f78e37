// The conversation: sending, streaming, stopping, editing.

import { byId } from "./dom.js";
import { complete } from "./server.js";
import { AnswerTurn, UserTurn } from "./turns.js";

const LIMITS = {
  length: "The answer reached the token limit.",
  content_filter: "The answer was filtered.",
  error: "The engine could not finish this answer.",
  abort: "The server aborted this answer.",
};

function content({ text, images }) {
  if (!images?.length) return text;
  return [...images.map((url) => ({ type: "image_url", image_url: { url } })), { type: "text", text }];
}

const KEEP_MS = 1000; // interval for storing an unfinished answer
const MAX_ANNOUNCED = 4000; // characters
const MIN_RATE_MS = 5; // tokens that arrive together have no rate

export class Chat {
  // settings(): {system, options} of requests. changed(): the chat has become busy or idle.
  // refused(error, {text, images}): a turn that the server refused and the chat dropped.
  // store: where the turns are kept.
  constructor({ settings, changed, refused, store }) {
    this.settings = settings;
    this.changed = changed;
    this.refused = refused;
    this.store = store;
    this.turns = [];
    this.stopper = null;
    this.list = byId("turns");
    this.room = byId("messages");
  }

  get isBusy() {
    return this.stopper !== null;
  }

  clear() {
    this.stop();
    this.#remove(0);
    this.store.renew();
  }

  stop() {
    this.stopper?.abort();
  }

  async send(text, images) {
    this.#add(this.#turn({ role: "user", text, images }));
    this.#keep();
    await this.#answer();
  }

  // Shows the stored turns.
  async restore() {
    const messages = await this.store.load();
    if (this.turns.length) return; // the user has already written
    for (const message of messages) {
      this.#add(this.#turn(message));
      if (message.role === "user") continue;
      if (!message.done) message.note = "The page was closed before the answer ended.";
      message.done = true;
      this.turns.at(-1).finish();
    }
  }

  #turn(message) {
    const turn = message.role === "user"
      ? new UserTurn(message, { edit: (text) => this.#sendAgain(turn, text) })
      : new AnswerTurn(message, { again: () => this.#answerAgain(turn) });
    return turn;
  }

  #keep() {
    const last = this.turns.length - 1;
    this.keptMs = performance.now();
    this.store.put(last, this.turns[last].message);
  }

  async #sendAgain(turn, text) {
    await this.#end();
    this.#cut(this.turns.indexOf(turn));
    await this.send(text, turn.message.images);
  }

  async #answerAgain(turn) {
    await this.#end();
    this.#cut(this.turns.indexOf(turn));
    await this.#answer();
  }

  // Stop, and wait until the answer has ended.
  async #end() {
    this.stop();
    await this.running;
  }

  #add(turn) {
    this.turns.push(turn);
    this.list.append(turn.node);
    byId("welcome").hidden = true;
    this.follow(true);
  }

  #cut(from) {
    this.#remove(from);
    this.store.cut(from);
  }

  #remove(from) {
    for (const turn of this.turns.splice(from)) turn.node.remove();
    byId("welcome").hidden = this.turns.length > 0;
  }

  #body() {
    const { system, options } = this.settings();
    const messages = this.turns.map(({ message }) => message)
      .filter(({ role, text }) => role === "user" || text)
      .map((message) => ({ role: message.role, content: content(message) }));
    if (system) messages.unshift({ role: "system", content: system });
    return { messages, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true }, ...options };
  }

  async #answer() {
    const body = this.#body();
    const message = { role: "assistant", text: "", reasoning: "", calls: [], tokens: 0, done: false };
    const turn = this.#turn(message);
    this.#add(turn);
    this.stopper = new AbortController();
    this.running = this.#stream(body, turn, this.stopper.signal);
    this.changed();
    byId("announcer").textContent = "The model is answering.";
    await this.running;
  }

  async #stream(body, turn, signal) {
    const { message } = turn;
    const start = performance.now();
    try {
      for await (const part of complete(body, signal)) {
        this.#take(message, part, performance.now() - start);
        turn.update();
        this.follow();
        if (performance.now() - this.keptMs > KEEP_MS && turn === this.turns.at(-1)) this.#keep();
      }
    } catch (error) {
      message.failed = error.name !== "AbortError";
      message.note = message.failed ? error.message : "Stopped.";
      if (message.failed && message.firstMs === undefined) {
        this.#refuse(turn, error);
        return;
      }
    }
    message.done = true;
    turn.finish();
    this.follow();
    if (turn === this.turns.at(-1)) this.#keep();
    this.stopper = null;
    this.#announce(turn);
    this.changed();
  }

  #announce(turn) {
    const { message: { note, tokens }, text } = turn;
    const said = text.innerText.slice(0, MAX_ANNOUNCED);
    byId("announcer").textContent = `${said}\n${note ?? `The answer is complete, with ${tokens} tokens.`}`;
  }

  // No part of the answer arrived. Later requests leave out the question.
  #refuse(turn, error) {
    const at = this.turns.indexOf(turn);
    this.stopper = null;
    byId("announcer").textContent = "";
    if (at > 0) {
      const { message } = this.turns[at - 1];
      this.#cut(at - 1);
      this.refused(error, message);
    }
    this.changed();
  }

  #take(message, { choices, usage }, now) {
    const { delta = {}, finish_reason: reason } = choices?.[0] ?? {};
    const thought = delta.reasoning_content ?? delta.reasoning ?? "";
    message.reasoning += thought;
    message.text += delta.content ?? "";
    for (const { index, function: { name, arguments: args } } of delta.tool_calls ?? []) {
      message.calls[index] ??= { name: "", args: "" };
      message.calls[index].name += name ?? "";
      message.calls[index].args += args ?? "";
    }
    const isNew = thought || delta.content || delta.tool_calls;
    if (isNew) message.firstMs ??= now;
    if (message.reasoning && delta.content) message.thoughtMs ??= now;
    message.tokens = usage?.completion_tokens ?? message.tokens + (isNew ? 1 : 0);
    if (isNew && message.tokens > 1 && now >= message.firstMs + MIN_RATE_MS) {
      message.rate = ((message.tokens - 1) * 1000) / (now - message.firstMs);
    }
    if (LIMITS[reason]) message.note = LIMITS[reason];
  }

  // Keep the end in sight, unless the reader has scrolled up.
  follow(always = false) {
    const { room } = this;
    const isNear = room.scrollHeight - room.scrollTop - room.clientHeight < 120;
    if (always || isNear) requestAnimationFrame(() => { room.scrollTop = room.scrollHeight; });
  }
}
