// How full the server is now: asked about once a second, and only while somebody looks.

import { percent, roughly } from "./figures.js";

const EVERY_MS = 1000, LATER_MS = 4000;

/** Calls show(health), or show(null) when nobody answers. */
export function watchServer(show) {
  let timer = null;
  async function look() {
    clearTimeout(timer);
    timer = null;
    if (document.visibilityState !== "visible") return;
    const health = await fetch("/health", { signal: AbortSignal.timeout(LATER_MS) }) // a server that hangs is none
      .then((response) => response.json()).then((found) => (found.now ? found : null)) // nor is a balancer without one
      .catch(() => null);
    show(health);
    clearTimeout(timer);
    timer = setTimeout(look, health ? EVERY_MS : LATER_MS);
  }
  document.addEventListener("visibilitychange", look);
  look();
}

export function drawServer(health, word) {
  const status = document.querySelector("#status");
  const state = stateOf(health);
  status.dataset.state = state;
  const why = ["closed", "degraded"].includes(state) ? reasons(health) : "";
  const text = why ? `${word(state)} (${why})` : word(state);
  if (status.textContent !== text) status.textContent = text; // a screen reader hears changes only
  document.querySelector("#now").hidden = !health?.now;
  if (!health?.now) return;
  const { slots, running, queue, waiting, kv_blocks: blocks, kv_held: held, predicted_wait_s: waitS } = health.now;
  meter("slots", word("of", { some: running, all: slots }), running / slots);
  meter("queue", word("of", { some: waiting, all: queue }), waiting / queue);
  meter("kv", percent(held / blocks), held / blocks);
  document.querySelector("#wait").textContent = roughly(waitS);
}

function stateOf(health) {
  if (health === null) return "unreachable";
  if (health.status !== "ok" || health.ready.ready) return health.status;
  return health.ready.reason === "full" ? "full" : "closed";
}

function reasons({ ready, broken_laws: laws, degraded = [] }) {
  return [ready.reason, ...degraded, ...laws].filter((why) => why).join(", ");
}

function meter(id, text, share) {
  const value = document.querySelector(`#${id}`);
  value.textContent = text;
  value.nextElementSibling.style.setProperty("--share", `${Math.min(100 * share, 100)}%`);
}
