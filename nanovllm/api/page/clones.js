// Nodes that cost time to make, for texts that grow and are shown many times.

export class Clones {
  #nodes = new Map();

  constructor(max) {
    this.max = max; // how many are kept: the oldest goes first
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
