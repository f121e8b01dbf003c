// Numbers for people, and what they are made of. Nothing here knows the page.

/** The parts of a request's time, in the order in which they happen; the rest, that none accounts for, is the last. */
export const PARTS = ["receive", "route", "parse", "cache", "admit", "tokenize", "fallback", "queue", "prefill", "decode",
  "between", "deliver", "unexplained"];

/** Seconds in the unit in which they have three digits or so. */
export function duration(seconds) {
  if (!(seconds > 0)) return "0 ms";
  if (seconds < 0.1) return `${(1e3 * seconds).toFixed(seconds < 0.01 ? 2 : 1)} ms`;
  if (seconds < 0.9995) return `${(1e3 * seconds).toFixed(0)} ms`;
  if (seconds < 59.95) return `${seconds.toFixed(seconds < 9.995 ? 2 : 1)} s`;
  const whole = Math.round(seconds);
  return `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

/** Of what is foretold, or still runs: no more digits than it deserves. */
export function roughly(seconds) {
  if (seconds < 0.995) return `${Math.round(1e3 * seconds)} ms`;
  return seconds < 9.95 ? `${seconds.toFixed(1)} s` : duration(Math.round(seconds)).replace(/\.0 s$/, " s");
}

export function rate(perSecond) {
  return perSecond.toFixed(perSecond < 99.95 ? 1 : 0);
}

export function percent(share) {
  return `${(100 * share).toFixed(1)} %`;
}

/**
 * A request's time in its parts, in the order in which they happen: { total, parts: [{ name, seconds, share }] }.
 * Shares are of the parts' sum, so that a bar of them is full. Parts that this page does not know come before the
 * unexplained rest, which may be a rounding below zero: nothing is drawn of that.
 */
export function splitOf(timing) {
  const { total, unexplained = 0, ...rest } = timing;
  const known = PARTS.filter((name) => name in rest), others = Object.keys(rest).filter((name) => !known.includes(name));
  const parts = [...known, ...others].map((name) => ({ name, seconds: Math.max(rest[name], 0) }));
  parts.push({ name: "unexplained", seconds: Math.max(unexplained, 0) });
  const sum = parts.reduce((all, part) => all + part.seconds, 0);
  return { total, parts: parts.map((part) => ({ ...part, share: sum ? part.seconds / sum : 0 })) };
}

/** The same from what /debug/requests tells of a request that has no usage, since it ended early. */
export function timingOf(facts) {
  const mine = Object.entries(facts).filter(([name]) => name.startsWith("t_") && name !== "t_send_blocked");
  return Object.fromEntries(mine.map(([name, seconds]) => [name.slice(2), seconds]));
}

/** How quickly pieces come: over the last few seconds, so that it shows when the others in the batch slow it down. */
export class Pace {
  constructor(windowS = 3) {
    this.windowS = windowS;
    this.times = [];
    this.count = 0;
  }

  add(nowS) {
    this.firstS ??= nowS;
    this.lastS = nowS;
    this.count += 1;
    this.times.push(nowS);
  }

  now(nowS) {
    while (this.times.length && this.times[0] <= nowS - this.windowS) this.times.shift();
    const spanS = Math.min(this.windowS, nowS - this.firstS);
    return spanS > 0.2 ? (this.times.length - (this.times[0] === this.firstS ? 1 : 0)) / spanS : null;
  }

  /** Of all tokens after the first, which is prefill's. */
  whole(tokens) {
    return tokens > 1 && this.lastS > this.firstS ? (tokens - 1) / (this.lastS - this.firstS) : null;
  }
}

/** Text as one word of a POSIX shell. */
export function quoted(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}
