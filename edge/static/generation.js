import { readEvents } from "./events.js";

const ATTEMPTS_TO_BEGIN = 8; // refusals in a row after which it is the person's turn
const ATTEMPTS_TO_RESUME = 12; // lost connections without an event in between
const LONGEST_WAIT_SECONDS = 30;
const LONGEST_STOP_MILLISECONDS = 30000; // after which the server ends it by itself
const LONGEST_STOP_SHOWN_MILLISECONDS = 2000; // a busy server's answer is not waited for

/** A failure told in words. `param` names the refused field, where there is one. */
export class Refusal extends Error {
  constructor(status, body, retryAfterSeconds) {
    const error = body?.error ?? {};
    super(typeof error.message === "string" ? error.message : `The server answered ${status}.`);
    this.status = status;
    this.type = error.type ?? "";
    this.code = error.code ?? "";
    this.param = error.param ?? null;
    this.retryAfterSeconds = retryAfterSeconds;
  }
}

/** Whether asking again soon is worth it. */
function isPassing(refusal) {
  return refusal.status === 429 || refusal.status === 503;
}

/**
 * One answer of POST /v1/streams: asked for, waited for while the server is full, resumed after a lost connection.
 *
 * `listener` is told: started(data), delta(data), finished(data), place(eventId), waiting({reason, seconds}),
 * going() when a wait is over. `run` resolves at the end, and rejects with a Refusal or, for a broken stream, an Error.
 */
export class Generation {
  #body;
  #headers;
  #listener;
  #place;
  #requestId;
  #stopping = Promise.resolve();
  #abort = new AbortController();
  #wake = () => {};

  /**
   * @param place the last event's id, to go on behind it
   * @param requestId of the stream that it is the place in
   */
  constructor(body, headers, listener, place = "", requestId = "") {
    this.#body = JSON.stringify(body);
    this.#headers = headers;
    this.#listener = listener;
    this.#place = place;
    this.#requestId = requestId;
  }

  get isStopped() {
    return this.#abort.signal.aborted;
  }

  /** Ends it, and says so: without a word the model would go on, for a reader who might come back. */
  stop() {
    if (this.isStopped) return;
    this.#abort.abort();
    this.#wake();
    if (!this.#requestId) return;
    this.#stopping = fetch(`v1/streams/${this.#requestId}`, {
      method: "DELETE", headers: this.#headers, keepalive: true, signal: AbortSignal.timeout(LONGEST_STOP_MILLISECONDS),
    }).catch(() => {});
  }

  /** Ends a wait early. */
  hurry() {
    this.#wake();
  }

  async run() {
    let failures = 0;
    while (!this.isStopped) {
      const placeBefore = this.#place;
      try {
        if (await this.#attempt()) return;
      } catch (error) {
        if (this.isStopped) break;
        if (error instanceof Refusal && !isPassing(error)) throw error;
        if (this.#place !== placeBefore) failures = 0;
        failures += 1;
        const most = this.#place ? ATTEMPTS_TO_RESUME : ATTEMPTS_TO_BEGIN;
        if (failures > most) throw error;
        await this.#wait(error, failures);
      }
    }
    await Promise.race([this.#stopping, new Promise((resolve) => setTimeout(resolve, LONGEST_STOP_SHOWN_MILLISECONDS))]);
  }

  /** True at the end of the answer; otherwise it throws. */
  async #attempt() {
    const headers = { "content-type": "application/json", ...this.#headers };
    if (this.#place) headers["last-event-id"] = this.#place;
    const response = await fetch("v1/streams", {
      method: "POST", headers, body: this.#body, signal: this.#abort.signal, cache: "no-store",
    });
    if (response.status === 204) return true; // the last event had come
    if (!response.ok) throw await readRefusal(response);
    this.#listener.going();
    for await (const { event, id, data } of readEvents(response.body)) {
      const value = JSON.parse(data);
      if (event === "failed") throw new Refusal(0, value, 1);
      if (id) {
        this.#place = id;
        this.#listener.place(id);
      }
      if (event === "started") this.#requestId = value.request_id;
      this.#listener[event]?.(value);
      if (event === "finished" && value.usage) return true;
    }
    throw new Error("The connection was lost.");
  }

  async #wait(error, failures) {
    const given = error instanceof Refusal ? error.retryAfterSeconds : Math.min(2 ** (failures - 1), 5);
    const until = Date.now() + 1000 * Math.min(given, LONGEST_WAIT_SECONDS);
    let isHurried = false;
    while (!this.isStopped && !isHurried && Date.now() < until) {
      const seconds = Math.ceil((until - Date.now()) / 1000);
      this.#listener.waiting({ reason: reasonOf(error, this.#place), seconds });
      await new Promise((resolve) => {
        const timer = setTimeout(resolve, Math.min(1000, until - Date.now()));
        this.#wake = () => { isHurried = true; clearTimeout(timer); resolve(); };
      });
    }
    this.#wake = () => {};
  }
}

function reasonOf(error, place) {
  if (!(error instanceof Refusal)) return place ? "The connection was lost." : "The server cannot be reached.";
  if (error.status === 429) return `The server is busy: ${error.message}`;
  return `The server is not available: ${error.message}`;
}

async function readRefusal(response) {
  const milliseconds = Number(response.headers.get("retry-after-ms"));
  const seconds = milliseconds > 0 ? milliseconds / 1000 : Number(response.headers.get("retry-after")) || 2;
  const body = await response.json().catch(() => null);
  return new Refusal(response.status, body, seconds);
}
