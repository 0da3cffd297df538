// Markdown to elements, for the part of it that models write. HTML in it stays text.
// Source: CommonMark 0.31 and GitHub's tables, simplified: a line break in a paragraph is a line break.

import { copyButton, element } from "./dom.js";

const MAX_DEPTH = 8;

const FENCE = /^( {0,3})(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+)(\S.*)?$/;
const TABLE_RULE = /^\s*(?:\|\s*)?:?-+:?\s*(?:\|\s*:?-+:?\s*)*(?:\|\s*)?$/;

/** Show `text` in `container`; elements of blocks that are as they were stay, so a growing text is cheap. */
export function showMarkdown(container, text) {
  const shown = container.shownBlocks ?? [];
  const blocks = splitBlocks(text.split(/\r\n|\n|\r/));
  let same = 0;
  while (same < shown.length && same < blocks.length && shown[same].source === blocks[same].source) same += 1;
  if (same < blocks.length && growsCode(shown[same], blocks[same])) {
    container.children[same].querySelector("code").textContent = blocks[same].code;
    same += 1;
  }
  while (container.children.length > same) container.lastChild.remove();
  for (const block of blocks.slice(same)) container.append(renderBlock(block, 0));
  container.shownBlocks = blocks;
}

// The same element goes on, so that a selection in it and the focus on its button survive.
function growsCode(shown, block) {
  return shown?.kind === "code" && block.kind === "code" && shown.language === block.language;
}

/** Blocks of lines: {kind, source, ...}. */
function splitBlocks(lines) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const start = at;
    const block = readCode(lines, at) ?? readHeading(lines, at) ?? readQuote(lines, at) ?? readList(lines, at)
      ?? readTable(lines, at) ?? readParagraph(lines, at);
    at = block.end;
    blocks.push({ ...block, source: lines.slice(start, at).join("\n") });
  }
  return blocks;
}

function readCode(lines, at) {
  const opened = FENCE.exec(lines[at]);
  if (!opened) return null;
  const [, indent, fence, language] = opened;
  const closing = new RegExp(`^ {0,3}\\${fence[0]}{${fence.length},}\\s*$`);
  const margin = new RegExp(`^ {0,${indent.length}}`);
  let end = at + 1;
  while (end < lines.length && !closing.test(lines[end])) end += 1;
  const code = lines.slice(at + 1, end).map((line) => line.replace(margin, "")).join("\n");
  return { kind: "code", code, language: language.trim().split(/\s/)[0], end: Math.min(end + 1, lines.length) };
}

function readHeading(lines, at) {
  if (RULE.test(lines[at])) return { kind: "rule", end: at + 1 };
  const found = HEADING.exec(lines[at]);
  return found && { kind: "heading", level: found[1].length, text: found[2].trim(), end: at + 1 };
}

function readQuote(lines, at) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  return end === at ? null : { kind: "quote", lines: lines.slice(at, end).map((line) => QUOTE.exec(line)[1]), end };
}

function readList(lines, at) {
  const first = ITEM.exec(lines[at]);
  if (!first) return null;
  const ordered = /\d/.test(first[2]);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const found = ITEM.exec(lines[end]);
    if (!found || RULE.test(lines[end]) || /\d/.test(found[2]) !== ordered || found[1].length > first[1].length + 1) break;
    const width = found[1].length + found[2].length + (found[4] && found[3].length <= 4 ? found[3].length : 1);
    const item = readItem(lines, end, { ...found, width });
    items.push(item.lines);
    end = item.end;
  }
  return { kind: "list", ordered, start: ordered ? Number.parseInt(first[2], 10) : 1, items, end };
}

// An item goes on with what is indented below it, and with lines of its own paragraph that are not.
function readItem(lines, at, { 1: indent, 4: text, width }) {
  const taken = [text ?? ""];
  const inside = (line) => line.length - line.trimStart().length > indent.length + 1 || /^\t/.test(line);
  let end = at + 1;
  while (end < lines.length) {
    const line = lines[end];
    const isLazy = line.trim() && lines[end - 1].trim() && !startsBlock(line);
    const isBlank = !line.trim() && end + 1 < lines.length && inside(lines[end + 1]);
    if (!(isBlank || isLazy || (line.trim() && inside(line)))) break;
    taken.push(line.slice(Math.min(width, line.length - line.trimStart().length)));
    end += 1;
  }
  while (end < lines.length && !lines[end].trim() && ITEM.test(lines[end + 1] ?? "")) end += 1;
  return { lines: taken, end };
}

function readTable(lines, at) {
  if (!lines[at].includes("|") || !TABLE_RULE.test(lines[at + 1] ?? "") || !lines[at + 1].includes("-")) return null;
  const head = cells(lines[at]);
  if (cells(lines[at + 1]).length !== head.length) return null;
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  return { kind: "table", head, rows: lines.slice(at + 2, end).map(cells), end };
}

function cells(line) {
  return line.trim().replace(/^\|/, "").replace(/\|$/, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function readParagraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !startsBlock(lines[end])) end += 1;
  return { kind: "paragraph", text: lines.slice(at, end).map((line) => line.trim()).join("\n"), end };
}

function startsBlock(line) {
  return [FENCE, HEADING, RULE, QUOTE, ITEM].some((pattern) => pattern.test(line));
}

const RENDERERS = {
  code: renderCode,
  heading: ({ level, text }) => element(`h${Math.min(level + 2, 6)}`, {}, inline(text)),
  rule: () => element("hr"),
  quote: ({ lines }, depth) => element("blockquote", {}, renderLines(lines, depth)),
  list: renderList,
  table: renderTable,
  paragraph: ({ text }) => element("p", {}, inline(text)),
};

function renderBlock(block, depth) {
  return RENDERERS[block.kind](block, depth);
}

function renderLines(lines, depth) {
  if (depth >= MAX_DEPTH) return [element("p", { text: lines.join("\n") })];
  return splitBlocks(lines).map((block) => renderBlock(block, depth + 1));
}

function renderCode({ code, language }) {
  const shown = element("code", { text: code });
  const bar = element("div", { class: "bar" }, element("span", { text: language || "text" }));
  bar.append(copyButton("Copy the code", () => shown.textContent));
  return element("div", { class: "code" }, bar, element("pre", { tabindex: "0" }, shown));
}

function renderList({ ordered, start, items }, depth) {
  const list = element(ordered ? "ol" : "ul", ordered && start !== 1 ? { start: String(start) } : {});
  for (const lines of items) {
    const [first, ...rest] = renderLines(lines, depth);
    // A short item is a line of its own, not a paragraph.
    const isText = first?.tagName === "P" && !rest.some((part) => part.tagName === "P");
    list.append(element("li", {}, isText ? [...first.childNodes] : first ?? [], rest));
  }
  return list;
}

function renderTable({ head, rows }) {
  const row = (tag, texts) => element("tr", {}, head.map((_, i) => element(tag, {}, inline(texts[i] ?? ""))));
  const table = element("table", {}, element("thead", {}, row("th", head)));
  table.append(element("tbody", {}, rows.map((texts) => row("td", texts))));
  return element("div", { class: "table", tabindex: "0" }, table);
}

const LINK = /\[([^[\]\n]{1,400})\]\((https?:\/\/[^\s()<>]{1,1000}(?:\([^\s()<>]{0,200}\)[^\s()<>]{0,400})?)\)/iy;
const BARE = /https?:\/\/[^\s<>"'`\\^{|}]{1,1000}/iy;
const ESCAPED = /\\([!-/:-@[-`{-~])/y;
const STYLES = [["***", ["strong", "em"]], ["**", ["strong"]], ["__", ["strong"]], ["~~", ["del"]], ["*", ["em"]], ["_", ["em"]]];

/** Elements and strings of one paragraph's text. */
function inline(text, { depth = 0, inLink = false } = {}) {
  const found = [];
  // Marks that were searched for in vain: the rest of the text is not searched for them again.
  const vain = new Set();
  let plain = "";
  let at = 0;
  const add = (node, length) => {
    if (plain) found.push(plain);
    plain = "";
    found.push(node);
    at += length;
  };
  while (at < text.length) {
    const special = matchAt(text, at, { vain, depth, inLink });
    if (special?.node) add(special.node, special.length);
    else {
      plain += special?.text ?? text[at];
      at += special?.length ?? 1;
    }
  }
  if (plain) found.push(plain);
  return found;
}

/** What stands at a place: {node, length}, {text, length}, or nothing of note. */
function matchAt(text, at, { vain, depth, inLink }) {
  switch (text[at]) {
    case "\n":
      return { node: element("br"), length: 1 };
    case "\\":
      ESCAPED.lastIndex = at;
      return ESCAPED.test(text) ? { text: text[at + 1], length: 2 } : null;
    case "`":
      return codeAt(text, at, vain);
    case "[":
      return inLink ? null : linkAt(text, at);
    case "h":
    case "H":
      return inLink || /\w/.test(text[at - 1] ?? "") ? null : bareLinkAt(text, at);
    case "*":
    case "_":
    case "~":
      return depth < MAX_DEPTH ? styledAt(text, at, { vain, depth, inLink }) : null;
    default:
      return null;
  }
}

function codeAt(text, at, vain) {
  const [ticks] = /^`+/.exec(text.slice(at, at + 32));
  const asText = { text: ticks, length: ticks.length };
  if (vain.has(ticks)) return asText;
  let end = text.indexOf(ticks, at + ticks.length);
  while (end >= 0 && text[end + ticks.length] === "`") {
    while (text[end] === "`") end += 1;
    end = text.indexOf(ticks, end);
  }
  if (end < 0) {
    vain.add(ticks);
    return asText;
  }
  const code = text.slice(at + ticks.length, end).replaceAll("\n", " ");
  const isPadded = code.startsWith(" ") && code.endsWith(" ") && code.trim();
  const trimmed = isPadded ? code.slice(1, -1) : code;
  return { node: element("code", { text: trimmed }), length: end + ticks.length - at };
}

function linkAt(text, at) {
  LINK.lastIndex = at;
  const found = LINK.exec(text);
  if (!found) return null;
  return { node: anchor(found[2], inline(found[1], { inLink: true })), length: found[0].length };
}

function bareLinkAt(text, at) {
  BARE.lastIndex = at;
  const url = BARE.exec(text)?.[0].replace(/[.,:;!?*_~\])]+$/, "");
  return url ? { node: anchor(url, [url]), length: url.length } : null;
}

// Both patterns let http and https through and nothing else.
function anchor(address, children) {
  return element("a", { href: address, title: address, target: "_blank", rel: "noopener noreferrer" }, children);
}

function styledAt(text, at, { vain, depth, inLink }) {
  for (const [mark, tags] of STYLES) {
    if (!text.startsWith(mark, at) || vain.has(mark) || !opens(text, at, mark)) continue;
    const end = closingAt(text, at + mark.length, mark);
    if (end < 0) {
      vain.add(mark);
      continue;
    }
    const inner = inline(text.slice(at + mark.length, end), { depth: depth + 1, inLink });
    const node = tags.reduceRight((children, tag) => [element(tag, {}, children)], inner)[0];
    return { node, length: end + mark.length - at };
  }
  const [run] = /^[*_~]+/.exec(text.slice(at, at + 64));
  return { text: run, length: run.length };
}

function opens(text, at, mark) {
  const next = text[at + mark.length] ?? " ";
  return /\S/.test(next) && next !== mark[0] && !(mark[0] === "_" && /\w/.test(text[at - 1] ?? ""));
}

function closingAt(text, from, mark) {
  let end = text.indexOf(mark, from + 1);
  while (end >= 0) {
    const after = text[end + mark.length] ?? " ";
    const isAlone = after !== mark[0] && text[end - 1] !== mark[0];
    if (isAlone && /\S/.test(text[end - 1]) && text[end - 1] !== "\\" && !(mark[0] === "_" && /\w/.test(after))) return end;
    while (text[end] === mark[0]) end += 1;
    end = text.indexOf(mark, end);
  }
  return -1;
}
