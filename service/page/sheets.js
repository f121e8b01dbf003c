// The dialogs: text to read and to copy, and help. And what is taken along: copies and files.

import { PARTS } from "./figures.js";

export class Sheets {
  constructor(word) {
    this.word = word;
    this.sheet = document.querySelector("#sheet");
    this.help = document.querySelector("#help");
    for (const dialog of [this.sheet, this.help]) {
      dialog.querySelector(".close").addEventListener("click", () => dialog.close());
    }
    const text = this.sheet.querySelector("pre");
    this.sheet.querySelector(".copy").addEventListener("click", (event) => this.copy(text.textContent, event.target, text));
    rows(this.help.querySelector("#help-keys"), word("keys"));
    rows(this.help.querySelector("#help-now"), word("now"));
    rows(this.help.querySelector("#help-parts"), PARTS.map((name) => [name, word(`part_${name}`)]));
  }

  get open() {
    return this.sheet.open || this.help.open;
  }

  show(title, text) {
    this.sheet.querySelector("h2").textContent = title;
    this.sheet.querySelector("pre").textContent = text;
    this.sheet.showModal();
  }

  /** button: says that it was done. shown: the element with the text. */
  async copy(text, button, shown) {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = this.word("copied");
      setTimeout(() => (button.textContent = this.word("copy")), 1500);
    } catch {
      getSelection().selectAllChildren(shown); // no clipboard without HTTPS: selected, for the person's own Ctrl-C
    }
  }
}

function rows(list, pairs) {
  pairs.flat().forEach((text, i) => {
    const cell = document.createElement(i % 2 ? "dd" : "dt");
    cell.textContent = text;
    list.append(cell);
  });
}

export function saveAs(name, data) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(data, null, 2)], { type: "application/json" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
