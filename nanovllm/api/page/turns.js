// Rendering of a conversation's turns.

import { element } from "./dom.js";
import { Growing, render } from "./markdown.js";

const number = new Intl.NumberFormat("en");
const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

const action = (label, onclick) => element("button", { type: "button", class: "quiet", onclick }, label);

// The user's message. actions: {edit(text)}.
export class UserTurn {
  constructor(message, { edit }) {
    this.message = message;
    this.edit = edit;
    this.node = element("li", { class: "turn user" });
    this.#show();
  }

  #show() {
    const { text, images } = this.message;
    this.node.replaceChildren(
      element("span", { class: "unseen" }, "You:"),
      element("div", { class: "bubble" },
        images.length ? element("div", { class: "pictures" },
          images.map((src) => element("img", { src, alt: "Attached image" }))) : null,
        element("div", { class: "plain" }, text)),
      element("div", { class: "actions" },
        action("Edit", () => this.#change()),
        action("Copy", () => navigator.clipboard.writeText(text))));
  }

  #change() {
    const box = element("textarea", { "aria-label": "Edit the message", rows: 3 });
    box.value = this.message.text;
    const back = () => { this.#show(); this.node.querySelector("button").focus(); };
    const done = () => { if (box.value.trim()) this.edit(box.value.trim()); };
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { event.stopPropagation(); back(); }
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); done(); }
    });
    this.node.replaceChildren(
      element("div", { class: "edit" }, box, element("div", { class: "ends" },
        element("span", { class: "spring" }),
        action("Cancel", back),
        element("button", { type: "button", class: "primary", onclick: done }, "Send again"))));
    box.style.height = `${Math.min(box.scrollHeight + 4, 400)}px`;
    box.focus();
  }
}

// The model's answer. actions: {again()}.
export class AnswerTurn {
  constructor(message, { again }) {
    this.message = message;
    this.thought = element("div", { class: "thought" });
    this.summary = element("summary", {}, "Thinking…");
    this.reasoning = element("details", { class: "reasoning", hidden: true }, this.summary, this.thought);
    this.text = element("div", { class: "text" });
    this.calls = element("div", { class: "calls" });
    this.note = element("p", { class: "note", hidden: true });
    this.stats = element("span", { class: "stats" });
    this.actions = element("div", { class: "actions" },
      action("Copy", () => navigator.clipboard.writeText(message.text)), action("Answer again", again));
    this.actions.hidden = true;
    this.node = element("li", { class: "turn answer waiting" },
      element("span", { class: "unseen" }, "The model:"), this.reasoning, this.text, this.calls, this.note,
      element("div", { class: "foot" }, this.stats, this.actions));
    this.growing = new Growing(this.text);
    this.frame = 0;
  }

  // Shows the message as it is now, at the next frame.
  update() {
    this.frame ||= requestAnimationFrame(() => { this.frame = 0; this.#show(); });
  }

  #show() {
    const { message } = this;
    this.node.classList.toggle("waiting", !message.text && !message.reasoning && !message.calls.length && !message.done);
    this.node.classList.toggle("growing", !message.done);
    this.reasoning.hidden = !message.reasoning;
    this.thought.textContent = message.reasoning;
    const is_thinking = !message.done && !message.text;
    this.reasoning.classList.toggle("now", is_thinking);
    this.summary.textContent = is_thinking ? "Thinking…" : `Thought for ${seconds(message.thoughtMs ?? 0)}`;
    this.growing.show(message.text);
    this.calls.replaceChildren(...message.calls.map(({ name, args }) => element("div", { class: "code" },
      element("div", { class: "code-head" }, element("span", {}, `calls ${name}`)),
      element("pre", { tabindex: "0" }, element("code", {}, args)))));
    this.#foot();
  }

  #foot() {
    const { tokens, firstMs, rate, done, note, failed } = this.message;
    const words = [];
    if (tokens) words.push(`${number.format(tokens)} token${tokens === 1 ? "" : "s"}`);
    if (rate) words.push(`${rate < 100 ? rate.toFixed(1) : number.format(Math.round(rate))} tokens/s`);
    if (firstMs !== undefined) words.push(`first token after ${seconds(firstMs)}`);
    this.stats.textContent = words.join(" · ");
    this.note.textContent = note ?? "";
    this.note.hidden = !note;
    this.note.classList.toggle("failed", Boolean(failed));
    this.actions.hidden = !done;
  }

  // The answer is complete.
  finish() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    this.#show();
    this.text.replaceChildren(...render(this.message.text));
  }
}
