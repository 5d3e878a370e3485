/**
 * Markdown to elements, for text that nobody vouches for.
 *
 * Only createElement and text nodes are used, never markup, so nothing in the text can become an element, an attribute
 * or a script. What is not understood stays as it is written. Blank lines, line ends and spaces are all kept.
 */

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)[^`]*$/;
const TITLE = /^(#{1,6}) +(.+?)( +#+)?$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)]) (.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const TABLE_RULE = /^\s*\|?\s*:?-{3,}:?\s*(\|\s*:?-{3,}:?\s*)*\|?\s*$/;
// code, strong, emphasis, struck out, [text](url), bare url
const SPAN = /(`+)([^]+?)\1(?!`)|\*\*(?=\S)([^]+?\S)\*\*|(?<![\w*])\*(?=[^\s*])([^*]*?[^\s*])\*(?![\w*])|(?<!\w)_(?=\S)([^_]*?\S)_(?!\w)|~~(?=\S)([^]+?\S)~~|\[([^\]\n]+)\]\((https?:\/\/[^\s()]+(?:\([^\s()]*\)[^\s()]*)*)\)|(https?:\/\/[^\s<>"'`]+[^\s<>"'`.,;:!?)\]])/g;

/** @typedef {{kind: string, source: string, lines?: string[], language?: string, isOpen?: boolean}} Block */

/** Cut a text into blocks; a block's `source` decides wholly how it looks. @returns {Block[]} */
export function parseBlocks(text) {
  const lines = text.split("\n");
  const blocks = [];
  let i = 0;
  const take = (kind, count, extra = {}) => {
    const taken = lines.slice(i, i + count);
    blocks.push({ kind, lines: taken, source: `${kind}\n${taken.join("\n")}`, ...extra });
    i += count;
  };
  while (i < lines.length) {
    const fence = FENCE.exec(lines[i]);
    if (fence) {
      let end = i + 1;
      while (end < lines.length && !isFenceEnd(lines[end], fence[1])) end += 1;
      take("code", Math.min(end + 1, lines.length) - i, { language: fence[2], isOpen: end >= lines.length });
    } else if (lines[i].trim() === "") take("blank", 1);
    else if (TITLE.test(lines[i])) take("title", 1);
    else if (RULE.test(lines[i])) take("rule", 1);
    else if (QUOTE.test(lines[i])) take("quote", count(lines, i, (line) => QUOTE.test(line)));
    else if (ITEM.test(lines[i])) take("list", count(lines, i, (line) => ITEM.test(line)));
    else if (lines[i].includes("|") && TABLE_RULE.test(lines[i + 1] ?? "") && (lines[i + 1] ?? "").includes("|")) {
      take("table", 2 + count(lines, i + 2, (line) => line.includes("|")));
    } else take("paragraph", 1);
  }
  return blocks;
}

/** Make the elements of a block. */
export function renderBlock(block) {
  return RENDERERS[block.kind](block);
}

const RENDERERS = {
  blank: () => element("div", "blank"),
  rule: () => document.createElement("hr"),
  paragraph: ({ lines }) => withSpans(element("p"), lines[0]),
  title({ lines }) {
    const [, marks, text] = TITLE.exec(lines[0]);
    const title = withSpans(element("p", "title"), text);
    title.dataset.level = String(marks.length);
    title.setAttribute("role", "heading");
    title.setAttribute("aria-level", String(Math.min(6, marks.length + 2)));
    return title;
  },
  quote: ({ lines }) => withSpans(element("blockquote"), lines.map((line) => QUOTE.exec(line)[1]).join("\n")),
  list({ lines }) {
    const list = element(/\d/.test(ITEM.exec(lines[0])[2]) ? "ol" : "ul");
    for (const line of lines) {
      const [, indent, marker, text] = ITEM.exec(line);
      const item = element("li");
      // the marker as it was written: a list that counts 3, 5, 7 must not read 1, 2, 3
      item.append(element("span", "marker", `${indent}${/\d/.test(marker) ? marker : "•"} `), withSpans(element("span"), text));
      list.append(item);
    }
    return list;
  },
  code({ lines, language, isOpen }) {
    const text = lines.slice(1, isOpen ? undefined : -1).join("\n");
    const figure = element("figure");
    const caption = element("figcaption", "", language || "code");
    const copy = element("button", "", "Copy");
    copy.type = "button";
    copy.addEventListener("click", () => copyText(text, copy));
    caption.append(copy);
    const pre = element("pre");
    pre.tabIndex = 0;
    pre.append(element("code", "", text));
    figure.append(caption, pre);
    return figure;
  },
  table({ lines }) {
    const table = element("table");
    for (const [index, line] of lines.entries()) {
      if (index === 1) continue;
      const row = table.insertRow();
      for (const cell of line.trim().replace(/^\||\|$/g, "").split("|")) {
        row.append(withSpans(element(index === 0 ? "th" : "td"), cell.trim()));
      }
    }
    return table;
  },
};

function isFenceEnd(line, opening) {
  const end = /^ {0,3}(`+|~+)\s*$/.exec(line);
  return end !== null && end[1][0] === opening[0] && end[1].length >= opening.length;
}

function count(lines, from, belongs) {
  let end = from;
  while (end < lines.length && belongs(lines[end])) end += 1;
  return end - from;
}

const SPAN_DEPTH = 6; // emphasis within emphasis; deeper ones stay as they are written
const LONGEST_SPANS = 4000; // characters; seeking pairs in a longer line could take long

function withSpans(parent, text, depth = 0) {
  let last = 0;
  for (const match of depth < SPAN_DEPTH && text.length <= LONGEST_SPANS ? text.matchAll(SPAN) : []) {
    parent.append(text.slice(last, match.index), spanOf(match, depth));
    last = match.index + match[0].length;
  }
  parent.append(text.slice(last));
  return parent;
}

function spanOf([whole, , code, strong, star, underscore, struck, linked, url, bare], depth) {
  if (code !== undefined) return element("code", "", code);
  if (strong !== undefined) return withSpans(element("strong"), strong, depth + 1);
  if (star !== undefined) return withSpans(element("em"), star, depth + 1);
  if (underscore !== undefined) return withSpans(element("em"), underscore, depth + 1);
  if (struck !== undefined) return withSpans(element("s"), struck, depth + 1);
  const link = element("a", "", linked ?? bare ?? whole);
  link.href = url ?? bare; // http or https, by SPAN
  link.rel = "noopener noreferrer nofollow";
  link.target = "_blank";
  link.title = link.href;
  return link;
}

/** An element with a class and a text. */
export function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

/** Copy, and say so on the button for a moment. */
export async function copyText(text, button) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => { button.textContent = label; }, 1200);
}
