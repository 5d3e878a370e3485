import { Answer } from "./answer.js";
import { Generation, Refusal } from "./generation.js";
import { element } from "./markdown.js";
import { loadConversation, loadSettings, saveConversation, saveSettings } from "./store.js";
import { CandidateBox, TokenTexts } from "./tokens.js";

const SUGGESTIONS = ["Count to 10", "What is streaming?", "Tell me a story", "Show me Python code that prints hello"];
const CANDIDATES = 5; // asked for at each token
const RESUME_SECONDS = 60; // for which an answer may be gone on with after the connection was lost, or the page left
const STATUS_SECONDS = 10; // between looks at the server
const SAVE_MILLISECONDS = 1000;
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];

const $ = (id) => document.getElementById(id);
const conversation = $("conversation");
const question = $("question");
const settings = $("settings-form");
const candidates = new CandidateBox($("candidates"));

let records = []; // of the whole conversation
let answers = []; // the Answers among them
let current = null; // {generation, answer, since, firstAt} while one is written
let saveTimer = 0;

// --- the conversation -------------------------------------------------------------------------------------------

function show(record) {
  $("welcome").hidden = true;
  if (record.role === "user") {
    const article = element("article", "question exact", record.text);
    conversation.append(article);
    return article;
  }
  const answer = new Answer(record, { isLast: (one) => one === answers.at(-1), regenerate });
  answers.push(answer);
  conversation.append(answer.root);
  answer.draw(view(), false);
  if (record.failure) answer.showFailure(record.failure);
  return answer;
}

function newRecord() {
  return {
    role: "assistant", text: "", reasoning: "", tokens: [], count: 0, firstTokenSeconds: 0, seconds: 0, decodeSeconds: 0, reason: "", usage: null,
    failure: "", request: null, place: "", requestId: "",
  };
}

function ask(text) {
  const record = { role: "user", text };
  records.push(record);
  show(record);
  answerLast();
}

function answerLast() {
  const record = newRecord();
  record.request = requestBody();
  records.push(record);
  const answer = show(record);
  for (const earlier of answers.slice(0, -1)) earlier.draw(view(), false); // only the last offers to regenerate
  write(answer);
}

function regenerate() {
  if (current || records.at(-1)?.role !== "assistant") return;
  records.pop();
  answers.pop().root.remove();
  answerLast();
}

function requestBody() {
  const messages = records
    .filter((record) => record.text)
    .map(({ role, text }) => ({ role, content: text }));
  const given = readSettings();
  if (given.system) messages.unshift({ role: "system", content: given.system });
  const body = { messages, logprobs: CANDIDATES, resume_window: RESUME_SECONDS };
  for (const name of NUMBERS) if (given[name] !== "") body[name] = Number(given[name]);
  const stop = given.stop.split("\n").filter(Boolean);
  if (stop.length) body.stop = stop;
  return body;
}

// --- one answer -------------------------------------------------------------------------------------------------

async function write(answer) {
  const { record } = answer;
  const key = readSettings().key;
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const since = performance.now() - 1000 * record.seconds;
  const generation = new Generation(record.request, headers, listener(answer), record.place, record.requestId);
  current = { generation, answer, since };
  setWriting(true);
  follow(true);
  try {
    await generation.run();
    if (generation.isStopped) record.reason = "cancelled";
  } catch (error) {
    record.failure = failureText(error);
    markRefused(error);
    answer.showFailure(record.failure);
  }
  if (!record.failure) answer.clearNotice();
  record.seconds = (performance.now() - since) / 1000;
  record.request = null;
  current = null;
  setWriting(false);
  answer.draw(view(), false);
  follow();
  save(true);
  $("announcement").textContent = record.failure || "The answer is complete.";
}

function listener(answer) {
  const { record } = answer;
  const texts = new TokenTexts();
  return {
    going: () => answer.clearNotice(),
    waiting(wait) {
      answer.showWaiting(wait, {
        hurry: () => current?.generation.hurry(), stop: () => current?.generation.stop(),
      });
      follow();
    },
    place: (id) => { record.place = id; },
    started: (data) => { record.requestId = data.request_id; },
    delta(data) {
      if (!record.count) record.firstTokenSeconds = elapsed();
      record.count += data.token_count;
      record.text += data.text;
      record.reasoning += data.reasoning ?? "";
      for (const { token, token_id: id, bytes, logprob, top } of data.logprobs ?? []) {
        record.tokens.push({ text: texts.next(bytes), shown: token, id, logprob, top: top.map(({ token: t, token_id, logprob: l }) => ({ token: t, token_id, logprob: l })) });
      }
      redraw();
      save();
    },
    finished(data) {
      record.reason = data.finish_reason;
      record.usage = data.usage ?? null;
      record.decodeSeconds = data.timings?.decode_seconds ?? 0;
    },
  };
}

function elapsed() {
  return (performance.now() - current.since) / 1000;
}

function failureText(error) {
  if (!(error instanceof Refusal)) return `${error.message} What came of the answer is above; it cannot be continued.`;
  if (error.code === "resume_not_supported" || error.status === 410) return "The connection was lost, and this answer cannot be continued. Regenerate it.";
  if (error.status === 0) return `The answer broke off: ${error.message}`;
  if (error.status === 401 || error.status === 403) return `${error.message} Give an API key in the settings.`;
  return error.param ? `The server refused ${error.param}: ${error.message}` : error.message;
}

let drawing = 0;
function redraw() {
  drawing ||= requestAnimationFrame(() => {
    drawing = 0;
    if (!current) return;
    current.answer.draw(view(), true, elapsed());
    follow();
  });
}

let isFollowing = true;
/** Keep the end in sight, unless somebody has scrolled away from it. */
function follow(always = false) {
  if (always) isFollowing = true;
  if (isFollowing) conversation.scrollTop = conversation.scrollHeight;
}

function setWriting(isWriting) {
  $("send").hidden = isWriting;
  $("stop").hidden = !isWriting;
  if (isWriting) current.answer.draw(view(), true, 0);
}

function save(now = false) {
  clearTimeout(saveTimer);
  if (now) saveConversation(records);
  else saveTimer = setTimeout(() => saveConversation(records), SAVE_MILLISECONDS);
}

// --- settings and views -----------------------------------------------------------------------------------------

function view() {
  return document.querySelector("input[name=view]:checked").value;
}

function readSettings() {
  return Object.fromEntries([...new FormData(settings)].map(([name, value]) => [name, String(value)]));
}

function markRefused(error) {
  const name = error instanceof Refusal ? error.param : null;
  for (const field of settings.elements) field.classList.toggle("refused", Boolean(name) && field.name === name);
}

function openSettings(isOpen) {
  $("settings").hidden = !isOpen;
  $("open-settings").setAttribute("aria-expanded", String(isOpen));
  (isOpen ? settings.elements.system : $("open-settings")).focus();
}

async function lookAtServer() {
  let state = "not-ready";
  try {
    const key = readSettings().key;
    const answer = await fetch("v1/models", { cache: "no-store", headers: key ? { authorization: `Bearer ${key}` } : {} });
    const body = await answer.json();
    if (answer.ok) {
      state = "ready";
      $("model-name").textContent = body.data[0].id;
    } else $("model-name").textContent = body.error.message;
  } catch {
    $("model-name").textContent = "The server cannot be reached.";
  }
  $("light").dataset.state = state;
}

// --- what people do ---------------------------------------------------------------------------------------------

function submit() {
  const text = question.value;
  if (current || text.trim() === "") return;
  question.value = "";
  grow();
  ask(text);
}

function grow() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight + 2}px`;
}

$("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
question.addEventListener("input", grow);
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
$("stop").addEventListener("click", () => { current?.generation.stop(); question.focus(); });
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    candidates.hide();
    if (current) current.generation.stop();
    else if (!$("settings").hidden) openSettings(false);
  } else if (event.altKey && event.code === "KeyR") {
    event.preventDefault();
    regenerate();
  }
});
$("new-chat").addEventListener("click", () => {
  current?.generation.stop();
  records = [];
  answers = [];
  conversation.replaceChildren($("welcome"));
  $("welcome").hidden = false;
  save(true);
  question.focus();
});
$("open-settings").addEventListener("click", () => openSettings($("settings").hidden));
$("close-settings").addEventListener("click", () => openSettings(false));
settings.addEventListener("submit", (event) => event.preventDefault());
settings.addEventListener("input", () => saveSettings(readSettings()));
settings.elements.key.addEventListener("change", lookAtServer);
settings.addEventListener("reset", () => setTimeout(() => { markRefused(null); saveSettings(readSettings()); }));
for (const choice of document.querySelectorAll("input[name=view]")) {
  choice.addEventListener("change", () => {
    candidates.hide();
    for (const answer of answers) answer.draw(view(), answer === current?.answer, answer === current?.answer ? elapsed() : undefined);
    follow();
  });
}
conversation.addEventListener("scroll", () => {
  isFollowing = conversation.scrollHeight - conversation.scrollTop - conversation.clientHeight < 40;
  candidates.hide();
}, { passive: true });

// --- token probabilities: by pointer, and by arrow keys ---------------------------------------------------------

function showCandidates(target) {
  const answer = answers.find((one) => one.root.contains(target));
  const token = answer?.tokenOf(target);
  if (token) candidates.show(token, target);
}

conversation.addEventListener("pointerover", (event) => {
  const target = event.target.closest(".token");
  if (target) showCandidates(target);
  else candidates.hide();
});
conversation.addEventListener("pointerleave", () => candidates.hide());
conversation.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const tokens = event.target.closest?.(".tokens");
  if (!step || !tokens) return;
  event.preventDefault();
  const marked = tokens.querySelector(".current");
  const next = marked ? (step > 0 ? marked.nextElementSibling : marked.previousElementSibling) : tokens.querySelector(".token");
  if (!next) return;
  marked?.classList.remove("current");
  next.classList.add("current");
  next.scrollIntoView({ block: "nearest" });
  showCandidates(next);
});

// --- the start --------------------------------------------------------------------------------------------------

function start() {
  for (const text of SUGGESTIONS) {
    const button = element("button", "", text);
    button.type = "button";
    button.addEventListener("click", () => { if (!current) ask(text); });
    $("suggestions").append(button);
  }
  const kept = loadSettings();
  for (const field of settings.elements) if (field.name && kept[field.name] !== undefined) field.value = kept[field.name];
  records = loadConversation();
  records.forEach(show);
  const last = records.at(-1);
  if (last?.role === "assistant" && last.request) write(answers.at(-1)); // the page was left while it was written
  else if (last?.role === "user") answerLast();
  follow(true);
  lookAtServer();
  setInterval(() => { if (!document.hidden) lookAtServer(); }, 1000 * STATUS_SECONDS);
  question.focus();
}

addEventListener("pagehide", () => {
  if (current) current.answer.record.seconds = elapsed();
  if (records.length) saveConversation(records);
});
start();
