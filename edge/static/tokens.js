import { element } from "./markdown.js";

const DOUBTS = [0.95, 0.8, 0.6, 0.4, 0.2]; // probabilities below which a token is a shade darker

/**
 * Elements of tokens, one each, whose texts joined are exactly the text.
 *
 * @param tokens [{text, logprob, top}], `first` the index of the first of them
 */
export function tokenElements(tokens, first) {
  return tokens.map((token, offset) => {
    const span = element("span", "token");
    span.dataset.index = String(first + offset);
    const probability = Math.exp(token.logprob ?? 0);
    span.dataset.doubt = String(DOUBTS.filter((bound) => probability < bound).length);
    if (token.text === "") span.append(element("span", "sign", "·")); // a part of a character
    else if (token.text.includes("\n")) span.append(element("span", "sign", "⏎"), token.text);
    else span.append(token.text);
    return span;
  });
}

/** Texts of tokens from their bytes: a character that several tokens make up belongs to the last of them. */
export class TokenTexts {
  #decoder = new TextDecoder("utf-8", { ignoreBOM: true });

  next(bytes) {
    return this.#decoder.decode(new Uint8Array(bytes), { stream: true });
  }
}

/** The box that shows what else could have stood at a token's place. */
export class CandidateBox {
  constructor(box) {
    this.#box = box;
  }

  #box;

  show(token, target) {
    const table = element("table");
    const drawn = { token: token.shown, token_id: token.id, logprob: token.logprob };
    const all = token.top.some((entry) => entry.token_id === token.id) ? token.top : [...token.top, drawn];
    for (const entry of all) {
      const probability = Math.exp(entry.logprob ?? -Infinity);
      const row = table.insertRow();
      if (entry.token_id === token.id) row.className = "drawn";
      row.insertCell().textContent = visible(entry.token);
      row.insertCell().textContent = percent(probability);
      const meter = element("meter");
      meter.value = probability;
      row.insertCell().append(meter);
    }
    this.#box.replaceChildren(table);
    this.#box.hidden = false;
    const place = target.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.#box;
    const left = Math.max(8, Math.min(place.left, innerWidth - width - 8));
    const top = place.bottom + height + 8 < innerHeight ? place.bottom + 6 : place.top - height - 6;
    this.#box.style.left = `${left}px`;
    this.#box.style.top = `${Math.max(8, top)}px`;
  }

  hide() {
    this.#box.hidden = true;
  }
}

function visible(text) {
  return text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "(empty)";
}

function percent(probability) {
  const value = 100 * probability;
  if (value > 0 && value < 0.1) return "< 0.1 %";
  return `${value.toFixed(value >= 99.95 ? 0 : 1)} %`;
}
