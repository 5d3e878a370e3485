"""No client library at all: HTTP by hand."""

import asyncio
import contextlib
import re

from tests.edge.edge_process import EdgeProcess
from tests.edge.raw_http import RawClient
from tests.edge.scripted_worker import ScriptedWorker
from tests.edge.sse import openai_chunks


async def test_http_1_0_without_keep_alive(edge: EdgeProcess) -> None:
    body = b'{"prompt":"x","stream":true}'
    head = b"POST /v1/completions HTTP/1.0\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with RawClient(edge.port) as client:
        await client.send(head + body)
        answer = await client.read_to_end()
    head, _, stream = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\nconnection: close" in head
    assert b"transfer-encoding" not in head
    assert len(openai_chunks(stream)) == 4


async def test_http_1_0_with_a_length(edge: EdgeProcess) -> None:
    async with RawClient(edge.port) as client:
        await client.send(b"GET /health HTTP/1.0\r\n\r\n")
        head, _, body = (await client.read_to_end()).partition(b"\r\n\r\n")
    assert b"\r\ncontent-length: 15\r\n" in head
    assert body == b'{"status":"ok"}'


async def test_a_body_in_single_bytes(edge: EdgeProcess) -> None:
    body = b'{"prompt":"x"}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with RawClient(edge.port) as client:
        for byte in head + body:
            await client.send(bytes([byte]))
        answer = await client.read_until(b'"usage"')
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")


async def test_connect_is_refused(edge: EdgeProcess) -> None:
    async with RawClient(edge.port) as client:
        await client.send(b"CONNECT example.com:443 HTTP/1.1\r\nhost: example.com\r\n\r\n")
        assert (await client.read_to_end()).startswith(b"HTTP/1.1 400")


async def test_what_is_no_http_is_a_400(edge: EdgeProcess) -> None:
    async with RawClient(edge.port) as client:
        await client.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
        answer = await client.read_to_end()
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'{"error":{"message":' in answer
    request_id = re.search(rb"\r\nx-request-id: (req-\w+)\r\nrequest-id: \1\r\n", answer)
    assert request_id
    line = await edge.line(lambda line: line.get("request_id") == request_id[1].decode())
    assert (line["event"], line["status"]) == ("request", 400)


async def test_endless_headers_are_a_431(edge: EdgeProcess) -> None:
    line = b"x-filler: " + b"y" * 1000 + b"\r\n"
    async with RawClient(edge.port) as client:
        await client.send(b"GET /health HTTP/1.1\r\nhost: x\r\n" + line * 30)
        await client.send(b"\r\n")
        assert b"HTTP/1.1 200" in await client.read_until(b"ok")
    async with RawClient(edge.port) as client:
        await client.send(b"GET /health HTTP/1.1\r\nhost: x\r\n" + line * 66)
        assert (await client.read_to_end()).startswith(b"HTTP/1.1 431")


async def test_endless_trailers_are_a_431(edge: EdgeProcess, worker: ScriptedWorker) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    body = b'e\r\n{"prompt":"x"}\r\n0\r\n'
    async with RawClient(edge.port) as client:
        await client.send(head + body + b"x-request-id: from-a-trailer\r\n\r\n")
        answer = await client.read_until(b"usage")
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"from-a-trailer" not in answer
    calls = len(worker.calls)
    line = b"x-filler: " + b"y" * 1000 + b"\r\n"
    for trailers in ([line] * 66, [b"x-filler: ", *[b"y" * 1000] * 66], [line * 66]):
        async with RawClient(edge.port) as client:
            await client.send(head + body)
            with contextlib.suppress(ConnectionError):  # which may be closed before the last of it
                for trailer in trailers:
                    await asyncio.sleep(0.001)
                    await client.send(trailer)
            assert (await client.read_to_end()).count(b"HTTP/1.1 431") == 1
    assert len(worker.calls) == calls


async def test_a_head_in_one_piece_is_limited_too(edge: EdgeProcess) -> None:
    for head in (b"x-filler: " + b"y" * 66_000, b"x: y\r\n" * 12_000):
        async with RawClient(edge.port) as client:
            await client.send(b"GET /health HTTP/1.1\r\nhost: x\r\n" + head + b"\r\n\r\n")
            assert (await client.read_to_end()).startswith(b"HTTP/1.1 431")


async def test_a_body_in_tiny_chunks_is_no_head(edge: EdgeProcess) -> None:
    body = b'{"prompt":"' + b"x" * 20_000 + b'"}'
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    async with RawClient(edge.port) as client:
        await client.send(head + chunks)
        assert (await client.read_until(b"usage")).startswith(b"HTTP/1.1 200")


async def test_an_event_source_by_hand(edge: EdgeProcess) -> None:
    async with RawClient(edge.port) as client:
        await client.send(
            b"GET /v1/streams?prompt=hi&max_tokens=3 HTTP/1.1\r\nhost: x\r\n"
            b"accept: text/event-stream\r\ncache-control: no-cache\r\n\r\n"
        )
        answer = await client.read_until(b"0\r\n\r\n")
    assert b"content-type: text/event-stream; charset=utf-8\r\n" in answer
    assert answer.count(b"event: delta\n") == 3
    assert answer.count(b"event: finished\n") == 1


async def test_an_offer_to_upgrade_is_ignored(edge: EdgeProcess) -> None:
    """Java's HttpClient makes it with every first request."""
    body = b'{"prompt":"x"}'
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: Upgrade, HTTP2-Settings\r\n"
        b"upgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAAB\r\ncontent-length: %d\r\n\r\n"
    )
    async with RawClient(edge.port) as client:
        for parts in ([head % len(body) + body], [head % len(body), body]):
            client.received = b""
            for part in parts:
                await client.send(part)
                await asyncio.sleep(0.05)
            answer = await client.read_until(b'"usage"')
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
