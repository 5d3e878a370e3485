// The @anthropic-ai/sdk package: messages.
import Anthropic from '@anthropic-ai/sdk';
import { serve } from './lines.mjs';

const client = ({ url, key }) => new Anthropic({ baseURL: url, apiKey: key, maxRetries: 0 });

const body = ({ content, model, max_tokens, temperature }) => ({
  model,
  messages: [{ role: 'user', content }],
  max_tokens,
  temperature,
});

const answer = (message) => ({
  text: message.content.map((block) => block.text).join(''),
  finish_reason: message.stop_reason,
  prompt_tokens: message.usage.input_tokens + message.usage.cache_read_input_tokens,
  completion_tokens: message.usage.output_tokens,
});

await serve({
  async ask(question) {
    return answer(await client(question).messages.create(body(question)));
  },

  async stream(question) {
    const stream = client(question).messages.stream(body(question));
    let text = '';
    for await (const event of stream) {
      if (event.type === 'content_block_delta') text += event.delta.text;
    }
    const final = answer(await stream.finalMessage());
    if (text !== final.text) throw new Error(`streamed ${text}, accumulated ${final.text}`);
    return final;
  },

  async leave(question) {
    const stream = client(question).messages.stream(body(question));
    for await (const event of stream) {
      if (event.type === 'content_block_delta') {
        stream.abort();
        return event.delta.text;
      }
    }
  },
});
