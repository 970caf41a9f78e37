// Mathematics: TeX as MathML, by Temml. What it cannot parse is shown as text.

import { Clones } from "./clones.js";
import { element } from "./dom.js";
import { Lazy } from "./lazy.js";

export const MAX_FORMULA = 4000; // characters
const LONG = 60;
const MAX_DEPTH = 100; // of elements: browsers lay them out by recursion

export const temml = new Lazy(() => import("./temml.min.js"));
const clones = new Clones(500);

function depth(root) {
  let most = 0;
  const open = [[root, 1]];
  while (open.length) {
    const [node, at] = open.pop();
    most = Math.max(most, at);
    for (const child of node.children) open.push([child, at + 1]);
  }
  return most;
}

// The nodes of a formula, or null.
function build(engine, tex, isDisplay) {
  const holder = document.createElement("span");
  try {
    engine.render(tex, holder, {
      displayMode: isDisplay, throwOnError: true, trust: false, maxExpand: 200, maxSize: [20, 200],
    });
  } catch {
    return null;
  }
  return depth(holder) > MAX_DEPTH ? null : holder.firstElementChild;
}

// source: the formula with its marks.
export function formula(source, tex, isDisplay) {
  const kind = isDisplay ? " display" : tex.length > LONG ? " long" : "";
  const node = element("span", { class: `formula${kind}`, tabindex: kind ? "0" : null }, source);
  if (tex.length > MAX_FORMULA) return node;
  temml.fill(node, (engine) => {
    const made = clones.get(`${isDisplay} ${tex}`, () => build(engine, tex, isDisplay));
    if (made) node.replaceChildren(made);
  });
  return node;
}
