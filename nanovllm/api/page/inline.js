// Markup within a paragraph: code, emphasis, strike-through, links, formulas.
// Other text is shown unchanged. Every mark is searched for once: linear time.

import { element } from "./dom.js";
import { MAX_FORMULA, formula } from "./formulas.js";

const MAX_INLINE = 20_000; // longer paragraphs are shown as plain text
const MAX_DEPTH = 4; // of emphasis; the label of a link is one deeper
const START = /[\\`*~$[<]|(?<!\w)https?:\/\//g;
const ESCAPED = /\\([!-/:-@[-`{-~])/y;
const RUN = /`+|\*+|~+|\$+/y;
const LABELLED = /\[([^[\]\n]{1,300})\]\((https?:\/\/(?:[^\s()<>]|\([^\s()<>]{0,200}\)){1,2000})\)/y;
const ANGLED = /<(https?:\/\/[^\s<>]{1,2000})>/y;
const BARE = /https?:\/\/[^\s<>"`|。，、；）」』]+/y;
const EMPHASIS = { // how many marks: [their end, the tags]
  "*": [/(?:(?<![\s*])|(?<=[^\s*]\*\*))\*(?![\w*])/g, ["em"]],
  "**": [/(?<!\s)\*\*(?!\*)/g, ["strong"]],
  "***": [/(?<!\s)\*\*\*/g, ["strong", "em"]],
  "~~": [/(?<!\s)~~(?!~)/g, ["del"]],
};
const NEWLINE = /\n/g;
const DOLLAR = /(?<!\\)\$/g;
const DOLLARS = /(?<!\\)\$\$/g;
const ROUND = /\\\)/g;
const SQUARE = /(?<!\\)\\\]/g;
const WORD = /(?:^|[\s(])[A-Za-z]{2,}/;
const TEXT = /\\(?:text|mathrm|operatorname)\w*\s*\{[^{}]*\}/g;

// Finds the next place of a mark. Searches go forward, so a place is found only once.
class Places {
  constructor(text) {
    this.text = text;
    this.found = new Map();
  }

  next(mark, from) {
    const before = this.found.get(mark.source);
    if (before !== undefined && before >= from) return before;
    mark.lastIndex = from;
    const at = mark.exec(this.text)?.index ?? Infinity;
    this.found.set(mark.source, at);
    return at;
  }
}

function at(pattern, text, from) {
  pattern.lastIndex = from;
  return pattern.exec(text);
}

function link(href, label) {
  if (!URL.canParse(href)) return null;
  return element("a", { href, target: "_blank", rel: "noopener noreferrer" }, label);
}

// Punctuation after a URL is not part of it, nor is a bracket that was opened before it.
function trimmed(address) {
  let end = address.length;
  const count = { "(": 0, ")": 0, "[": 0, "]": 0 };
  for (const sign of address) if (sign in count) count[sign] += 1;
  for (; end > 0; end--) {
    const sign = address[end - 1];
    const opening = { ")": "(", "]": "[" }[sign];
    if (opening ? count[sign] <= count[opening] : !/[.,;:!?'*_~$\\]/.test(sign)) break;
    if (sign in count) count[sign] -= 1;
  }
  return address.slice(0, end);
}

// Each reader returns [node or text, where it ends], or null if there is no markup.

function readCode({ text, places }, from, run) {
  const inside = from + run.length;
  if (run.length > 9) return [run, inside];
  const end = places.next(new RegExp(`(?<!\`)\`{${run.length}}(?!\`)`, "g"), inside);
  if (end === Infinity) return [run, inside];
  const code = text.slice(inside, end);
  const isPadded = code.startsWith(" ") && code.endsWith(" ") && code.trim();
  return [element("code", {}, isPadded ? code.slice(1, -1) : code), end + run.length];
}

function readEmphasis({ text, places, depth }, from, run) {
  const inside = from + run.length;
  const [mark, tags] = EMPHASIS[run] ?? [];
  const isInWord = run === "*" && /\w/.test(text[from - 1] ?? "");
  if (!mark || depth >= MAX_DEPTH || isInWord || /^\s?$/.test(text[inside] ?? "")) return [run, inside];
  const end = places.next(mark, inside + 1);
  const content = end === Infinity ? "" : text.slice(inside, end);
  if (!content || (run === "*" && places.next(NEWLINE, inside) < end)) return [run, inside];
  const node = tags.reduce((children, tag) => [element(tag, {}, children)], inline(content, depth + 1));
  return [node[0], end + run.length];
}

function isAmount(tex) {
  return /^\d/.test(tex) && WORD.test(tex.replace(TEXT, ""));
}

function readDollar({ text, places }, from) {
  const inside = from + 1;
  const end = places.next(DOLLAR, inside);
  const tex = end - inside <= MAX_FORMULA ? text.slice(inside, end) : "";
  const isFormula = tex && !/^\s|\s$|[\n`]/.test(tex) && !/[\w$]/.test(text[end + 1] ?? "")
    && !/\w/.test(text[from - 1] ?? "") && !isAmount(tex);
  return isFormula ? [formula(text.slice(from, end + 1), tex, false), end + 1] : ["$", inside];
}

// Between two-character marks. If the end is missing, all of it stays text.
function readFormula({ text, places }, from, mark, isDisplay) {
  const inside = from + 2;
  const end = places.next(mark, inside);
  if (end === Infinity) {
    const begins = isDisplay && (/(?:^|\n)\s*$/.test(text.slice(Math.max(0, from - 20), from)) || text[inside] === "\n");
    return begins ? [text.slice(from), text.length] : [text.slice(from, inside), inside];
  }
  const tex = text.slice(inside, end);
  if (!tex.trim() || tex.length > MAX_FORMULA) return [text.slice(from, inside), inside];
  return [formula(text.slice(from, end + 2), tex.trim(), isDisplay), end + 2];
}

function readBackslash(state, from) {
  const next = state.text[from + 1];
  if (next === "(") return readFormula(state, from, ROUND, false);
  if (next === "[") return readFormula(state, from, SQUARE, true);
  const escaped = at(ESCAPED, state.text, from);
  if (!escaped || next === ")" || next === "]") return ["\\", from + 1];
  return [escaped[1], from + 2];
}

function readLink({ text, depth }, from) {
  const sign = text[from];
  const found = depth <= MAX_DEPTH && at(sign === "[" ? LABELLED : sign === "<" ? ANGLED : BARE, text, from);
  if (!found) return [sign, from + 1];
  if (sign === "[") {
    return [link(found[2], inline(found[1], MAX_DEPTH + 1)) ?? found[0], from + found[0].length];
  }
  if (sign === "<") return [link(found[1], found[1]) ?? found[0], from + found[0].length];
  const address = trimmed(found[0]);
  if (found[0].length > 2000) return [found[0], from + found[0].length];
  return [link(address, address) ?? address, from + address.length];
}

function read(state, from) {
  const sign = state.text[from];
  if (sign === "\\") return readBackslash(state, from);
  if ("[<h".includes(sign)) return readLink(state, from);
  const [run] = at(RUN, state.text, from);
  if (sign === "`") return readCode(state, from, run);
  if (sign !== "$") return readEmphasis(state, from, run);
  if (run.length === 1) return readDollar(state, from);
  return run.length === 2 ? readFormula(state, from, DOLLARS, true) : [run, from + run.length];
}

export function inline(text, depth = 0) {
  if (text.length > MAX_INLINE) return [text];
  const state = { text, depth, places: new Places(text) };
  const nodes = [];
  let plain = 0; // where the text begins that is not in `nodes`
  for (let from = 0; ;) {
    START.lastIndex = from;
    const start = START.exec(text)?.index;
    if (start === undefined) break;
    const [node, end] = read(state, start);
    if (typeof node !== "string" || node !== text.slice(start, end)) {
      const isAlone = typeof node !== "string" && node.matches(".display");
      const before = text.slice(plain, start);
      nodes.push(isAlone ? before.trimEnd() : before, node);
      plain = isAlone && text[end] === "\n" ? end + 1 : end;
    }
    from = end;
  }
  nodes.push(text.slice(plain));
  return nodes.filter((node) => node !== "");
}
