// Serves functions to the tests: one JSON object a line in, one out (see ../foreign_process.py).
import { createInterface } from 'node:readline';

console.log = console.error; // stdout is the answers' alone

export async function serve(functions) {
  for await (const line of createInterface({ input: process.stdin })) {
    const { call, arguments: given } = JSON.parse(line);
    let reply;
    try {
      reply = { value: (await functions[call](given)) ?? null };
    } catch (error) {
      reply = { raised: describe(error) };
    }
    process.stdout.write(JSON.stringify(reply) + '\n');
  }
  process.exit(0); // whatever a client still holds open
}

function describe(error) {
  return {
    name: error?.constructor?.name ?? typeof error,
    message: String(error?.message ?? error),
    status: error?.status ?? error?.statusCode ?? error?.httpResponse?.status ?? null,
    code: error?.code ?? null,
    body: error?.error ?? error?.data ?? error?.httpResponse?.body ?? null,
    cause: error?.cause ? describe(error.cause) : null,
  };
}
