// One question to the service: its answer as events, out of bytes that may be cut anywhere.

/** Server-sent events by the rules of https://html.spec.whatwg.org/multipage/server-sent-events.html; only their data. */
export class EventParser {
  constructor() {
    this.rest = "";
    this.data = [];
  }

  /** The data of every event that is complete with this text. */
  push(text) {
    this.rest += text;
    const found = [], lineEnd = /\r\n|\n|\r(?!$)/g; // a CR at the very end may be half of a CRLF: it waits
    let from = 0;
    for (let end = lineEnd.exec(this.rest); end; end = lineEnd.exec(this.rest)) {
      const line = this.rest.slice(from, end.index);
      from = lineEnd.lastIndex;
      if (line === "") {
        if (this.data.length) found.push(this.data.join("\n"));
        this.data = [];
      } else if (line === "data" || line.startsWith("data:")) {
        this.data.push(line.slice(5).replace(/^ /, ""));
      } // else a comment, which is a sign of life, or a field that is not used here
    }
    this.rest = this.rest.slice(from);
    return found;
  }
}

async function* eventsOf(body) {
  const reader = body.getReader(), decoder = new TextDecoder(), parser = new EventParser();
  try {
    for (let done = false; !done; ) {
      const read = await reader.read();
      done = read.done;
      yield* parser.push(done ? decoder.decode() : decoder.decode(read.value, { stream: true }));
    }
  } finally {
    reader.cancel().catch(() => {}); // nothing is lost: whoever leaves early wants no more
  }
}

/**
 * What happens, in order: { kind: "begun", id, degraded, cache }, then "text" (text), "ended" (reason), "usage" (usage),
 * and as the last one "done", "failed" (error), or "cut": the connection ended too early. Throws Refused; fetch's
 * TypeError when the network fails; AbortError.
 */
export async function* ask(body, key, signal) {
  const headers = { "content-type": "application/json", ...authorization(key) };
  const response = await fetch("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!response.ok) throw await Refused.by(response);
  const told = (name) => response.headers.get(name);
  yield { kind: "begun", id: told("x-request-id"), degraded: told("x-degraded"), cache: told("x-cache") };
  for await (const data of eventsOf(response.body)) {
    if (data === "[DONE]") {
      yield { kind: "done" };
      return;
    }
    const event = JSON.parse(data);
    if (event.error) {
      yield { kind: "failed", error: event.error };
      return;
    }
    for (const { delta, finish_reason: reason } of event.choices ?? []) {
      if (delta.content) yield { kind: "text", text: delta.content };
      if (reason) yield { kind: "ended", reason };
    }
    if (event.usage) yield { kind: "usage", usage: event.usage };
  }
  yield { kind: "cut" };
}

/** No answer, but a reason. retryS: seconds after which it makes sense to ask again; null when it never does. */
export class Refused extends Error {
  static async by(response) {
    const told = (name) => response.headers.get(name);
    const body = await response.json().catch(() => ({})); // a proxy in between may answer in a form of its own
    const error = body.error ?? { message: `${response.status} ${response.statusText}`, code: "" };
    const ms = Number(told("retry-after-ms")) || 1000 * Number(told("retry-after"));
    const retryS = told("x-should-retry") === "false" ? null : ms / 1000;
    const facts = { status: response.status, code: error.code, details: error.details ?? {}, retryS };
    return Object.assign(new Refused(error.message), facts, { id: told("x-request-id") });
  }
}

export function authorization(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}
