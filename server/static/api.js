// The server: its state, its model, and streams of answers; what goes wrong becomes a sentence.

const SHORT_MS = 10_000;

/** Something went wrong; the message is a sentence for the reader. `retryMs` is how long the server asks to wait. */
export class ServerError extends Error {
  constructor(sentence, { status = 0, code = null, retryMs = null } = {}) {
    super(sentence);
    Object.assign(this, { status, code, retryMs });
  }
}

/** The body of /health; {status: "unreachable"} while nobody answers. */
export async function health() {
  try {
    const response = await fetch("health", { cache: "no-store", signal: AbortSignal.timeout(SHORT_MS) });
    const found = await response.json();
    return typeof found?.status === "string" ? found : { status: response.ok ? "ok" : "unreachable" };
  } catch {
    return { status: "unreachable" };
  }
}

/** The model that is served: {id, contextLength (tokens) or null}. */
export async function servedModel(key) {
  const response = await ask("v1/models", { headers: headers(key), signal: AbortSignal.timeout(SHORT_MS) });
  const model = (await response.json())?.data?.[0];
  return { id: String(model?.id ?? "unnamed model"), contextLength: model?.max_model_len ?? null };
}

/** The chunks of a chat completion as they arrive; throws ServerError, or AbortError once `signal` aborts. */
export async function* streamChat(body, { key, signal }) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let isFinished = false;
  for await (const text of eventData(response.body)) {
    if (text === "[DONE]") return;
    const chunk = parseChunk(text);
    isFinished ||= Boolean(chunk.choices?.[0]?.finish_reason);
    yield chunk;
  }
  if (!isFinished) throw new ServerError("The connection ended before the answer did.");
}

function parseChunk(text) {
  let chunk;
  try {
    chunk = JSON.parse(text);
  } catch {
    throw new ServerError("The server sent something that this page cannot read.");
  }
  if (chunk.error) throw new ServerError(`The answer broke off: ${ended(chunk.error.message ?? "the server gave no reason")}`);
  return chunk;
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. It may have stopped, or the network is gone.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function refusal(response) {
  const found = await response.json().catch(() => null);
  const { message, code = null, param = null } = found?.error ?? {};
  const said = typeof message === "string" ? ended(message) : `status ${response.status}.`;
  const retryMs = 1000 * Number.parseFloat(response.headers.get("Retry-After") ?? "") || null;
  const sentence = SENTENCES[code] ?? SENTENCES[response.status] ?? (response.status < 500 ? SENTENCES[400] : SENTENCES[500]);
  return new ServerError(sentence({ said, retryMs, param }), { status: response.status, code, retryMs });
}

const SENTENCES = {
  400: ({ said, param }) => `The server refused the request${param && !said.includes(param) ? ` (${param})` : ""}: ${said}`,
  401: () => "The server asks for an API key, and this one is missing or wrong.",
  403: ({ said }) => `The server does not serve this page's address: ${said}`,
  404: ({ said }) => `The server does not know what was asked for: ${said}`,
  413: () => "The conversation is too large to send. Start a new chat.",
  429: ({ retryMs }) => `The server is busy and its queue is full. Try again${retryMs ? ` in ${retryMs / 1000} s` : " later"}.`,
  500: ({ said }) => `The server failed: ${said}`,
  502: () => "The proxy in front of the server does not reach it.",
  503: ({ said }) => `The server is not ready: ${said}`,
  504: () => "The proxy in front of the server gave up waiting.",
  context_length_exceeded: ({ said }) => `This does not fit into the model's context: ${said} Start a new chat, shorten a message, or lower Max tokens.`,
};

function ended(text) {
  return /[.!?]$/.test(text) ? text : `${text}.`;
}

async function* eventData(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  const parser = new EventParser();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The connection broke before the answer was complete.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Server-sent events in pieces of any size. Source: the WHATWG HTML standard, "Server-sent events". */
export class EventParser {
  #rest = "";
  #data = [];

  /** The data of each event that `text` completes. */
  push(text) {
    // A CR at the very end may be half of a CRLF: it waits for what follows.
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/);
    this.#rest = lines.pop();
    return lines.map((line) => this.#take(line)).filter((data) => data !== null);
  }

  #take(line) {
    if (line.startsWith("data:")) this.#data.push(line.slice(line[5] === " " ? 6 : 5));
    if (line !== "" || this.#data.length === 0) return null;
    const data = this.#data.join("\n");
    this.#data = [];
    return data;
  }
}
