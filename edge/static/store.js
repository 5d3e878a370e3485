const CONVERSATION = "sluice.conversation";
const SETTINGS = "sluice.settings";
const KEY = "sluice.key";
const MOST_CHARACTERS = 1_000_000; // of a kept conversation; browsers give a page about five times that

/** The kept conversation: [{role: "user", text}, {role: "assistant", …}]. */
export function loadConversation() {
  const kept = read("localStorage", CONVERSATION);
  return Array.isArray(kept) ? kept : [];
}

/** Keep it; probabilities go first where it is too large, then it is not kept. */
export function saveConversation(records) {
  for (const keep of [records, records.map((record) => ({ ...record, tokens: [] }))]) {
    const text = JSON.stringify(keep);
    if (text.length <= MOST_CHARACTERS && write("localStorage", CONVERSATION, text)) return;
  }
  write("localStorage", CONVERSATION, "[]");
}

export function loadSettings() {
  return { ...read("localStorage", SETTINGS), key: read("sessionStorage", KEY) ?? "" };
}

export function saveSettings({ key, ...settings }) {
  write("localStorage", SETTINGS, JSON.stringify(settings));
  write("sessionStorage", KEY, JSON.stringify(key));
}

// A browser that keeps nothing for this page throws as soon as it is asked for a storage.
function read(storage, name) {
  try {
    return JSON.parse(window[storage].getItem(name));
  } catch {
    return null;
  }
}

function write(storage, name, text) {
  try {
    window[storage].setItem(name, text);
    return true;
  } catch {
    return false; // full, or not allowed: the page works without
  }
}
