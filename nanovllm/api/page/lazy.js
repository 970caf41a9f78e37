// A module that is loaded when first needed.

export class Lazy {
  #load;
  #module = null;
  #loading = null;

  constructor(load) {
    this.#load = load;
  }

  async ready() {
    this.#loading ??= this.#load();
    this.#module = (await this.#loading).default;
    return this.#module;
  }

  // Calls show(module): now, or once it is loaded if the page still has the node.
  fill(node, show) {
    if (this.#module) {
      show(this.#module);
      return;
    }
    this.ready().then((module) => { if (node.isConnected) show(module); }, () => {});
  }
}
