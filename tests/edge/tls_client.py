"""Clients that trust the tests' authority."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator

import httpx

from tests.edge.certificates import Certificates
from tests.edge.edge_process import PATIENCE, EdgeProcess

CHAT = {"messages": [{"role": "user", "content": "hi"}], "stream": True}


def trusting(certificates: Certificates) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificates.ca))


@contextlib.asynccontextmanager
async def connected(
    edge: EdgeProcess, context: ssl.SSLContext
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    # What is read ahead is bounded, so that a reader that stops is soon felt.
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port, ssl=context, limit=4096)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def status_of(edge: EdgeProcess) -> int:
    async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE) as http:
        answer = await http.post(f"{edge.url}/v1/chat/completions", json=CHAT)
        assert answer.status_code != 200 or answer.text.endswith("data: [DONE]\n\n")
        return answer.status_code
