"""Requests that can never fit: they are refused for good, before anything is spent on them."""

from __future__ import annotations

import grpc
import pytest

from protos.sluice.v1 import generation_pb2 as pb
from tests.worker.served_worker import generate_request, reasons, refusal_of, serve_script

INVALID = grpc.StatusCode.INVALID_ARGUMENT


async def test_a_prompt_that_can_never_fit_names_both_numbers() -> None:
    async with serve_script(context_length=64) as worker:
        call = worker.stub.Generate(generate_request(ids=[5] * 64, max_tokens=1))
        refusal = await refusal_of(call)
        assert (refusal.code, refusal.field) == (INVALID, "prompt")
        assert "64 tokens" in refusal.message
        assert "at most 63" in refusal.message
        assert dict(refusal.info.metadata) == {"tokens": "64", "limit": "63"}
        assert refusal.info.reason == "CONTEXT_EXCEEDED"


async def test_a_text_of_too_many_bytes_is_refused_before_it_is_tokenized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serve_script(context_length=64) as worker:
        longest = worker.served.tokenizer.max_token_bytes
        assert longest is not None
        encoded: list[str] = []

        def encode(text: str, **_: object) -> list[int]:
            encoded.append(text)
            return [5]

        monkeypatch.setattr(worker.served.tokenizer, "encode", encode)
        can_fit = "é" * (64 * longest // 2)
        assert reasons(await worker.generate(text=can_fit)) == ["LENGTH"]
        refusal = await refusal_of(worker.stub.Generate(generate_request(text=can_fit + "é")))
        assert (refusal.code, refusal.field) == (INVALID, "prompt")
        assert refusal.info.reason == "CONTEXT_EXCEEDED"
        numbers = {"bytes": str(64 * longest + 2), "limit": str(64 * longest)}
        assert dict(refusal.info.metadata) == numbers
        assert all(number in refusal.message for number in numbers.values())
        assert encoded == [can_fit]


async def test_a_chat_that_can_never_fit_is_refused_for_good_also_under_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not for now: it would be tried again and again."""
    settings = {"max_running": 1, "max_waiting_tokens": 10, "step_milliseconds": 50}
    async with serve_script(context_length=64, **settings) as worker:
        longest = worker.served.tokenizer.max_token_bytes
        assert longest is not None

        def chat(text: str) -> pb.GenerateRequest:
            messages = [
                pb.ChatMessage(role="user", content="hi"),
                # whose reasoning a template may leave out
                pb.ChatMessage(role="assistant", content="x" * 64 * longest),
                pb.ChatMessage(role="user", content=f" {text} "),
            ]
            return generate_request(prompt=pb.Prompt(chat=pb.Chat(messages=messages)))

        rendered: list[object] = []

        def encode_chat(*given: object, **_: object) -> list[int]:
            rendered.append(given)
            return [5]

        monkeypatch.setattr(worker.served.tokenizer, "encode_chat", encode_chat)
        limit = 64 * longest
        can_fit, cannot = chat("x" * (limit - 2)), chat("x" * (limit - 1))
        assert [m async for m in worker.stub.Generate(can_fit)]
        running = worker.stub.Generate(generate_request(max_tokens=50))
        await running.read()
        refusal = await refusal_of(worker.stub.Generate(cannot))
        assert (refusal.code, refusal.field) == (INVALID, "prompt.chat.messages")
        assert refusal.info.reason == "CONTEXT_EXCEEDED"
        assert dict(refusal.info.metadata) == {"bytes": str(limit + 1), "limit": str(limit)}
        assert len(rendered) == 1
        running.cancel()


async def test_a_chat_that_is_rendered_to_too_much_is_not_tokenized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serve_script(context_length=64) as worker:
        tokenizer = worker.served.tokenizer
        assert tokenizer.max_token_bytes is not None
        limit = 64 * tokenizer.max_token_bytes
        for method in ("_encode", "_encode_pieces"):
            monkeypatch.setattr(tokenizer, method, lambda *_, **__: [5])
        for is_special in (False, True):

            def chat(length: int, is_special: bool = is_special) -> pb.GenerateRequest:
                answer = pb.ChatMessage(role="assistant", content="é" + "x" * (length - 2))
                asked = pb.ChatMessage(role="user", content="hi")
                given = pb.Chat(messages=[asked, answer, asked])
                return generate_request(prompt=pb.Prompt(chat=given, special_tokens=is_special))

            refusal = await refusal_of(worker.stub.Generate(chat(limit)))
            assert (refusal.code, refusal.field) == (INVALID, "prompt.chat.messages")
            assert refusal.info.reason == "CONTEXT_EXCEEDED"
            marks = int(refusal.info.metadata["bytes"]) - limit  # and what the template adds
            assert marks > 0
            assert [m async for m in worker.stub.Generate(chat(limit - marks))]


async def test_the_kv_cache_limits_what_fits_too() -> None:
    async with serve_script(blocks=2, block_size=16) as worker:
        refusal = await refusal_of(worker.stub.Generate(generate_request(ids=[5] * 40)))
        assert "at most 31" in refusal.message
        messages = await worker.generate(ids=[5] * 31, max_tokens=1)
        assert messages[-1].finished.usage.completion_tokens == 1


async def test_more_completion_than_fits_names_both_numbers() -> None:
    async with serve_script(context_length=64) as worker:
        refusal = await refusal_of(
            worker.stub.Generate(generate_request(ids=[5] * 60, max_tokens=5))
        )
        assert (refusal.code, refusal.field) == (INVALID, "stopping.max_tokens")
        assert "65" in refusal.message
        assert "64" in refusal.message
