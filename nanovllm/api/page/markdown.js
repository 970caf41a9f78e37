// Markdown as DOM nodes: code, headings, lists, tables, quotes; inline.js has their content.
// Only what models often write. Other text is shown unchanged.

import { colour } from "./colours.js";
import { element } from "./dom.js";
import { inline } from "./inline.js";

const FENCE = /^\s*(`{3,}|~{3,})(?![^`]*`)\s*([\w+#.-]*)/;
const PART_OF_FENCE = /^\s*(?:`+|~+)$/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/s;
const TASK = /^\[([ xX])\]\s+/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const DIVIDER = /^\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?$/;
const PART_OF_DIVIDER = /^\|[\s|:-]*$/;
const BEFORE_FORMULA = /^\s*(?:[-*+]\s+|\d{1,9}[.)]\s+)?$/;
const MAX_LISTS = 12; // nesting depth
const MAX_QUOTES = 4;

async function copy(event) {
  const button = event.currentTarget;
  await navigator.clipboard.writeText(button.closest(".code").querySelector("code").textContent);
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

function codeBlock(language, lines, isClosed) {
  const code = element("code", {}, lines.join("\n"));
  if (isClosed) colour(code, language.toLowerCase());
  return element("div", { class: "code" },
    element("div", { class: "code-head" },
      element("span", {}, language || "text"),
      element("button", { type: "button", class: "quiet", onclick: copy }, "Copy")),
    element("pre", { tabindex: "0" }, code));
}

function cells(line) {
  return line.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/)
    .map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table([head, divider = "", ...rows]) {
  const sides = cells(divider).map((mark) => (mark.endsWith(":") ? (mark.startsWith(":") ? "middle" : "right") : null));
  const names = cells(head);
  const row = (tag, texts) => element("tr", {}, names.map((_, i) => element(tag, { class: sides[i] }, inline(texts[i] ?? ""))));
  return element("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Table" }, element("table", {},
    element("thead", {}, row("th", names)),
    element("tbody", {}, rows.map((line) => row("td", cells(line))))));
}

function item(text) {
  const task = TASK.exec(text);
  if (!task) return element("li", {}, inline(text));
  const box = element("input", { type: "checkbox", disabled: true, checked: task[1] !== " " });
  return element("li", { class: "task" }, element("label", {}, box, inline(text.slice(task[0].length))));
}

// A list, from lines that begin at its first item. Deeper items become lists within items.
function list(lines) {
  const roots = [];
  const open = []; // lists that can continue: {indent, node}
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (!match) { // the text of an item continues
      open.at(-1)?.node.lastElementChild?.append(" ", ...inline(line.trim()));
      continue;
    }
    const [, { length: indent }, mark, text] = match;
    while (open.length && open.at(-1).indent > indent) open.pop();
    const ordered = /\d/.test(mark);
    let here = open.at(-1);
    if (!here || (here.indent < indent - 1 && open.length < MAX_LISTS)) {
      const node = ordered ? element("ol", { start: parseInt(mark, 10) }) : element("ul");
      if (here) here.node.lastElementChild.append(node);
      else roots.push(node);
      here = { indent, node };
      open.push(here);
    }
    here.node.append(item(text));
  }
  return roots;
}

const closes = (line, fence) => line.trim().startsWith(fence) && PART_OF_FENCE.test(line);

// The end mark of a formula that continues on the next lines, or "".
function openFormula(line) {
  const square = line.lastIndexOf("\\[");
  if (square >= 0 && line[square - 1] !== "\\" && !line.includes("\\]", square)) return "\\]";
  const parts = line.split("$$");
  const isOpen = parts.length % 2 === 0 && (!parts.at(-1).trim() || BEFORE_FORMULA.test(parts.at(-2)));
  return isOpen ? "$$" : "";
}

// Groups of lines: {kind, lines, language, isClosed}. isOpen: the text grows, so that its last line
// can be a part of one.
function* blocks(text, isOpen) {
  let now = { kind: "", lines: [] };
  let fence = "";
  let indent = 0;
  let formula = ""; // the end of the one that is open
  const flush = function* (isClosed = true) {
    if (now.lines.length || now.kind === "code") yield { ...now, isClosed };
    now = { kind: "", lines: [] };
  };
  const all = text.split("\n");
  if (isOpen && PART_OF_FENCE.test(all.at(-1)) && !FENCE.test(all.at(-1))) all.pop();
  const isDivider = (i) => DIVIDER.test((all[i] ?? "").trim())
    || (isOpen && i >= all.length - 1 && all[i - 1].startsWith("|") && PART_OF_DIVIDER.test(all[i] || "|"));
  for (const [i, line] of all.entries()) {
    if (now.kind === "code") {
      if (closes(line, fence)) yield* flush();
      else now.lines.push(line.slice(Math.min(indent, line.length - line.trimStart().length)));
      continue;
    }
    if (formula && line.trim()) {
      now.lines.push(`${now.lines.pop()}\n${line}`);
      if (line.includes(formula)) formula = openFormula(line.slice(line.lastIndexOf(formula) + 2));
      continue;
    }
    formula = "";
    const opening = FENCE.exec(line);
    if (opening) {
      yield* flush();
      now = { kind: "code", lines: [], language: opening[2] };
      [fence, indent] = [opening[1], line.length - line.trimStart().length];
    } else if (!line.trim()) {
      if (now.kind !== "list" || !ITEM.test(all[i + 1] ?? "")) yield* flush();
    } else if (RULE.test(line) || HEADING.test(line)) {
      yield* flush();
      yield { kind: RULE.test(line) ? "rule" : "heading", lines: [line] };
    } else {
      const starts = ITEM.test(line) ? "list" : line.startsWith(">") ? "quote"
        : now.kind === "table" || (line.includes("|") && isDivider(i + 1)) ? "table" : "";
      if (starts !== now.kind && !(now.kind === "list" && starts === "" && /^\s/.test(line))) {
        yield* flush();
        now.kind = starts;
      }
      now.lines.push(line);
      formula = starts === "table" || starts === "quote" ? "" : openFormula(line);
    }
  }
  yield* flush(false);
}

function nodes({ kind, lines, language, isClosed }, depth) {
  if (kind === "code") return [codeBlock(language, lines, isClosed)];
  if (kind === "rule") return [element("hr")];
  if (kind === "list") return list(lines);
  if (kind === "table") return [table(lines)];
  if (kind === "quote") {
    const text = lines.map((line) => line.replace(/^>\s?/, "")).join("\n");
    return [element("blockquote", {}, depth < MAX_QUOTES ? render(text, false, depth + 1) : text)];
  }
  if (kind === "heading") {
    const [, marks, text] = HEADING.exec(lines[0]);
    return [element(`h${Math.min(marks.length + 2, 6)}`, {}, inline(text))];
  }
  return [element("p", {}, inline(lines.join("\n")))];
}

// isOpen: the text grows.
export function render(text, isOpen = false, depth = 0) {
  return [...blocks(text, isOpen)].flatMap((block) => nodes(block, depth));
}

// Shows a growing text. Complete paragraphs are created once, and unchanged nodes are kept:
// the reader's selection and scroll position stay.
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
    this.#replace(render(text.slice(this.fixed), true));
  }

  #replace(tail) {
    let same = 0;
    for (; same < tail.length && this.tail[same]?.isEqualNode(tail[same]); same++) {
      tail[same] = this.tail[same];
    }
    const [old, made] = [this.tail.slice(same), tail.slice(same)];
    const left = scroller(old[0])?.scrollLeft;
    for (const node of old) node.remove();
    this.node.append(...made);
    if (left && scroller(made[0])) scroller(made[0]).scrollLeft = left;
    this.tail = tail;
  }
}

const scroller = (node) => (node?.matches(".wide") ? node : node?.querySelector("pre"));

// Where the last complete paragraph ends: after a blank line outside of code, before plain text.
function boundary(text, from) {
  let at = from;
  let found = from;
  let fence = "";
  for (const line of text.slice(from).split("\n")) {
    if (fence) {
      if (closes(line, fence)) fence = "";
    } else fence = FENCE.exec(line)?.[1] ?? "";
    const next = at + line.length + 1;
    const follows = text[next];
    if (!line.trim() && !fence && follows && /[^\s\d*+-]/.test(follows)) found = next;
    at = next;
  }
  return found;
}
