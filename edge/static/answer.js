import { copyText, element, parseBlocks, renderBlock } from "./markdown.js";
import { tokenElements } from "./tokens.js";

const REASONS = {
  stop: "", stop_sequence: "stopped at a stop sequence", length: "cut at the token limit", cancelled: "stopped",
  deadline: "cut at the time limit", shutdown: "cut by a shutdown of the server", preempted: "cut: the server ran out of memory",
  slow_reader: "cut: not read fast enough", tool_calls: "tool call",
};

/**
 * One answer on the page: its text in the chosen view, its figures, and what went wrong.
 *
 * `record` is what is kept: {role, text, tokens, count, firstTokenSeconds, seconds, decodeSeconds, reason, usage, failure,
 * place}.
 */
export class Answer {
  constructor(record, actions) {
    this.record = record;
    this.#actions = actions;
    this.root = element("article", "answer");
    this.#thoughts = element("details", "thoughts");
    this.#thoughts.append(element("summary", "", "Reasoning"), element("div", "exact"));
    this.#thoughts.hidden = true;
    this.#body = element("div", "answer-body formatted");
    this.#notice = element("div", "notice");
    this.#notice.hidden = true;
    this.#foot = element("p", "foot");
    this.root.append(this.#thoughts, this.#body, this.#notice, this.#foot);
  }

  #actions;
  #thoughts;
  #body;
  #notice;
  #foot;
  #view = "";
  #shown = []; // sources of the blocks on the page, or how much of the text or how many tokens
  #isWriting = false;

  /** Bring the page up to the record. */
  draw(view, isWriting, seconds) {
    if (view !== this.#view) {
      this.#view = view;
      this.#shown = [];
      this.#body.replaceChildren();
      this.#body.className = `answer-body ${{ formatted: "formatted", plain: "exact", tokens: "exact tokens" }[view]}`;
    }
    this.#isWriting = isWriting;
    this.#body.classList.toggle("writing", isWriting);
    if (this.record.reasoning) this.#drawThoughts();
    if (view === "formatted") this.#drawBlocks();
    else if (view === "plain") this.#drawRest(this.record.text, (rest) => [rest]);
    else this.#drawTokens();
    this.#drawFoot(seconds);
  }

  #drawThoughts() {
    const shown = this.#thoughts.lastChild;
    if (this.#thoughts.hidden) {
      this.#thoughts.hidden = false;
      this.#thoughts.open = this.#isWriting;
    }
    shown.append(this.record.reasoning.slice(shown.textContent.length));
  }

  #drawBlocks() {
    const blocks = this.record.text ? parseBlocks(this.record.text) : [];
    let same = 0;
    while (same < blocks.length && blocks[same].source === this.#shown[same]) same += 1;
    while (this.#body.childNodes.length > same) this.#body.lastChild.remove();
    for (const block of blocks.slice(same)) this.#body.append(renderBlock(block));
    this.#shown = blocks.map((block) => block.source);
  }

  #drawRest(all, make) {
    const done = this.#shown[0] ?? 0;
    if (all.length > done) this.#body.append(...make(all.slice(done)));
    this.#shown = [all.length];
  }

  #drawTokens() {
    if (this.record.tokens.length) {
      this.#drawRest(this.record.tokens, (rest) => tokenElements(rest, this.#shown[0] ?? 0));
      this.#body.tabIndex = 0;
      this.#body.setAttribute("aria-label", "Tokens; the arrow keys move through them");
    } else if (!this.#isWriting && this.record.text && !this.#shown.length) {
      this.#shown = [1];
      this.#body.textContent = `${this.record.text}\n\n(This answer came without its probabilities.)`;
    }
  }

  /** The token that an element of the page shows. */
  tokenOf(target) {
    return this.record.tokens[Number(target.dataset.index)];
  }

  #drawFoot(seconds) {
    const { record } = this;
    const parts = [];
    if (record.count) {
      parts.push(`${record.count} token${record.count === 1 ? "" : "s"}`);
      // A busy page gets many tokens at once; the worker's clock tells how long they took to make.
      const decoding = Math.max((seconds ?? record.seconds) - record.firstTokenSeconds, record.decodeSeconds ?? 0);
      if (record.count > 1 && decoding > 0) parts.push(`${rate((record.count - 1) / decoding)} tokens/s`);
      parts.push(`first token after ${milliseconds(record.firstTokenSeconds)}`);
    }
    if (record.usage?.cached_tokens) parts.push(`${record.usage.cached_tokens} of ${record.usage.prompt_tokens} prompt tokens cached`);
    if (REASONS[record.reason]) parts.push(REASONS[record.reason]);
    this.#foot.replaceChildren(...parts.map((part) => element("span", "", part)));
    if (this.#isWriting) return;
    if (record.text) this.#foot.append(this.#button("Copy", (button) => copyText(record.text, button)));
    if (this.#actions.isLast(this)) this.#foot.append(this.#button("Regenerate", () => this.#actions.regenerate()));
  }

  /** Say why nothing comes for now, with the seconds left until the next attempt. */
  showWaiting({ reason, seconds }, actions) {
    this.#showNotice("waiting", `${reason} Trying again in ${seconds} s.`, [
      ["Try now", actions.hurry], ["Give up", actions.stop],
    ]);
  }

  showFailure(text) {
    this.#showNotice("failed", text, []);
  }

  clearNotice() {
    this.#notice.hidden = true;
  }

  #showNotice(kind, text, buttons) {
    if (this.#notice.hidden || this.#notice.dataset.kind !== kind) {
      this.#notice.replaceChildren(element("p"), ...buttons.map(([label, act]) => this.#button(label, act)));
      this.#notice.dataset.kind = kind;
      this.#notice.setAttribute("role", kind === "failed" ? "alert" : "group");
      this.#notice.hidden = false;
    }
    this.#notice.firstChild.textContent = text; // the buttons stay, with their focus
  }

  #button(label, act) {
    const button = element("button", "", label);
    button.type = "button";
    button.addEventListener("click", () => act(button));
    return button;
  }
}

function rate(tokensPerSecond) {
  return tokensPerSecond.toFixed(tokensPerSecond < 100 ? 1 : 0);
}

function milliseconds(seconds) {
  return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`;
}
