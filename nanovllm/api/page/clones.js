// A cache of expensive nodes, for growing texts that are rendered many times.

export class Clones {
  #nodes = new Map();

  constructor(max) {
    this.max = max; // nodes kept; the oldest is dropped first
  }

  // A copy of the node that make() returned for this key, or null if it returned null.
  get(key, make) {
    if (!this.#nodes.has(key)) {
      if (this.#nodes.size >= this.max) this.#nodes.delete(this.#nodes.keys().next().value);
      this.#nodes.set(key, make());
    }
    return this.#nodes.get(key)?.cloneNode(true) ?? null;
  }
}
