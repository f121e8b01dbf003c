// The chat: what the person does, what is asked of the service, what is shown. Each part has a module of its own.

import { roughly, timingOf } from "./figures.js";
import { remembered, soonRemembered } from "./memory.js";
import { drawServer, watchServer } from "./now.js";
import { Settings } from "./settings.js";
import { saveAs, Sheets } from "./sheets.js";
import { ask, authorization, Refused } from "./stream.js";
import { curl, Talk } from "./talk.js";
import { toBottom, TurnView } from "./turn.js";
import { say, wordsOf } from "./words.js";

const find = (selector) => document.querySelector(selector);
const word = wordsOf(navigator.language);
const talk = new Talk(), views = new Map();
const settings = new Settings(find("#fields"), () => sessionStorage);
const sheets = new Sheets(word);
const box = find("#box");
let model = null; // its name for this service, once that has told it
let running = null; // the AbortController of the answer that streams
let editing = false;

// ---- asking

async function start(question) {
  const turn = talk.begin(question), controller = new AbortController();
  const view = new TurnView(turn, word, { again: () => again(turn), show: showDebug, copy: sheets.copy.bind(sheets) });
  views.set(turn, view);
  for (const split of document.querySelectorAll("details.split")) split.open = false; // the last request's is open
  find("#talk").append(view.root);
  running = controller;
  drawState();
  toBottom();
  try {
    await knowModel(controller.signal);
    for await (const event of ask(talk.body(model, settings.values), settings.values.key, controller.signal)) {
      hear(turn, view, event);
    }
  } catch (error) {
    if (controller.signal.aborted) turn.ended = "stopped";
    else if (error instanceof Refused) refused(turn, view, error);
    else lost(turn, view, error);
  }
  if (running === controller) running = null;
  drawState();
  view.end();
  if (!turn.usage && turn.id && turn.ended !== "refused") splitLater(turn, view);
}

function hear(turn, view, event) {
  const { kind } = event;
  if (kind === "begun") Object.assign(turn, { id: event.id, degraded: event.degraded, cache: event.cache });
  else if (kind === "text") view.text(event.text);
  else if (kind === "ended") {
    turn.reason = event.reason;
    view.ending();
  }
  else if (kind === "usage") turn.usage = event.usage;
  else if (kind === "done") turn.ended = turn.reason;
  else {
    turn.ended = kind; // failed or cut: what came stays
    turn.error = event.error ?? null;
    view.notice(word(kind, event.error), 0);
  }
}

function lost(turn, view, error) {
  turn.ended = turn.id === null ? "unreachable" : "cut";
  view.notice(word(turn.id === null ? "not_sent" : "cut"), 0);
  if (!(error instanceof TypeError)) console.error(error); // fetch's way to say that the network failed is a TypeError
}

function refused(turn, view, why) {
  const { status, code, message, details, retryS } = why;
  Object.assign(turn, { ended: "refused", id: why.id, error: { status, code, message, details } });
  if (status === 404) model = null; // another one is served now
  let sentence = word("refused", { code: code || status, message });
  if (status === 401) sentence = word(settings.values.key ? "refused_wrong_key" : "refused_401");
  if (code === "server_overloaded" && details.predicted_wait_s !== undefined) {
    sentence = word("refused_full", { ...details, wait: roughly(details.predicted_wait_s) });
  }
  view.notice(sentence, retryS);
  if (status === 401) askForKey();
}

/** The model's name, which every request must say. Throws Refused, or fetch's TypeError. */
async function knowModel(signal) {
  if (model !== null) return;
  const response = await fetch("/v1/models", { headers: authorization(settings.values.key), signal });
  if (!response.ok) throw await Refused.by(response);
  model = (await response.json()).data[0].id;
  find("#model").textContent = document.title = model;
  find("#empty").textContent = word("empty");
}

function greet() {
  knowModel().catch((error) => { // when it is no refusal the server's state is shown beside
    if (error.status !== 401) return;
    find("#empty").textContent = word("locked");
    askForKey();
  });
}

/** The split of a request that was not read to its end. */
async function splitLater(turn, view) {
  const facts = await soonRemembered(turn.id, settings.values.key);
  if (facts && view.root.isConnected) view.split(timingOf(facts));
}

// ---- what the person does

function send() {
  const question = box.value.trim();
  if (running || !question) return;
  if (editing) drop(talk.last);
  edit(false, "");
  start(question);
}

function again(turn) {
  if (running) return;
  drop(turn);
  start(turn.question);
  home(); // the button that was pressed is not there any more
}

function drop(turn) {
  talk.drop(turn);
  views.get(turn).remove();
  views.delete(turn);
}

function clear() {
  running?.abort();
  for (const turn of [...talk.turns]) drop(turn);
  edit(false, "");
  home();
}

/** on: what is in the box replaces the last message. */
function edit(on, text) {
  editing = on;
  box.value = text;
  grow();
  drawState();
}

function askForKey() {
  openSettings(true);
  find("#fields").elements.key.focus();
}

function keyGiven() {
  home();
  if (talk.last?.error?.status === 401) again(talk.last);
  else greet();
}

function openSettings(open) {
  find("#settings").classList.toggle("open", open);
  find("#show-settings").ariaExpanded = String(open);
}

async function showDebug(id) {
  const facts = await remembered(id, settings.values.key);
  sheets.show(word("debug", { id }), facts ? JSON.stringify(facts, null, 2) : word("not_remembered"));
}

function showCurl() {
  const { question = box.value.trim() || "What is a KV cache?" } = talk.last ?? {};
  sheets.show("curl", curl(location.origin, talk.body(model, settings.values, question), settings.values.key !== ""));
}

/** Back to the box; on a phone its keyboard would cover half of the page. */
function home() {
  if (matchMedia("(hover: hover)").matches) box.focus();
}

// ---- what is shown

function drawState() {
  find("#send").textContent = word(running ? "stop" : "send");
  find("#send").type = running ? "button" : "submit";
  find("#empty").hidden = talk.turns.length > 0;
  find("#hint").textContent = word(editing ? "editing" : "hint");
  find("#hint").classList.toggle("editing", editing);
}

function grow() {
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + box.offsetHeight - box.clientHeight}px`;
}

// ---- wiring

function inBox(event) {
  if (event.isComposing || event.keyCode === 229) return; // this Enter chooses a character
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && box.value === "" && talk.last && !running) {
    event.preventDefault();
    edit(true, talk.last.question);
  }
}

function anywhere(event) {
  const typing = /^(input|textarea)$/i.test(event.target.tagName);
  if (event.key === "Escape" && !event.isComposing && !sheets.open) {
    if (running) running.abort();
    else if (editing) edit(false, "");
  } else if (event.key === "/" && !typing && !sheets.open && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    box.focus();
  }
}

function inFields(event) {
  if (event.key !== "Enter" || event.isComposing || event.target.tagName !== "INPUT") return;
  event.preventDefault();
  keyGiven();
}

function listen() {
  find("#composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  find("#send").addEventListener("click", (event) => {
    // Stop has become Send before the browser acts on the click: it would send what has been typed meanwhile.
    if (running || event.detail > 1) event.preventDefault();
    if (event.detail < 2) running?.abort(); // the second half of a double click must not stop what the first began
    home();
  });
  box.addEventListener("input", grow);
  box.addEventListener("keydown", inBox);
  document.addEventListener("keydown", anywhere);
  find("#fields").addEventListener("keydown", inFields);
  find("#show-settings").addEventListener("click", () => openSettings(!find("#settings").classList.contains("open")));
  find("#show-help").addEventListener("click", () => sheets.help.showModal());
  find("#as-curl").addEventListener("click", showCurl);
  find("#as-json").addEventListener("click", () => saveAs("conversation.json", talk.exported(model, settings.values)));
  find("#clear").addEventListener("click", clear);
}

document.documentElement.lang = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
say(document, word);
listen();
drawState();
watchServer((health) => drawServer(health, word));
greet();
home();
