// The @huggingface/inference package: chat completions.
import { InferenceClient } from '@huggingface/inference';
import { serve } from './lines.mjs';

const client = ({ url, key }) =>
  new InferenceClient(key, { endpointUrl: `${url}/v1/chat/completions`, retry_on_error: false });

const body = ({ content, model, max_tokens, temperature }) => ({
  model,
  messages: [{ role: 'user', content }],
  max_tokens,
  temperature,
});

const answer = (text, finish_reason, usage) => ({
  text,
  finish_reason,
  prompt_tokens: usage.prompt_tokens,
  completion_tokens: usage.completion_tokens,
});

await serve({
  async ask(question) {
    const { choices, usage } = await client(question).chatCompletion(body(question));
    return answer(choices[0].message.content, choices[0].finish_reason, usage);
  },

  async stream(question) {
    let text = '';
    let finish = null;
    let usage = null;
    const given = { ...body(question), stream_options: { include_usage: true } };
    for await (const chunk of client(question).chatCompletionStream(given)) {
      for (const choice of chunk.choices) {
        text += choice.delta.content ?? '';
        finish = choice.finish_reason ?? finish;
      }
      usage = chunk.usage ?? usage;
    }
    return answer(text, finish, usage);
  },

  async leave(question) {
    // Breaking out of the loop alone leaves the connection open.
    const gone = new AbortController();
    const options = { signal: gone.signal };
    for await (const chunk of client(question).chatCompletionStream(body(question), options)) {
      if (chunk.choices[0]?.delta.content) {
        gone.abort();
        return chunk.choices[0].delta.content;
      }
    }
  },
});
