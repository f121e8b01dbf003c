// One question and its answer on the page, from the first moment of waiting to the split of its time.

import { drawSplit, TextDrawing } from "./draw.js";
import { duration, Pace, rate, splitOf } from "./figures.js";
import { addressOf } from "./memory.js";
import { say } from "./words.js";

const CLOCK_MS = 100;
const seconds = () => performance.now() / 1e3;

export class TurnView {
  /** acts: { again(), show(id), copy(text, button, shown) }, for what its buttons and links do. */
  constructor(turn, word, acts) {
    this.turn = turn;
    this.word = word;
    this.acts = acts;
    this.root = document.querySelector("#turn").content.cloneNode(true).firstElementChild;
    this.find(".question").textContent = turn.question;
    this.answer = this.find(".answer");
    this.answer.ariaBusy = "true"; // a screen reader reads it when it is whole
    this.drawing = new TextDrawing(this.answer);
    this.pace = new Pace();
    this.undrawn = "";
    this.frame = null;
    say(this.root, word);
    this.find(".again").addEventListener("click", () => acts.again());
    this.find(".copy").addEventListener("click", (event) => acts.copy(turn.answer, event.target, this.answer));
    this.startS = seconds();
    this.clock = setInterval(() => this.drawFacts(), CLOCK_MS);
    this.drawFacts();
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  /** More of the answer. What comes between two pictures of the screen is drawn at one go. */
  text(piece) {
    this.pace.add(seconds());
    this.turn.answer += piece;
    this.undrawn += piece;
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  draw() {
    const following = atBottom();
    this.frame = null;
    this.drawing.add(this.undrawn);
    this.undrawn = "";
    if (following) toBottom();
  }

  /** The last token has come: one that is no text ends most answers. */
  ending() {
    this.pace.lastS = seconds();
  }

  /** It has ended, however: turn.ended says how. */
  end() {
    const following = atBottom();
    cancelAnimationFrame(this.frame);
    clearInterval(this.clock);
    this.endS = seconds();
    this.draw();
    this.drawing.end();
    this.answer.ariaBusy = "false";
    this.turn.ttft_s = this.pace.count ? this.pace.firstS - this.startS : null;
    this.turn.took_s = this.endS - this.startS;
    this.turn.tokens_per_s = this.pace.whole(this.turn.usage?.completion_tokens ?? 0); // pieces are no tokens
    this.drawFacts();
    this.root.dataset.ended = this.turn.ended;
    if (this.turn.usage?.timing) this.split(this.turn.usage.timing);
    if (following) toBottom();
  }

  split(timing) {
    const following = atBottom();
    this.find(".split").open = this.root === this.root.parentElement?.lastElementChild;
    drawSplit(this.find(".split"), splitOf(timing), this.word);
    if (following) toBottom();
  }

  drawFacts() {
    const { turn, word, pace } = this, now = this.endS ?? seconds(), done = turn.ended !== null;
    const facts = [done ? duration(now - this.startS) : `${(now - this.startS).toFixed(1)} s`];
    if (pace.count) facts.push(word("ttft", { time: duration(pace.firstS - this.startS) }));
    else if (!done) facts.push(word("waiting"));
    const perSecond = done ? turn.tokens_per_s : pace.now(now);
    if (perSecond) facts.push(word("speed", { rate: `${done ? "" : "≈ "}${rate(perSecond)}` }));
    if (turn.usage) {
      const { prompt_tokens: prompt, completion_tokens: answer, prompt_tokens_details: more } = turn.usage;
      facts.push(word(more?.cached_tokens ? "cached" : "tokens", { prompt, answer, cached: more?.cached_tokens }));
    } else if (pace.count) {
      facts.push(word(done ? "received" : "pieces", { count: pace.count }));
    }
    if (done) facts.push(word(`end_${turn.ended}`));
    const marks = [[turn.degraded, "degraded_to"], [turn.cache, "cache"]].filter(([how]) => how);
    this.find(".facts").replaceChildren(
      ...facts.map((text) => mark("span", text)),
      ...marks.map(([how, name]) => mark("b", word(name, { how }))),
      ...(done && turn.id ? [this.link()] : []),
    );
  }

  link() {
    const link = mark("a", this.turn.id.length > 14 ? `${this.turn.id.slice(0, 12)}…` : this.turn.id);
    link.title = link.ariaLabel = this.turn.id;
    link.href = addressOf(this.turn.id);
    link.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return; // a tab of its own, as everywhere
      event.preventDefault(); // a plain visit could not bring the key along
      this.acts.show(this.turn.id);
    });
    return link;
  }

  /** What went wrong, in a sentence; retryS: seconds after which it can be sent again, null: never. */
  notice(sentence, retryS) {
    const place = this.find(".notice"), following = atBottom();
    place.querySelector("span").textContent = sentence;
    place.querySelector("button")?.remove();
    place.hidden = false;
    if (retryS !== null) place.append(this.retryButton(seconds() + retryS));
    if (following) toBottom();
  }

  retryButton(fromS) {
    const button = mark("button", "");
    button.type = "button";
    button.addEventListener("click", () => this.acts.again());
    const count = () => {
      const left = Math.ceil(fromS - seconds());
      button.disabled = left > 0;
      button.textContent = this.word(left > 0 ? "again_in" : "again", { wait: `${left} s` });
      if (left > 0 && this.root.isConnected) setTimeout(count, 1000 * (fromS - seconds() - (left - 1)) + 5);
    };
    count();
    return button;
  }

  remove() {
    clearInterval(this.clock);
    cancelAnimationFrame(this.frame);
    this.root.remove();
  }
}

function mark(kind, text) {
  const found = document.createElement(kind);
  found.textContent = text;
  return found;
}

/** Whether the reader follows the end, and did not scroll up to read. */
export function atBottom() {
  const page = document.documentElement;
  return page.scrollHeight - page.clientHeight - page.scrollTop < 40;
}

export function toBottom() {
  document.documentElement.scrollTop = document.documentElement.scrollHeight;
}
