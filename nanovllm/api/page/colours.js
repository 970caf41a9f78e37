// Colours of code, by highlight.js. Its tree of scopes becomes elements here.

import { Clones } from "./clones.js";
import { element } from "./dom.js";
import { Lazy } from "./lazy.js";

const MAX_DEPTH = 20; // of scopes: deeper ones keep this one's colour
const MAX_CODE = 30_000; // characters: longer code has no colours

const LONG_LINE = /[^\n]{1001}/; // some languages take quadratic time over a line
const clones = new Clones(20);

export const highlighter = new Lazy(() => import("./highlight.min.js"));

// The text of a tree, of any depth.
function text({ children }) {
  const open = [...children].reverse();
  let all = "";
  while (open.length) {
    const child = open.pop();
    if (typeof child === "string") all += child;
    else for (const one of [...child.children].reverse()) open.push(one);
  }
  return all;
}

function nodes(tree, depth = 0) {
  if (depth > MAX_DEPTH) return [text(tree)];
  return tree.children.flatMap((child) => {
    if (typeof child === "string") return child;
    const inner = nodes(child, depth + 1);
    if (!child.scope || child.scope.startsWith("language:")) return inner;
    return element("span", { class: `in-${child.scope.split(".")[0]}` }, ...inner);
  });
}

function build(engine, source, language) {
  const { _emitter: tree } = engine.highlight(source, { language, ignoreIllegals: true });
  const made = document.createDocumentFragment();
  made.append(...nodes(tree.rootNode));
  return made;
}

// Colours the text of `node`, if its language is known.
export function colour(node, language) {
  const source = node.textContent;
  if (!language || source.length > MAX_CODE || LONG_LINE.test(source)) return;
  highlighter.fill(node, (engine) => {
    if (!engine.getLanguage(language)) return;
    node.replaceChildren(clones.get(`${language} ${source}`, () => build(engine, source, language)));
  });
}
