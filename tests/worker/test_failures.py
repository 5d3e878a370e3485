"""What fails fails alone, and says nothing of the inside."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from protos.sluice.v1 import generation_pb2 as pb
from tests.worker.served_worker import (
    Refusal,
    generate_request,
    read_rest,
    read_until,
    reasons,
    refusal_of,
    serve_script,
)

FAILING = pb.Sampling(seed=666)


async def test_one_failing_sequence_leaves_the_others_unharmed() -> None:
    async with serve_script(failing_seed=666, step_milliseconds=2) as worker:
        others = [worker.stub.Generate(generate_request(max_tokens=50)) for _ in range(5)]
        for other in others:
            await read_until(other, "delta")
        refusal = await refusal_of(
            worker.stub.Generate(generate_request(sampling=FAILING, request_id="bad", max_tokens=9))
        )
        assert refusal.code == grpc.StatusCode.INTERNAL
        assert refusal.message == "internal error; request bad"
        assert dict(refusal.info.metadata) == {"request_id": "bad"}
        assert "script" not in str(refusal.status)
        for other in others:
            assert reasons(await read_rest(other)) == ["LENGTH"]


async def test_the_traceback_is_in_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    async with serve_script(failing_seed=666) as worker:
        await refusal_of(worker.stub.Generate(generate_request(sampling=FAILING, max_tokens=9)))
    assert "the script fails here" in capsys.readouterr().out


async def test_a_bug_in_the_worker_tells_nothing_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret detail")

    async with serve_script() as worker:
        tokenizer = worker.served.tokenizer
        for name in ("encode", "decode"):
            monkeypatch.setattr(tokenizer, name, broken)
        refusal = await refusal_of(worker.stub.Generate(generate_request(request_id="r")))
        assert refusal.code == grpc.StatusCode.INTERNAL
        assert "secret" not in str(refusal.status)
        for call in (
            worker.stub.Detokenize(pb.DetokenizeRequest(token_ids=[1])),
            worker.stub.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text="x"))),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            assert Refusal(error.value).code == grpc.StatusCode.INTERNAL
            assert "secret" not in str(Refusal(error.value).status)


async def test_a_call_that_cancels_itself_still_gets_a_status(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serve_script() as worker:

        def cancelled(*_: object, **__: object) -> None:
            raise asyncio.CancelledError

        monkeypatch.setattr(worker.worker, "get_load", cancelled)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await worker.stub.GetLoad(pb.GetLoadRequest(), timeout=5)
        assert error.value.code() == grpc.StatusCode.INTERNAL
        monkeypatch.undo()


async def test_a_crash_of_the_engine_fails_every_stream() -> None:
    async with serve_script(crashing_seed=13, step_milliseconds=2) as worker:
        other = worker.stub.Generate(generate_request(max_tokens=1000))
        await read_until(other, "delta")
        crashing = generate_request(sampling=pb.Sampling(seed=13), max_tokens=9)
        for call in (worker.stub.Generate(crashing), other):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await read_rest(call)
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        assert len(worker.crashes) == 1
        refusal = await refusal_of(worker.stub.Generate(generate_request()))
        assert (refusal.code, refusal.info.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_LOST")
