// How a message looks: built once, then brought up to date as its text grows.

import { copyButton, element, icon, iconButton } from "./dom.js";
import { showMarkdown } from "./markdown.js";
import { splitThinking } from "./thinking.js";

/**
 * The element of a message; `acts` has `edit(message, text)`, which re-runs from there, and `again()`.
 *
 * `update(run)` shows what the message holds now; `run` has the times of an answer under way, in ms.
 */
export function messageView(message, acts) {
  return message.role === "user" ? userView(message, acts) : answerView(message, acts);
}

function userView(message, acts) {
  const text = element("div", { class: "text", text: message.content });
  const tools = element("div", { class: "tools" }, copyButton("Copy the message", () => message.content));
  const shown = element("article", { class: "message user", "aria-label": "You" }, text, tools);
  const edit = iconButton("edit", "Edit, and answer again from here", () => {
    const form = editForm(message, (changed) => {
      form.replaceWith(text, tools);
      if (changed === null) edit.focus();
      else acts.edit(message, changed);
    });
    tools.remove();
    text.replaceWith(form);
    form.querySelector("textarea").focus();
  });
  edit.classList.add("edit");
  tools.append(edit);
  return { element: shown, update: () => {} };
}

function editForm(message, done) {
  const area = element("textarea", { "aria-label": "Edit the message", rows: "1" });
  const form = element("form", { class: "editing" }, area);
  const finish = () => area.value.trim() && done(area.value.trim());
  const cancel = element("button", { class: "plain", type: "button", text: "Cancel", on: { click: () => done(null) } });
  form.append(element("div", { class: "buttons" }, cancel, element("button", { class: "strong", type: "submit", text: "Send" })));
  area.value = message.content;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    finish();
  });
  area.addEventListener("input", () => fitHeight(area));
  area.addEventListener("keydown", (event) => {
    if (isSendKey(event)) {
      event.preventDefault();
      finish();
    } else if (event.key === "Escape") {
      event.stopPropagation();
      done(null);
    }
  });
  requestAnimationFrame(() => fitHeight(area));
  return form;
}

/** Enter alone; an Enter that chooses a character of an input method is not one. */
export function isSendKey(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}

/** Make a text box as high as its text; the style sheet says where that ends. */
export function fitHeight(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}

function answerView(message, acts) {
  const dots = element("span", { class: "dots", "aria-hidden": "true" }, element("i"), element("i"), element("i"));
  const wait = element("p", { class: "wait" }, dots, element("span"));
  const summary = element("span");
  const thought = element("div", { class: "thought" });
  const thinking = element("details", {}, element("summary", {}, icon("fold"), summary), thought);
  const answer = element("div", { class: "answer" });
  const note = element("p", { class: "note" });
  const errorText = element("p");
  const again = element("button", { class: "plain again", type: "button", text: "Try again", on: { click: acts.again } });
  const error = element("div", { class: "error", role: "alert" }, icon("alert"), errorText, again);
  const stats = element("p", { class: "stats" });
  const regenerate = iconButton("again", "Answer again", acts.again);
  regenerate.classList.add("again");
  const tools = element("div", { class: "tools" }, copyButton("Copy the answer", () => parts().answer), regenerate, stats);
  const shown = element("article", { class: "message assistant", "aria-label": "Answer" }, wait, thinking, answer, note, error, tools);

  const parts = (run) => splitThinking(message, { ...message, isWhole: !run });

  function update(run) {
    const { thinking: thoughts, answer: text, isThinking } = parts(run);
    shown.classList.toggle("running", Boolean(run));
    shown.setAttribute("aria-busy", String(Boolean(run)));
    wait.hidden = !run || run.firstAt !== null;
    if (!wait.hidden) setText(wait.lastChild, `Reading the prompt${elapsed(run.startedAt)}`);
    thinking.hidden = !thoughts && !(run && isThinking && run.firstAt !== null);
    thinking.classList.toggle("open-ended", Boolean(run && isThinking));
    setText(summary, thinkingLine(message, run, isThinking));
    setText(thought, thoughts);
    showMarkdown(answer, text);
    show(note, noteOf(message, { run, isEmpty: !text && !thoughts }));
    error.hidden = !message.error;
    setText(errorText, message.error ?? "");
    setText(stats, statsOf(message, run));
    tools.hidden = Boolean(message.error && !message.content) || Boolean(run && run.firstAt === null);
  }

  return { element: shown, update };
}

function thinkingLine(message, run, isThinking) {
  if (run && isThinking) return `Thinking${elapsed(run.firstAt)}`;
  return message.thoughtMs >= 10 ? `Thought for ${seconds(message.thoughtMs)}` : "Thought";
}

function noteOf(message, { run, isEmpty }) {
  if (run || message.error) return "";
  if (message.stopped) return "Stopped.";
  if (message.finish === "length") return "Cut off: it reached the most tokens that it may have (Max tokens in the settings, or the model's context).";
  return isEmpty ? "The model ended without a word." : "";
}

function statsOf({ tokens = 0, rate = null, firstMs = null, promptTokens = null, cachedTokens = 0 }, run) {
  const parts = [];
  if (rate) parts.push(`${rate >= 100 ? Math.round(rate).toLocaleString("en") : rate.toFixed(1)} tok/s`);
  if (firstMs !== null) parts.push(`first token ${seconds(firstMs)}`);
  if (tokens) parts.push(`${tokens.toLocaleString("en")} token${tokens === 1 ? "" : "s"}`);
  if (promptTokens && !run) parts.push(`prompt ${promptTokens.toLocaleString("en")}${cachedTokens ? ` (${cachedTokens.toLocaleString("en")} cached)` : ""}`);
  return parts.join(" · ");
}

function elapsed(since) {
  const passed = Math.floor((performance.now() - since) / 1000);
  return passed > 0 ? `… ${passed} s` : "…";
}

function seconds(ms) {
  return `${(ms / 1000).toFixed(ms < 995 ? 2 : 1)} s`;
}

function show(target, text) {
  target.hidden = !text;
  setText(target, text);
}

// A growing text grows in place, so that what a reader has selected stays selected.
function setText(target, text) {
  const node = target.firstChild;
  if (!node) target.textContent = text;
  else if (text !== node.data && text.startsWith(node.data)) node.appendData(text.slice(node.data.length));
  else if (text !== node.data) node.data = text;
}
