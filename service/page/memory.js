// What the server remembers of a request: its last ones lie at /debug/requests.

import { authorization } from "./stream.js";

const BOOKS_MS = [300, 1000, 3000]; // it writes down in a while how a request ended that was not read to its end

export function addressOf(id) {
  return `/debug/requests/${encodeURIComponent(id)}`;
}

/** Its facts, or null. */
export async function remembered(id, key) {
  const response = await fetch(addressOf(id), { headers: authorization(key) }).catch(() => null);
  return response?.ok ? response.json() : null;
}

/** The same of a request that has just ended. */
export async function soonRemembered(id, key) {
  for (const ms of BOOKS_MS) {
    await new Promise((wake) => setTimeout(wake, ms));
    const facts = await remembered(id, key);
    if (facts) return facts;
  }
  return null;
}
