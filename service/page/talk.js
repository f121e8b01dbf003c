// What has been said, and how it is said to the service.

import { quoted } from "./figures.js";

export class Talk {
  constructor() {
    this.turns = [];
  }

  /** ended: null while it streams, then how: stop, length, stopped, failed, cut, refused or unreachable. */
  begin(question) {
    const turn = { question, answer: "", ended: null, id: null, usage: null, degraded: null, cache: null, error: null };
    this.turns.push(turn);
    return turn;
  }

  drop(turn) {
    this.turns = this.turns.filter((other) => other !== turn);
  }

  get last() {
    return this.turns.at(-1);
  }

  /** A request for the last turn, or for another question in its place. Earlier turns without an answer are left out. */
  body(model, settings, question = this.last.question) {
    const said = this.turns.slice(0, -1).filter((turn) => turn.answer);
    const messages = said.flatMap((turn) => [user(turn.question), { role: "assistant", content: turn.answer }]);
    if (settings.system) messages.unshift({ role: "system", content: settings.system });
    const numbers = ["temperature", "max_tokens", "seed"].filter((name) => settings[name] !== null);
    return {
      model,
      messages: [...messages, user(question)],
      ...Object.fromEntries(numbers.map((name) => [name, settings[name]])),
      stream: true,
      stream_options: { include_usage: true },
    };
  }

  /** All of it but the key, for a file. */
  exported(model, settings) {
    return { model, settings: { ...settings, key: undefined }, turns: this.turns };
  }
}

function user(content) {
  return { role: "user", content };
}

/** The same request on a command line. The key is not in it: a shell's history is no place for one. */
export function curl(origin, body, withKey) {
  const key = withKey ? ` \\\n  -H "Authorization: Bearer $LLM_INFER_API_KEY"` : "";
  const data = quoted(JSON.stringify(body));
  return `curl -N ${origin}/v1/chat/completions${key} \\\n  -H 'Content-Type: application/json' \\\n  -d ${data}`;
}
