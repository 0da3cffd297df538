// The page: chats, answers under way, and the state of the server.

import { health, servedModel, ServerError, streamChat } from "./api.js";
import { element, iconButton } from "./dom.js";
import { bindSettings, loadSettings, requestSettings } from "./settings.js";
import { deleteChat, isChatKey, load, loadChats, loadObject, newChat, save, saveChat } from "./store.js";
import { beganInside, splitThinking } from "./thinking.js";
import { fitHeight, isSendKey, messageView } from "./view.js";

const SUGGESTIONS = ["What is 17 + 25?", "Spell the word garden.", "What is the capital of France?", "Count from one to ten."];
const SAVE_MS = 1000;
const TICK_MS = 200;
const NEAR_PX = 40;

const at = (id) => document.getElementById(id);
const scroller = at("scroller");
const conversation = at("conversation");
const prompt = at("prompt");

const settings = loadSettings();
const runs = new Map(); // an answer under way, by its chat's id
let views = new Map(); // of the messages of the chat that is shown
let chats = loadChats();
let chat = chats.find(({ id }) => id === load("current", "sessionStorage")) ?? chats[0] ?? newChat();
let model = null;
let isReady = false;

// Chats.

function openChat(chosen) {
  chat = chosen;
  save("current", chat.id, "sessionStorage");
  views = new Map();
  conversation.replaceChildren();
  for (const message of chat.messages) addView(message);
  isFollowing = true;
  closeDrawer();
  showAll();
  follow();
}

function chooseChat(chosen) {
  openChat(chosen);
  focusPrompt();
}

// On a touch screen that would bring up the keyboard unasked.
function focusPrompt() {
  if (matchMedia("(hover: hover)").matches) prompt.focus();
}

function closeDrawer() {
  if (at("chats").matches(":popover-open")) at("chats").hidePopover();
}

function startChat() {
  openChat(newChat());
  prompt.focus();
}

function keep(kept) {
  kept.updated = Date.now();
  chats = [kept, ...chats.filter(({ id }) => id !== kept.id)];
  if (!saveChat(kept)) toast("This chat is too large for the browser to keep: it will be gone after a reload.");
}

function removeChat(removed) {
  runs.get(removed.id)?.stop();
  chats = chats.filter(({ id }) => id !== removed.id);
  deleteChat(removed.id);
  if (removed === chat) openChat(chats[0] ?? newChat());
  showChats();
  toast("Chat deleted.", "Undo", () => {
    keep(removed);
    openChat(removed);
  });
  focusPrompt();
}

let listed = "";

function showChats() {
  const wanted = JSON.stringify([chat.id, chats.map((one) => [one.id, one.updated, runs.has(one.id)])]);
  if (wanted === listed) return; // the focus may be in it
  listed = wanted;
  const rows = chats.map((one) => {
    const title = element("button", { class: "chat", type: "button", text: titleOf(one), on: { click: () => chooseChat(one) } });
    if (one === chat) title.setAttribute("aria-current", "true");
    const remove = iconButton("delete", `Delete the chat: ${titleOf(one)}`, () => removeChat(one));
    return element("li", { class: runs.has(one.id) ? "running" : "" }, title, remove);
  });
  at("chat-list").replaceChildren(...rows);
}

function titleOf({ messages }) {
  return messages.find(({ role }) => role === "user")?.content.slice(0, 80) || "Empty chat";
}

// Messages.

function addView(message) {
  const view = messageView(message, { edit: editMessage, again: answerAgain });
  views.set(message, view);
  conversation.append(view.element);
  view.update(runOf(message));
}

function runOf(message) {
  const run = runs.get(chat.id);
  return run?.message === message ? run : null;
}

function cutFrom(index) {
  for (const message of chat.messages.splice(index)) {
    views.get(message)?.element.remove();
    views.delete(message);
  }
}

function say(text) {
  const message = { role: "user", content: text };
  chat.messages.push(message);
  addView(message);
  answer();
}

function editMessage(message, text) {
  if (!mayAsk()) return;
  cutFrom(chat.messages.indexOf(message));
  say(text);
  focusPrompt();
}

function answerAgain() {
  if (!mayAsk()) return;
  if (chat.messages.at(-1)?.role === "assistant") cutFrom(chat.messages.length - 1);
  answer();
  focusPrompt();
}

function mayAsk() {
  return isReady && !runs.has(chat.id);
}

// Answers.

class Run {
  constructor(owner, message) {
    Object.assign(this, { chat: owner, message, startedAt: performance.now(), firstAt: null, savedAt: performance.now() });
    this.controller = new AbortController();
  }

  stop() {
    this.controller.abort();
  }

  /** Take one chunk of the stream into the message. */
  take(chunk) {
    const { message } = this;
    const choice = chunk.choices?.[0];
    const reasoning = choice?.delta?.reasoning_content ?? choice?.delta?.reasoning ?? "";
    const content = choice?.delta?.content ?? "";
    if (reasoning) message.reasoning = (message.reasoning ?? "") + reasoning;
    message.content += content;
    if (reasoning || content) this.#count(choice.token_ids?.length ?? 1);
    if (choice?.finish_reason) message.finish = choice.finish_reason;
    if (chunk.usage) this.#takeUsage(chunk);
  }

  #count(tokens) {
    const { message } = this;
    const now = performance.now();
    if (this.firstAt === null) {
      this.firstAt = now;
      message.firstMs = now - this.startedAt;
    } else if (now > this.firstAt) {
      // the first token's time is the prompt's
      message.rate = (1000 * (message.tokens + tokens - 1)) / (now - this.firstAt);
    }
    message.tokens = (message.tokens ?? 0) + tokens;
    const { thinking, isThinking } = splitThinking(message, message);
    if (thinking && (isThinking || !message.thoughtMs)) message.thoughtMs = now - this.firstAt;
  }

  #takeUsage({ usage, timings }) {
    const { message } = this;
    message.tokens = usage.completion_tokens ?? message.tokens;
    message.promptTokens = usage.prompt_tokens;
    message.cachedTokens = usage.prompt_tokens_details?.cached_tokens ?? 0;
    if (timings?.predicted_per_second) message.rate = timings.predicted_per_second;
  }
}

async function answer() {
  const { system, fields } = requestSettings(settings);
  const message = { role: "assistant", content: "", mayThink: settings.thinking !== "off", startsInside: startsInside() };
  const body = { model: model.id, messages: history(system), return_token_ids: true, ...fields };
  const run = new Run(chat, message);
  chat.messages.push(message);
  runs.set(chat.id, run);
  addView(message);
  isFollowing = true;
  keep(chat);
  showAll();
  const ticking = setInterval(() => showSoon(run), TICK_MS);
  try {
    for await (const chunk of streamChat(body, { key: load("key", "sessionStorage"), signal: run.controller.signal })) {
      run.take(chunk);
      showSoon(run);
      saveNowAndThen(run);
    }
  } catch (error) {
    takeError(run, error);
  } finally {
    clearInterval(ticking);
    finish(run);
  }
}

/** What the model is told: no thinking of the past, and no answer that failed before its first word. */
function history(system) {
  const told = chat.messages.map((message) => ({
    role: message.role,
    content: message.role === "user" ? message.content : splitThinking(message, { ...message, isWhole: true }).answer,
  }));
  return [...(system ? [{ role: "system", content: system }] : []), ...told.filter(({ content }) => content)];
}

function takeError(run, error) {
  if (run.controller.signal.aborted) {
    run.message.stopped = true;
    return;
  }
  if (!(error instanceof ServerError)) console.error(error);
  run.message.error = error instanceof ServerError ? error.message : "Something in this page failed. Its console says what.";
  if (error.status === 401) askForKey(() => run.chat === chat && answerAgain());
  if ([0, 502, 503].includes(error.status)) connect();
}

function finish(run) {
  const { message } = run;
  runs.delete(run.chat.id);
  learnStart(message);
  if (chats.some(({ id }) => id === run.chat.id)) keep(run.chat); // it may have been deleted meanwhile
  showAnswer(message);
  showAll();
}

// A template may open <think> itself. Only an answer shows that; it is remembered for the next one.
function startsInside() {
  return loadObject("starts-inside")[model.id] === true;
}

function learnStart(message) {
  if (message.reasoning || !message.mayThink || message.finish !== "stop") return;
  message.startsInside = beganInside(message);
  save("starts-inside", JSON.stringify({ [model.id]: message.startsInside }));
}

function saveNowAndThen(run) {
  if (performance.now() - run.savedAt < SAVE_MS) return;
  run.savedAt = performance.now();
  saveChat(run.chat);
}

// Showing.

const shownSoon = new Set();

function showSoon({ message }) {
  if (shownSoon.size === 0) requestAnimationFrame(showThem);
  shownSoon.add(message);
}

function showThem() {
  for (const message of shownSoon) showAnswer(message);
  shownSoon.clear();
}

function showAnswer(message) {
  views.get(message)?.update(runOf(message));
  follow();
}

function showAll() {
  const isRunning = runs.has(chat.id);
  conversation.classList.toggle("busy", isRunning);
  at("welcome").hidden = chat.messages.length > 0;
  at("send").hidden = isRunning;
  at("stop").hidden = !isRunning;
  at("send").disabled = !isReady;
  showChats();
  showContext();
}

function showContext() {
  const known = chat.messages.findLastIndex(({ promptTokens }) => promptTokens);
  const contextLength = model?.contextLength;
  at("context").hidden = known < 0 || !contextLength;
  if (at("context").hidden) return;
  const used = chat.messages[known].promptTokens + chat.messages[known].tokens;
  const atLeast = known < chat.messages.length - 1 ? "at least " : "";
  at("context-text").textContent = `${atLeast}${used.toLocaleString("en")} of ${contextLength.toLocaleString("en")} tokens of context`;
  at("context-bar").value = Math.min(used / contextLength, 1);
}

// Following the answer: until the reader scrolls up, and again from the end on.

let isFollowing = true;
let lastTop = 0;

function distanceToEnd() {
  return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;
}

function follow() {
  if (isFollowing) scroller.scrollTop = scroller.scrollHeight;
  at("jump").hidden = isFollowing || distanceToEnd() < NEAR_PX;
}

scroller.addEventListener("scroll", () => {
  if (distanceToEnd() < NEAR_PX) isFollowing = true;
  else if (scroller.scrollTop < lastTop) isFollowing = false;
  lastTop = scroller.scrollTop;
  at("jump").hidden = isFollowing || distanceToEnd() < NEAR_PX;
});

new ResizeObserver(follow).observe(scroller);

at("jump").addEventListener("click", () => {
  isFollowing = true;
  follow();
  focusPrompt();
});

// The server.

let connecting = null;

function connect() {
  connecting ??= waitForServer().finally(() => {
    connecting = null;
  });
  return connecting;
}

async function waitForServer() {
  for (let tries = 0; !(await isServing(tries)); tries += 1) await new Promise((done) => setTimeout(done, tries < 10 ? 500 : 2000));
  try {
    model = await servedModel(load("key", "sessionStorage"));
    setReady(true, model.id);
    banner(null);
  } catch (error) {
    setReady(false, error.status === 401 ? "locked" : "not ready");
    banner(error.message, error.status === 401 ? { action: "Enter the key", act: () => askForKey() } : { action: "Try again", act: connect });
    if (error.status === 401) askForKey();
  }
}

async function isServing(tries) {
  const found = await health();
  if (found.status === "ok") return true;
  setReady(false, found.status === "loading" ? "loading" : "not ready");
  const said = STATES[found.status] ?? (() => `The server says: ${found.status}.`);
  // One lost answer is no news.
  if (found.status !== "unreachable" || tries > 0) banner(said(found), { progress: found.status === "loading" ? found.progress : null });
  return false;
}

const STATES = {
  loading: ({ phase, progress }) => `The model is not ready yet: ${phase}, ${Math.round(100 * progress)} %.`,
  stopping: () => "The server is shutting down.",
  error: ({ error }) => `The server could not go on: ${error}`,
  unreachable: () => "The server cannot be reached. This page keeps trying.",
};

function setReady(ready, name) {
  isReady = ready;
  document.documentElement.classList.toggle("ready", ready);
  at("model-name").textContent = name;
  at("model-name").title = name;
  showAll();
}

function banner(text, { action = null, act = null, progress = null } = {}) {
  at("banner").hidden = text === null;
  if (at("banner-text").textContent !== text) at("banner-text").textContent = text ?? "";
  at("banner-action").hidden = action === null;
  at("banner-action").textContent = action ?? "";
  at("banner-action").onclick = act;
  at("banner-progress").hidden = progress === null;
  at("banner-progress").value = progress ?? 0;
}

let afterKey = null;

function askForKey(then = null) {
  afterKey = then;
  if (!at("key-dialog").open) at("key-dialog").showModal();
  at("key").value = "";
}

at("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  save("key", at("key").value.trim(), "sessionStorage");
  at("key-dialog").close();
  await connect();
  if (isReady) afterKey?.();
  if (isReady) prompt.focus();
});

// The rest of the page.

let hidingToast = 0;

function toast(text, action = null, act = null) {
  clearTimeout(hidingToast);
  const hide = () => (at("toast").hidden = true);
  at("toast").hidden = false;
  at("toast-text").textContent = text;
  at("toast-action").hidden = action === null;
  at("toast-action").textContent = action ?? "";
  at("toast-action").onclick = () => {
    hide();
    act();
  };
  hidingToast = setTimeout(hide, 10_000);
}

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = prompt.value.trim();
  if (!text || !mayAsk()) return;
  prompt.value = "";
  fitHeight(prompt);
  say(text);
  focusPrompt();
});

prompt.addEventListener("input", () => fitHeight(prompt));
prompt.addEventListener("keydown", (event) => {
  if (!isSendKey(event)) return;
  event.preventDefault();
  at("composer").requestSubmit();
});

at("stop").addEventListener("click", () => {
  runs.get(chat.id)?.stop();
  focusPrompt();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open], :popover-open")) runs.get(chat.id)?.stop();
});

for (const id of ["new-chat", "new-chat-narrow"]) at(id).addEventListener("click", startChat);
at("open-settings").addEventListener("click", () => at("settings").showModal());
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
  });
}

at("toggle-theme").addEventListener("click", () => {
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  const system = isDark ? "dark" : "light";
  const next = (document.documentElement.dataset.theme ?? system) === "dark" ? "light" : "dark";
  // Back at the system's own: follow it again.
  save("theme", next === system ? null : next);
  if (next === system) delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
});

for (const text of SUGGESTIONS) {
  const ask = element("button", { type: "button", text, on: { click: () => (mayAsk() ? say(text) : prompt.focus()) } });
  at("suggestions").append(element("li", {}, ask));
}

addEventListener("storage", ({ key }) => {
  if (!isChatKey(key)) return;
  const known = new Map(chats.map((one) => [one.id, one]));
  chats = loadChats().map((stored) => {
    const mine = known.get(stored.id);
    return runs.has(stored.id) || mine?.updated === stored.updated ? mine : stored;
  });
  const changed = chats.find(({ id }) => id === chat.id);
  if (changed && changed !== chat) openChat(changed);
  else showChats();
});

addEventListener("pagehide", () => {
  for (const run of runs.values()) {
    run.stop();
    run.message.stopped = true;
    saveChat(run.chat);
  }
});

document.addEventListener("visibilitychange", async () => {
  if (!document.hidden && isReady && runs.size === 0 && (await health()).status !== "ok") connect();
});

bindSettings(at("settings"), settings);
openChat(chat);
focusPrompt();
connect();
