// The eventsource package, as a browser's EventSource: GET /v1/streams, reconnecting by itself.
import { EventSource } from 'eventsource';
import { serve } from './lines.mjs';

const KINDS = ['started', 'delta', 'finished', 'failed'];

await serve({
  // What the source gave until it was closed: for good, by the server's answer, and never from here.
  read({ url }) {
    return new Promise((resolve) => {
      const source = new EventSource(url);
      const events = [];
      let opened = 0;
      source.onopen = () => (opened += 1);
      source.onerror = ({ code, message }) => {
        if (source.readyState !== EventSource.CLOSED) return;
        resolve({ events, opened, code: code ?? null, message: message ?? null });
      };
      for (const kind of KINDS) {
        source.addEventListener(kind, ({ data, lastEventId }) =>
          events.push({ kind, data: JSON.parse(data), id: lastEventId }),
        );
      }
    });
  },

  leave({ url }) {
    return new Promise((resolve) => {
      const source = new EventSource(url);
      source.addEventListener('delta', ({ data }) => {
        source.close();
        resolve(JSON.parse(data).text);
      });
    });
  },
});
