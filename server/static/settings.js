// The settings panel: what is given there goes into every request, what is empty does not.

import { loadObject, save } from "./store.js";

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];
const FIELDS = ["system", "thinking", ...NUMBERS];

/** Settings as they are stored: texts by the names of the panel's fields. */
export function loadSettings() {
  const found = loadObject("settings");
  return Object.fromEntries(FIELDS.map((name) => [name, typeof found[name] === "string" ? found[name] : ""]));
}

/** The part of a request that the settings decide: {system, fields}. */
export function requestSettings(settings) {
  const given = NUMBERS.filter((name) => settings[name] !== "" && Number.isFinite(Number(settings[name])));
  const fields = Object.fromEntries(given.map((name) => [name, Number(settings[name])]));
  if (settings.thinking) fields.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
  return { system: settings.system.trim(), fields };
}

/** Keep `settings` and the panel's fields the same; a value out of range is shown and not taken. */
export function bindSettings(dialog, settings) {
  const inputs = FIELDS.map((name) => dialog.querySelector(`[name=${name}]`));
  for (const input of inputs) {
    input.value = settings[input.name];
    input.addEventListener("input", () => {
      if (!input.checkValidity()) return;
      settings[input.name] = input.value;
      save("settings", JSON.stringify(settings));
    });
    input.addEventListener("change", () => input.reportValidity());
  }
  dialog.querySelector("#reset-settings").addEventListener("click", () => {
    for (const input of inputs) {
      input.value = "";
      input.dispatchEvent(new Event("input"));
    }
  });
}
