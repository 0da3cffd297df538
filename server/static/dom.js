// Building elements. Text only ever becomes text: nothing here, or anywhere in the page, parses HTML.

/** An element with properties (`class`, `text`, `on`, attributes) and children (elements, strings, lists of them). */
export function element(tag, { class: className, text, on, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  for (const [event, listener] of Object.entries(on ?? {})) made.addEventListener(event, listener);
  // one by one: a long text has more parts than a call may have arguments
  for (const child of children.flat()) made.append(child);
  return made;
}

/** One of the symbols of index.html. */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** A button with an icon and a name for those who do not see it. */
export function iconButton(name, label, onClick) {
  const made = element("button", { class: "icon", type: "button", "aria-label": label, title: label }, icon(name));
  made.addEventListener("click", () => onClick(made));
  return made;
}

/** A button that puts what `text()` gives on the clipboard. */
export function copyButton(label, text) {
  return iconButton("copy", label, async (button) => {
    const copied = await copy(text());
    button.replaceChildren(icon(copied ? "check" : "alert"));
    button.title = copied ? "Copied" : "The browser did not allow it";
    setTimeout(() => {
      button.replaceChildren(icon("copy"));
      button.title = label;
    }, 1500);
  });
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text);
  }
}

// Plain http on another machine has no clipboard interface.
function copyBySelection(text) {
  const focused = document.activeElement;
  const area = element("textarea", { class: "unseen" });
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return copied;
}
