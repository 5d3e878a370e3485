// The ai and @ai-sdk/react packages: useChat and useCompletion, rendered as a page would have them.
import { useChat, useCompletion } from '@ai-sdk/react';
import {
  DefaultChatTransport,
  TextStreamChatTransport,
  lastAssistantMessageIsCompleteWithToolCalls,
} from 'ai';
import { createElement } from 'react';
import { act, create } from 'react-test-renderer';
import { serve } from './lines.mjs';

globalThis.IS_REACT_ACT_ENVIRONMENT = true;

const TRANSPORTS = { data: DefaultChatTransport, text: TextStreamChatTransport };

// What the hook returns now, and what it told its callbacks.
async function rendered(hook, options) {
  const seen = { now: null, finished: [], errors: [] };
  function Page() {
    seen.now = hook({
      ...options,
      onFinish: (event) => seen.finished.push(event),
      onError: (error) => seen.errors.push(error),
    });
    return null;
  }
  await act(async () => {
    seen.root = create(createElement(Page));
  });
  return seen;
}

const page = ({ url, path, protocol = 'data', body, id, messages, resume }, more = {}) =>
  rendered(useChat, {
    id,
    messages,
    resume,
    transport: new TRANSPORTS[protocol]({ api: url + path, body }),
    ...more,
  });

const shown = ({ now, finished }) => ({
  id: now.id,
  status: now.status,
  error: now.error ? { message: now.error.message, status: now.error.statusCode ?? null } : null,
  messages: JSON.parse(JSON.stringify(now.messages)),
  finish_reasons: finished.map((event) => event.finishReason ?? null),
});

async function until(condition) {
  while (!condition()) {
    await act(async () => new Promise((done) => setTimeout(done, 5)));
  }
}

const text = (message) =>
  (message?.parts ?? []).map((part) => (part.type === 'text' ? part.text : '')).join('');

// The page with an answer under way.
let open = null;

async function begin({ turn, ...given }) {
  const seen = await page(given);
  open = { seen };
  await act(async () => {
    open.sending = seen.now.sendMessage({ text: turn });
  });
  await until(() => seen.now.messages.length > 1 && text(seen.now.messages.at(-1)));
}

await serve({
  // One conversation; each turn is sent when the one before it has its answer.
  async chat({ turns, ...given }) {
    const seen = await page(given);
    for (const turn of turns) {
      await act(async () => seen.now.sendMessage({ text: turn }));
    }
    return shown(seen);
  },

  // A conversation whose last answer is asked for again.
  async regenerate({ turns, ...given }) {
    const seen = await page(given);
    for (const turn of turns) {
      await act(async () => seen.now.sendMessage({ text: turn }));
    }
    const before = shown(seen);
    await act(async () => seen.now.regenerate());
    return { before, after: shown(seen) };
  },

  // The page runs the tool, and the hook sends its result by itself.
  async use_tool({ turn, output, failure, ...given }) {
    const seen = await page(given, {
      sendAutomaticallyWhen: lastAssistantMessageIsCompleteWithToolCalls,
      onToolCall: ({ toolCall }) => {
        const call = { tool: toolCall.toolName, toolCallId: toolCall.toolCallId };
        seen.now.addToolOutput(
          failure ? { ...call, state: 'output-error', errorText: failure } : { ...call, output },
        );
      },
    });
    await act(async () => seen.now.sendMessage({ text: turn }));
    await until(() => seen.finished.length > 1 || seen.now.error);
    return shown(seen);
  },

  // The stop button, after the first text.
  async stop(given) {
    await begin(given);
    await act(async () => {
      await open.seen.now.stop();
      await open.sending;
    });
    return shown(open.seen);
  },

  // An answer up to its first text; the page stays open.
  async begin(given) {
    await begin(given);
    return shown(open.seen);
  },

  // That page, once its answer is over or lost.
  async end() {
    await act(async () => open.sending);
    return shown(open.seen);
  },

  // The page is loaded again: it has what was asked, and resumes.
  async reload({ id, messages, ...given }) {
    await act(async () => open.seen.root.unmount());
    const back = await page({ ...given, id, messages: messages.slice(0, 1), resume: true });
    await until(() => back.finished.length > 0 || back.now.error);
    return shown(back);
  },

  // What useCompletion makes of a prompt.
  async complete({ url, path, protocol = 'data', prompt, body }) {
    const seen = await rendered(useCompletion, { api: url + path, streamProtocol: protocol, body });
    let returned;
    await act(async () => {
      returned = await seen.now.complete(prompt);
    });
    return {
      text: seen.now.completion,
      returned: returned ?? null,
      finished: seen.finished.length,
      error: seen.errors[0]?.message ?? null,
    };
  },
});
