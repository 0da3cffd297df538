// Where a model's thinking ends and its answer begins.

const OPEN = "<think>";
const CLOSE = "</think>";

/**
 * The parts of a message: {thinking, answer, isThinking}.
 *
 * A server may send thinking apart (`reasoning_content`); otherwise it is what stands in <think> at the
 * start of the content. Some templates write the opening tag themselves, so that the content begins in
 * thinking (`startsInside`), or only a closing tag tells so; with `mayThink` false such a tag is text. Until the
 * message `isWhole`, what may become an opening tag is held back.
 */
export function splitThinking({ reasoning = "", content = "" }, { startsInside = false, mayThink = true, isWhole = false } = {}) {
  if (reasoning) return { thinking: reasoning.trim(), answer: content.trimStart(), isThinking: !content };
  const text = content.trimStart();
  const isOpened = text.startsWith(OPEN);
  if (!isOpened && !isWhole && text && OPEN.startsWith(text)) return { thinking: "", answer: "", isThinking: true };
  const close = isOpened || mayThink ? text.indexOf(CLOSE) : -1;
  const start = isOpened ? OPEN.length : 0;
  if (close >= 0) {
    const answer = text.slice(close + CLOSE.length).trimStart();
    return { thinking: text.slice(start, close).trim(), answer, isThinking: false };
  }
  if (isOpened || (startsInside && mayThink)) return { thinking: text.slice(start).trim(), answer: "", isThinking: true };
  return { thinking: "", answer: text, isThinking: false };
}

/** Whether the content has a closing tag that it did not open: its template opened it. */
export function beganInside({ content = "" }) {
  return content.includes(CLOSE) && !content.trimStart().startsWith(OPEN);
}
