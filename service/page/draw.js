// A model's text and a request's time, drawn. Text only ever becomes text nodes: no markup in it means anything.

import { duration, percent } from "./figures.js";

const OPENING = /^ {0,3}```[^`]*$/, CLOSING = /^ {0,3}``` *$/;
const MAY_OPEN = /^ {0,3}(`{0,2}|```[^`]*)$/, MAY_CLOSE = /^ {0,3}(`{0,2}|``` *)$/; // a line whose end has not come

/**
 * Paragraphs and code fences, as they stream in. Appends to the last text node, and never looks back: an answer of
 * thousands of tokens costs no more for each than a short one. The start of a line waits while it may become a fence.
 */
export class TextDrawing {
  constructor(root) {
    this.root = root;
    this.line = ""; // held back
    this.fresh = true; // nothing of this line has been drawn
    this.gap = 0; // line ends that wait for what follows: two of them end a paragraph
    this.code = false;
    this.node = null;
  }

  add(text) {
    const lines = text.split("\n");
    lines.forEach((piece, i) => this.piece(piece, i < lines.length - 1));
  }

  /** Nothing more comes: a line that was held back is what it is. */
  end() {
    if (!this.isFence(this.line)) this.draw(this.line);
    this.line = "";
  }

  isFence(line) {
    return (this.code ? CLOSING : OPENING).test(line);
  }

  mayBecomeFence(line) {
    return (this.code ? MAY_CLOSE : MAY_OPEN).test(line);
  }

  piece(text, ends) {
    if (this.fresh) {
      this.line += text;
      if (!ends && this.mayBecomeFence(this.line)) return;
      const line = this.line;
      this.line = "";
      if (ends && this.isFence(line)) {
        this.toggle();
        return;
      }
      this.draw(line);
    } else {
      this.draw(text);
    }
    this.fresh = ends;
    if (ends) this.gap += 1;
  }

  toggle() {
    this.code = !this.code;
    this.node = null;
    this.gap = 0;
    if (this.code) this.open();
  }

  draw(text) {
    if (!text) return;
    const ended = !this.code && this.gap > 1;
    if (!this.node || ended) this.open();
    else if (this.gap) this.node.appendData("\n".repeat(this.gap));
    this.gap = 0;
    this.node.appendData(text);
  }

  open() {
    const block = document.createElement(this.code ? "pre" : "p");
    if (this.code) block.tabIndex = 0; // a long line can be pushed by keys
    this.node = document.createTextNode("");
    block.append(this.node);
    this.root.append(block);
  }
}

/** details: an element with a summary, a .bar and a list. split: splitOf()'s. */
export function drawSplit(details, split, word) {
  details.querySelector("summary").textContent = word("went", { total: duration(split.total) });
  const bar = details.querySelector(".bar"), list = details.querySelector("ul");
  bar.replaceChildren();
  list.replaceChildren();
  for (const { name, seconds, share } of split.parts) {
    const piece = document.createElement("span");
    piece.dataset.part = name;
    piece.style.width = `${100 * share}%`;
    piece.title = `${name} ${duration(seconds)}`;
    bar.append(piece);
    const item = document.createElement("li"), swatch = document.createElement("i");
    swatch.dataset.part = name;
    item.title = word(`part_${name}`);
    item.className = share < 0.005 ? "small" : "";
    item.append(swatch, span(name, "name"), span(duration(seconds)), span(percent(share), "share"));
    list.append(item);
  }
  details.hidden = false;
}

function span(text, kind = "") {
  const found = document.createElement("span");
  found.textContent = text;
  found.className = kind;
  return found;
}
