// The openai package: chat completions.
import OpenAI from 'openai';
import { serve } from './lines.mjs';

const client = ({ url, key }) => new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });

const body = ({ content, model, max_tokens, temperature, seed }) => ({
  model,
  messages: [{ role: 'user', content }],
  max_tokens,
  temperature,
  seed,
});

const answer = (text, finish_reason, usage) => ({
  text,
  finish_reason,
  prompt_tokens: usage.prompt_tokens,
  completion_tokens: usage.completion_tokens,
});

await serve({
  async ask(question) {
    const { choices, usage } = await client(question).chat.completions.create(body(question));
    return answer(choices[0].message.content, choices[0].finish_reason, usage);
  },

  async stream(question) {
    const stream = await client(question).chat.completions.create({
      ...body(question),
      stream: true,
      stream_options: { include_usage: true },
    });
    let text = '';
    let finish = null;
    let usage = null;
    for await (const chunk of stream) {
      for (const choice of chunk.choices) {
        text += choice.delta.content ?? '';
        finish = choice.finish_reason ?? finish;
      }
      usage = chunk.usage ?? usage;
    }
    return answer(text, finish, usage);
  },

  async leave(question) {
    const stream = await client(question).chat.completions.create({ ...body(question), stream: true });
    for await (const chunk of stream) {
      if (chunk.choices[0]?.delta.content) {
        stream.controller.abort();
        return chunk.choices[0].delta.content;
      }
    }
  },
});
