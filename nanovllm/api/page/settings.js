// The settings, kept until the tab is closed. The key is kept only on request.

import { byId } from "./dom.js";
import { getKey, isKeyRemembered, setKey } from "./server.js";
import { tab } from "./storage.js";

const FIELDS = ["system", "temperature", "top-p", "max-tokens", "thinking"];

function number(id) {
  const { value } = byId(id);
  return value === "" ? undefined : Number(value);
}

export class Settings {
  // changed(): the key may have changed.
  constructor(changed) {
    this.dialog = byId("settings");
    this.changed = changed;
    const kept = JSON.parse(tab.get("settings") ?? "{}");
    for (const id of FIELDS) byId(id).value = kept[id] ?? "";
    byId("api-key").value = getKey();
    byId("remember").checked = isKeyRemembered();
    byId("reset-settings").addEventListener("click", () => {
      for (const id of FIELDS) byId(id).value = "";
    });
    this.dialog.addEventListener("close", () => this.#keep());
    this.dialog.addEventListener("click", (event) => { // outside of it
      if (event.target === this.dialog && byId("settings-form").checkValidity()) this.dialog.close();
    });
  }

  open(note = "") {
    byId("settings-note").textContent = note;
    byId("settings-note").hidden = !note;
    if (!this.dialog.open) this.dialog.showModal();
    byId(note ? "api-key" : "system").focus();
  }

  #keep() {
    const values = Object.fromEntries(FIELDS.map((id) => [id, byId(id).value]));
    tab.set("settings", JSON.stringify(values));
    setKey(byId("api-key").value.trim(), byId("remember").checked);
    this.changed();
  }

  // The settings for requests. Empty fields use the server's defaults.
  read() {
    const thinking = byId("thinking").value;
    return {
      system: byId("system").value.trim(),
      options: {
        temperature: number("temperature"),
        top_p: number("top-p"),
        max_completion_tokens: number("max-tokens"),
        chat_template_kwargs: thinking ? { enable_thinking: thinking === "on" } : undefined,
      },
    };
  }
}
