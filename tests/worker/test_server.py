"""What the server offers besides the service: descriptions, health, reflection, limits."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from inference_worker.scripted_model import ScriptedSettings, load_script
from inference_worker.server import AddressUnusable, Server
from protos.sluice.v1 import generation_pb2 as pb
from protos.sluice.v1 import generation_pb2_grpc
from tests.patience import PATIENCE
from tests.worker.served_worker import (
    generate_request,
    reasons,
    refusal_of,
    serve,
    serve_script,
)

SERVICE = "sluice.v1.GenerationService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def test_get_model() -> None:
    async with serve_script(model_name="mine", model_aliases=("other",)) as worker:
        for request in (pb.GetModelRequest(), pb.GetModelRequest(model="other")):
            model = await worker.stub.GetModel(request)
            assert (model.model, list(model.aliases)) == ("mine", ["other"])
            assert model.context_length == 4096
            assert model.vocabulary_size == worker.served.tokenizer.vocabulary_size
            assert model.has_chat_template
            assert not model.default_sampling.HasField("seed")
            assert model.default_sampling.HasField("top_k")
            assert abs(model.loaded_at.ToNanoseconds() / 1e9 - time.time()) < 60


async def test_get_model_tells_the_memory() -> None:
    scripted = ScriptedSettings(port=0)
    served = load_script(scripted)
    known = replace(served.info, kv_cache_bytes=70, kv_bytes_per_token=7, step_bytes=5)
    async with serve(replace(served, info=known), scripted) as worker:
        model = await worker.stub.GetModel(pb.GetModelRequest())
    assert (model.kv_cache_bytes, model.kv_bytes_per_token, model.step_bytes) == (70, 7, 5)


async def test_get_load() -> None:
    async with serve_script(blocks=100, block_size=8) as worker:
        before = await worker.load()
        await worker.generate(max_tokens=5)
        after = await worker.wait_idle()
    assert (before.free_blocks, before.total_blocks, before.block_size) == (100, 100, 8)
    assert (before.max_running, before.max_waiting, before.max_waiting_tokens) == (32, 128, 262144)
    assert after.generated_tokens - before.generated_tokens == 5
    assert after.steps - before.steps == 5
    assert not after.is_draining


@pytest.mark.parametrize("text", ["Hello, world!", "Grüße 你好 👩‍👩‍👧‍👦 é", " a\n\tb  "])
async def test_tokens_there_and_back(text: str) -> None:
    async with serve_script() as worker:
        tokens = await worker.stub.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text=text)))
        assert len(tokens.token_ids) == len(tokens.tokens) > 0
        assert tokens.context_length == 4096
        back = await worker.stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids))
        assert back.text == text


async def test_detokenize_shows_special_tokens_if_asked() -> None:
    async with serve_script() as worker:
        chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")])
        tokens = await worker.stub.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(chat=chat)))
        ids = tokens.token_ids
        plain = await worker.stub.Detokenize(pb.DetokenizeRequest(token_ids=ids))
        shown = await worker.stub.Detokenize(
            pb.DetokenizeRequest(token_ids=ids, keep_special_tokens=True)
        )
        assert "Hi" in plain.text
        assert shown.text == b"".join(tokens.tokens).decode()
        assert len(shown.text) > len(plain.text)


async def test_health() -> None:
    async with serve_script() as worker:
        health = health_pb2_grpc.HealthStub(worker.channel)
        for service in ("", SERVICE):
            response = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert response.status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await health.Check(health_pb2.HealthCheckRequest(service="nobody"))
        assert error.value.code() == grpc.StatusCode.NOT_FOUND
        unknown = health.Watch(health_pb2.HealthCheckRequest(service="nobody"))
        first = await unknown.read()
        assert first.status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def test_every_watcher_hears_of_a_change_also_when_another_has_left() -> None:
    async with serve_script() as worker:
        health = health_pb2_grpc.HealthStub(worker.channel)
        watches = [health.Watch(health_pb2.HealthCheckRequest(service=SERVICE)) for _ in range(3)]
        for watch in watches:
            assert (await watch.read()).status == SERVING
        watches.pop(1).cancel()
        await asyncio.sleep(0.05)
        worker.server.set_not_serving()
        for watch in watches:
            assert (await asyncio.wait_for(watch.read(), PATIENCE)).status == NOT_SERVING


@pytest.mark.parametrize("version", ["v1alpha", "v1"])
async def test_reflection(version: str) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async with serve_script() as worker:
        call = worker.channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )(iter([request]))
        response = await call.read()
        call.cancel()
    assert isinstance(response, reflection_pb2.ServerReflectionResponse)
    names = {service.name for service in response.list_services_response.service}
    assert names == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


@pytest.mark.parametrize("protocol", ["grpc-v1", "grpc-v1alpha"])
async def test_a_foreign_client_needs_nothing_but_reflection(protocol: str) -> None:
    buf = Path(sys.executable).with_name("buf")
    request = '{"prompt": {"text": "Hi"}, "stopping": {"max_tokens": 3}}'
    async with serve_script() as worker:
        process = await asyncio.create_subprocess_exec(
            *(str(buf), "curl", "--http2-prior-knowledge"),
            *("--protocol", "grpc", "--reflect-protocol", protocol, "-d", request),
            f"http://{worker.address}/{SERVICE}/Generate",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await process.communicate()
    assert process.returncode == 0, errors
    decoder, text, events = json.JSONDecoder(), output.decode().strip(), []
    while text:
        event, end = decoder.raw_decode(text)
        events.append(event)
        text = text[end:].lstrip()
    assert "started" in events[0]
    assert events[-1]["finished"]["finishReason"] == "FINISH_REASON_LENGTH"


async def test_message_size_limits_hold_at_both_ends() -> None:
    async with serve_script(max_message_bytes=20_000, context_length=16384) as worker:
        refusal = await refusal_of(worker.stub.Generate(generate_request(text="x" * 30_000)))
        assert refusal.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert reasons(await worker.generate(text="x" * 10_000)) == ["LENGTH"]
        with pytest.raises(grpc.aio.AioRpcError) as error:  # small in, large out
            await worker.stub.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text="x " * 9_000)))
        assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_more_text_than_a_message_may_have_is_not_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serve_script(max_message_bytes=20_000) as worker:
        tokenizer = worker.served.tokenizer
        sizes = [len(text) for text in tokenizer.text_bytes or ()]
        longest = max(sizes)
        request = pb.DetokenizeRequest(token_ids=[sizes.index(longest)] * (20_000 // longest - 1))
        text = (await worker.stub.Detokenize(request)).text
        assert len(text.encode()) == longest * len(request.token_ids)
        monkeypatch.setattr(tokenizer, "decode", None)
        request.token_ids.extend([sizes.index(longest)] * 2)
        with pytest.raises(grpc.aio.AioRpcError, match="token_ids: at most 20000 bytes") as error:
            await worker.stub.Detokenize(request)
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_large_message_passes() -> None:
    async with serve_script() as worker:
        ids = list(range(256)) * 8000  # about 3 MB on the wire, under the default limit
        refusal = await refusal_of(worker.stub.Generate(generate_request(ids=ids)))
        assert refusal.info.reason == "CONTEXT_EXCEEDED"


async def test_a_second_server_on_the_same_port_is_refused() -> None:
    async with serve_script() as worker:
        port = int(worker.address.rsplit(":", 1)[1])
        with pytest.raises(AddressUnusable, match=f"port {port}"):
            Server(ScriptedSettings(port=port)).bind()


async def test_an_unknown_host_is_refused() -> None:
    with pytest.raises(AddressUnusable, match=r"256\.0\.0\.1"):
        Server(ScriptedSettings(host="256.0.0.1", port=0)).bind()


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="the system has no IPv6 loopback")
async def test_ipv6() -> None:
    async with serve_script(host="::1") as worker:
        assert worker.address.startswith("[::1]:")
        assert reasons(await worker.generate()) == ["LENGTH"]


async def test_a_client_that_pings_often_is_not_thrown_out() -> None:
    options = [
        ("grpc.keepalive_time_ms", 1000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
    settings = {"step_milliseconds": 1000, "min_client_ping_seconds": 0.5}
    async with (
        serve_script(**settings) as worker,
        grpc.aio.insecure_channel(worker.address, options=options) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        messages = [message async for message in stub.Generate(generate_request(max_tokens=4))]
        assert reasons(messages) == ["LENGTH"]
