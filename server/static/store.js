// What the browser keeps. Each chat has a key of its own, so that two tabs do not overwrite each other's;
// what cannot be read is passed over, so that nothing stored can break the page.

const PREFIX = "jaxmoe.v1.";
const CHAT = `${PREFIX}chat.`;
const MAX_CHATS = 100;
const MAX_MESSAGES = 2000;
const MAX_LENGTH = 2_000_000; // characters of one chat; browsers keep some five million in all

/** A chat: {id, updated (ms), messages}. */
export function newChat() {
  return { id: `${Date.now().toString(36)}${Math.random().toString(36).slice(2, 8)}`, updated: Date.now(), messages: [] };
}

/** Every chat that is stored, the latest first. */
export function loadChats() {
  return chatKeys().map((key) => readChat(key)).filter(Boolean).sort((a, b) => b.updated - a.updated);
}

/** Keep a chat, the oldest others giving way; false if it does not fit even then. */
export function saveChat(chat) {
  const key = CHAT + chat.id;
  const others = () => loadChats().filter(({ id }) => id !== chat.id);
  if (!chatKeys().includes(key)) others().slice(MAX_CHATS - 1).forEach(({ id }) => deleteChat(id));
  const text = JSON.stringify(chat);
  if (text.length > MAX_LENGTH) return false;
  while (!write(key, text)) {
    const oldest = others().at(-1);
    if (!oldest) return false;
    deleteChat(oldest.id);
  }
  return true;
}

export function deleteChat(id) {
  attempt(() => localStorage.removeItem(CHAT + id));
}

/** Whether a storage event is about a chat; it has no key when everything was cleared. */
export function isChatKey(key) {
  return key === null || key.startsWith(CHAT);
}

/** The value stored under a name, or null; `kept` says where: for good, or in this tab only. */
export function load(name, kept = "localStorage") {
  return attempt(() => window[kept].getItem(PREFIX + name)) ?? null;
}

/** Store a text under a name; null removes it. */
export function save(name, text, kept = "localStorage") {
  attempt(() => (text === null ? window[kept].removeItem(PREFIX + name) : window[kept].setItem(PREFIX + name, text)));
}

/** An object stored under a name; {} if there is none, or something else. */
export function loadObject(name) {
  const found = attempt(() => JSON.parse(load(name) ?? "{}"));
  return isObject(found) ? found : {};
}

function chatKeys() {
  return attempt(() => Object.keys(localStorage).filter((key) => key.startsWith(CHAT))) ?? [];
}

function readChat(key) {
  const found = attempt(() => JSON.parse(localStorage.getItem(key)));
  if (!isObject(found) || !Array.isArray(found.messages) || key !== CHAT + found.id) return null;
  const messages = found.messages.filter(isMessage).slice(-MAX_MESSAGES).map(checkedMessage);
  return { id: found.id, updated: Number.isFinite(found.updated) ? found.updated : 0, messages };
}

function isMessage(found) {
  return isObject(found) && ["user", "assistant"].includes(found.role) && typeof found.content === "string";
}

const TEXTS = ["reasoning", "error", "finish"];
const NUMBERS = ["tokens", "rate", "firstMs", "promptTokens", "cachedTokens", "thoughtMs"];
const SWITCHES = ["stopped", "startsInside", "mayThink"];

function checkedMessage(found) {
  const fields = [
    ...TEXTS.filter((name) => typeof found[name] === "string"),
    ...NUMBERS.filter((name) => Number.isFinite(found[name])),
    ...SWITCHES.filter((name) => typeof found[name] === "boolean"),
  ];
  return { role: found.role, content: found.content, ...Object.fromEntries(fields.map((name) => [name, found[name]])) };
}

function write(key, text) {
  return attempt(() => {
    localStorage.setItem(key, text);
    return true;
  }) ?? false;
}

function isObject(found) {
  return typeof found === "object" && found !== null && !Array.isArray(found);
}

// A browser may refuse any use of its storage.
function attempt(use) {
  try {
    return use();
  } catch {
    return null;
  }
}
