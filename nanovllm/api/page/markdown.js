// Markdown as DOM nodes: code, headings, lists, tables, quotes, emphasis, links.
// Only what models write often. Text that is no markup is shown as it is.

import { element } from "./dom.js";

const INLINE = /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|\*\*([^\s*](?:[^*]|\*(?!\*))*?)\*\*|(?<![\w*])\*([^\s*][^*\n]*?)\*(?![\w*])|\[([^\]\n]{1,300})\]\((https?:\/\/[^\s()<>]{1,2000})\)/g;
const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const MAX_INLINE = 6000; // longer paragraphs are shown as they are

function inline(text, depth = 0) {
  if (text.length > MAX_INLINE || depth > 3) return [text];
  const nodes = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    nodes.push(text.slice(at, match.index));
    at = match.index + match[0].length;
    const [, , code, strong, soft, label, link] = match;
    if (code !== undefined) nodes.push(element("code", {}, code));
    else if (strong !== undefined) nodes.push(element("strong", {}, inline(strong, depth + 1)));
    else if (soft !== undefined) nodes.push(element("em", {}, inline(soft, depth + 1)));
    else nodes.push(element("a", { href: link, target: "_blank", rel: "noopener noreferrer" }, label));
  }
  nodes.push(text.slice(at));
  return nodes;
}

async function copy(event) {
  const button = event.currentTarget;
  await navigator.clipboard.writeText(button.closest(".code").querySelector("code").textContent);
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

function codeBlock(language, lines) {
  return element("div", { class: "code" },
    element("div", { class: "code-head" },
      element("span", {}, language || "text"),
      element("button", { type: "button", class: "quiet", onclick: copy }, "Copy")),
    element("pre", { tabindex: "0" }, element("code", {}, lines.join("\n"))));
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

function table(lines) {
  const row = (tag) => (line) => element("tr", {}, cells(line).map((cell) => element(tag, {}, inline(cell))));
  return element("div", { class: "wide", tabindex: "0" }, element("table", {},
    element("thead", {}, row("th")(lines[0])),
    element("tbody", {}, lines.slice(2).map(row("td")))));
}

// A list, from lines that begin at its first item. Deeper items become lists within items.
function list(lines) {
  const roots = [];
  const open = []; // lists that can go on: {indent, node}
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (!match) { // the text of an item goes on
      open.at(-1)?.node.lastElementChild?.append(" ", ...inline(line.trim()));
      continue;
    }
    const [, { length: indent }, mark, text] = match;
    while (open.length && open.at(-1).indent > indent) open.pop();
    const ordered = /\d/.test(mark);
    let here = open.at(-1);
    if (!here || here.indent < indent - 1) {
      const node = ordered ? element("ol", { start: parseInt(mark, 10) }) : element("ul");
      if (here) here.node.lastElementChild.append(node);
      else roots.push(node);
      here = { indent, node };
      open.push(here);
    }
    here.node.append(element("li", {}, inline(text)));
  }
  return roots;
}

// Groups of lines: [kind, lines, language].
function* blocks(text) {
  let kind = "";
  let lines = [];
  let fence = "";
  let language = "";
  const flush = function* () {
    if (lines.length || kind === "code") yield [kind, lines, language];
    [kind, lines] = ["", []];
  };
  const all = text.split("\n");
  for (const [i, line] of all.entries()) {
    if (kind === "code") {
      if (line.trim().startsWith(fence) && !line.trim().slice(fence.length).trim()) yield* flush();
      else lines.push(line);
      continue;
    }
    const opening = FENCE.exec(line);
    if (opening) {
      yield* flush();
      [kind, fence, language] = ["code", opening[1], opening[2]];
    } else if (!line.trim()) {
      if (kind !== "list" || !ITEM.test(all[i + 1] ?? "")) yield* flush();
    } else if (RULE.test(line) || HEADING.test(line)) {
      yield* flush();
      yield [RULE.test(line) ? "rule" : "heading", [line]];
    } else {
      const starts = ITEM.test(line) ? "list" : line.startsWith(">") ? "quote"
        : kind === "table" || (line.includes("|") && DIVIDER.test(all[i + 1] ?? "")) ? "table" : "";
      if (starts !== kind && !(kind === "list" && starts === "" && /^\s/.test(line))) {
        yield* flush();
        kind = starts;
      }
      lines.push(line);
    }
  }
  yield* flush();
}

function nodes([kind, lines, language]) {
  if (kind === "code") return [codeBlock(language, lines)];
  if (kind === "rule") return [element("hr")];
  if (kind === "list") return list(lines);
  if (kind === "table" && lines.length > 1) return [table(lines)];
  if (kind === "quote") {
    return [element("blockquote", {}, inline(lines.map((line) => line.replace(/^>\s?/, "")).join("\n")))];
  }
  if (kind === "heading") {
    const [, marks, text] = HEADING.exec(lines[0]);
    return [element(`h${Math.min(marks.length + 2, 6)}`, {}, inline(text))];
  }
  return [element("p", {}, inline(lines.join("\n")))];
}

export function render(text) {
  return [...blocks(text)].flatMap(nodes);
}

// Shows a text that grows. Paragraphs that are complete are made once.
export class Growing {
  constructor(node) {
    this.node = node;
    this.fixed = 0; // characters whose nodes are final
    this.tail = [];
  }

  show(text) {
    const end = boundary(text, this.fixed);
    if (end > this.fixed) {
      this.#replace(render(text.slice(this.fixed, end)));
      this.tail = [];
      this.fixed = end;
    }
    this.#replace(render(text.slice(this.fixed)));
  }

  #replace(tail) {
    for (const node of this.tail) node.remove();
    this.node.append(...tail);
    this.tail = tail;
  }
}

// Where the last complete paragraph ends: after a blank line outside of code, before plain text.
function boundary(text, from) {
  let at = from;
  let found = from;
  let fence = "";
  for (const line of text.slice(from).split("\n")) {
    const mark = FENCE.exec(line)?.[1];
    if (mark && !fence) fence = mark;
    else if (fence && line.trim().startsWith(fence)) fence = "";
    const next = at + line.length + 1;
    const follows = text[next];
    if (!line.trim() && !fence && follows && /[^\s\d*+-]/.test(follows)) found = next;
    at = next;
  }
  return found;
}
