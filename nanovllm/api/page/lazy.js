// A module that is loaded when something first needs it.

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

  // Calls show(module): now, or when it is there, if the page still has the node then.
  fill(node, show) {
    if (this.#module) {
      show(this.#module);
      return;
    }
    this.ready().then((module) => { if (node.isConnected) show(module); }, () => {});
  }
}
