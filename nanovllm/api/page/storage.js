// Data stored in the browser. The page also works without (private windows, blocked storage).

// Values kept until the tab is closed.
export const tab = {
  get(name) {
    try {
      return sessionStorage.getItem(name);
    } catch {
      return null;
    }
  },
  set(name, value) {
    try {
      if (value === null) sessionStorage.removeItem(name);
      else sessionStorage.setItem(name, value);
    } catch {
      // kept only by the page
    }
  },
};

const MAX_CHATS = 4; // of tabs: older ones are deleted
const MAX_CHARS = 32 << 20; // of the turns of a chat, pictures included: the oldest turns are dropped

function done(request) {
  return new Promise((resolve, reject) => {
    request.addEventListener("success", () => resolve(request.result));
    request.addEventListener("error", (event) => { event.preventDefault(); reject(request.error); });
    request.addEventListener("blocked", () => reject(new Error("blocked")));
  });
}

async function open() {
  const request = indexedDB.open("nanovllm", 1);
  request.addEventListener("upgradeneeded", () => {
    request.result.createObjectStore("chats", { keyPath: "id" });
    request.result.createObjectStore("turns", { keyPath: ["chat", "at"] });
  });
  return done(request);
}

const size = ({ text, reasoning = "", images = [] }) => images.reduce((sum, image) => sum + image.length, text.length + reasoning.length);
const range = (chat, from = 0) => IDBKeyRange.bound([chat, from], [chat, Infinity]);

// The turns of this tab's chat, in the browser's database. All actions run in order; one that fails
// stores nothing.
export class ChatStore {
  constructor(maxChars = MAX_CHARS) {
    this.maxChars = maxChars;
    this.sizes = new Map(); // of the stored turns, by index
    this.offset = 0; // the index of the first loaded turn
    this.chat = tab.get("chat");
    if (!this.chat) this.#name();
    this.last = tab.get("chat") ? this.#start() : Promise.resolve(null);
  }

  #name() {
    this.chat = String(crypto.getRandomValues(new Uint32Array(4)));
    tab.set("chat", this.chat);
  }

  // The database, or null if there is none.
  async #start() {
    try {
      const database = await open();
      const chats = await done(database.transaction("chats").objectStore("chats").getAll());
      const changes = database.transaction(["chats", "turns"], "readwrite");
      changes.addEventListener("abort", (event) => event.stopPropagation());
      changes.objectStore("chats").put({ id: this.chat, time: Date.now() });
      const others = chats.filter(({ id }) => id !== this.chat).sort((a, b) => b.time - a.time);
      for (const { id } of others.slice(MAX_CHATS - 1)) {
        changes.objectStore("chats").delete(id);
        changes.objectStore("turns").delete(range(id));
      }
      return database;
    } catch {
      return null;
    }
  }

  #then(mode, action, stores = ["turns"]) {
    const result = this.last.then(async (database) => {
      if (!database) return null;
      try {
        const change = database.transaction(stores, mode);
        return await action(...stores.map((name) => change.objectStore(name)));
      } catch {
        return null;
      }
    });
    const { last } = this;
    this.last = result.then(() => last);
    return result;
  }

  // The stored messages, in order.
  async load() {
    const kept = await this.#then("readonly", (turns) => done(turns.getAll(range(this.chat)))) ?? [];
    while (kept.length && kept[0].message.role !== "user") kept.shift();
    for (const { at, message } of kept) this.sizes.set(at, size(message));
    this.offset = kept[0]?.at ?? 0;
    return kept.map(({ message }) => message);
  }

  put(turn, message) {
    const at = turn + this.offset;
    const copy = { chat: this.chat, at, message: structuredClone(message) };
    this.sizes.set(at, size(message));
    const dropped = this.#dropped();
    return this.#then("readwrite", async (turns) => {
      for (const place of dropped) turns.delete([this.chat, place]);
      if (!dropped.includes(at)) await done(turns.put(copy));
    });
  }

  // Begins an empty chat. Its name is there at once: a page that is closed now shows no old turns.
  renew() {
    const old = this.chat;
    this.#name();
    const { chat } = this;
    this.sizes.clear();
    this.offset = 0;
    return this.#then("readwrite", (turns, chats) => {
      chats.delete(old);
      chats.put({ id: chat, time: Date.now() });
      return done(turns.delete(range(old)));
    }, ["turns", "chats"]);
  }

  // Deletes the turns from this one on.
  cut(turn) {
    const from = turn + this.offset;
    for (const at of [...this.sizes.keys()]) if (at >= from) this.sizes.delete(at);
    return this.#then("readwrite", (turns) => done(turns.delete(range(this.chat, from))));
  }

  // The indices of the oldest turns above the limit.
  #dropped() {
    let sum = [...this.sizes.values()].reduce((all, one) => all + one, 0);
    const dropped = [];
    for (const at of [...this.sizes.keys()].sort((a, b) => a - b)) {
      if (sum <= this.maxChars) break;
      sum -= this.sizes.get(at);
      this.sizes.delete(at);
      dropped.push(at);
    }
    return dropped;
  }
}
