// The @microsoft/fetch-event-source package: POST /v1/streams, reconnecting by itself.
import { serve } from './lines.mjs';

// It is made for browsers, and asks them whether their page is seen.
globalThis.window = globalThis;
globalThis.document = { hidden: false, addEventListener() {}, removeEventListener() {} };
const { fetchEventSource } = await import('@microsoft/fetch-event-source');

class Refused extends Error {
  constructor(status, body) {
    super(body.error.message);
    this.status = status;
    this.error = body.error;
  }
}

const request = (body, key) => ({
  method: 'POST',
  headers: { 'content-type': 'application/json', ...(key && { authorization: `Bearer ${key}` }) },
  body: JSON.stringify(body),
  async onopen(response) {
    if (response.status !== 200) throw new Refused(response.status, await response.json());
  },
  onerror(error) {
    if (error instanceof Refused) throw error; // else it asks again for ever
    return 50; // milliseconds until it asks again
  },
});

await serve({
  async read({ url, body, key }) {
    const events = [];
    let opened = 0;
    const given = request(body, key);
    await fetchEventSource(url, {
      ...given,
      async onopen(response) {
        opened += 1;
        await given.onopen(response);
      },
      onmessage({ event, data, id }) {
        events.push({ kind: event, data: JSON.parse(data), id });
        // a stream that failed breaks off, after which it would ask again
        if (event === 'failed') throw new Refused(200, JSON.parse(data));
      },
    });
    return { events, opened };
  },

  async leave({ url, body }) {
    const gone = new AbortController();
    let text = null;
    await fetchEventSource(url, {
      ...request(body),
      signal: gone.signal,
      onmessage({ event, data }) {
        if (event !== 'delta' || text !== null) return;
        text = JSON.parse(data).text;
        gone.abort();
      },
    });
    return text;
  },
});
