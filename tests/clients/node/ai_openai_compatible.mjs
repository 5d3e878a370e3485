// The AI SDK: generateText and streamText through @ai-sdk/openai-compatible.
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateText, streamText } from 'ai';
import { serve } from './lines.mjs';

const given = ({ url, key, content, model, max_tokens, temperature }) => ({
  model: createOpenAICompatible({
    name: 'sluice',
    baseURL: `${url}/v1`,
    apiKey: key,
    includeUsage: true,
  })(model),
  prompt: content,
  maxOutputTokens: max_tokens,
  temperature,
  maxRetries: 0,
});

const answer = (text, finish_reason, usage) => ({
  text,
  finish_reason,
  prompt_tokens: usage.inputTokens,
  completion_tokens: usage.outputTokens,
});

// streamText throws nothing: what goes wrong is a part of the stream.
async function* parts(options) {
  for await (const part of streamText({ ...options, onError() {} }).fullStream) {
    if (part.type === 'error') throw part.error;
    yield part;
  }
}

await serve({
  async ask(question) {
    const { text, finishReason, usage } = await generateText(given(question));
    return answer(text, finishReason, usage);
  },

  async stream(question) {
    let text = '';
    let last = null;
    for await (const part of parts(given(question))) {
      if (part.type === 'text-delta') text += part.text;
      if (part.type === 'finish') last = part;
    }
    return answer(text, last.finishReason, last.totalUsage);
  },

  async leave(question) {
    // Breaking out of the loop alone leaves the connection open.
    const gone = new AbortController();
    for await (const part of parts({ ...given(question), abortSignal: gone.signal })) {
      if (part.type === 'text-delta' && part.text) {
        gone.abort();
        return part.text;
      }
    }
  },
});
