"""Who may resume a kept stream, by which name, and who may end it or have it forgotten."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
import pytest

from protos.sluice.v1 import generation_pb2 as pb
from tests.worker.kept_calls import ENDLESS, SLOW, begin, end, kept, resume, window
from tests.worker.served_worker import (
    Refusal,
    generate_request,
    read_rest,
    reasons,
    refusal_of,
    serve_script,
)


async def test_only_the_key_that_began_it_resumes_it() -> None:
    async with serve_script() as worker:
        caller = pb.Caller(key_id="alice")
        messages = await read_rest(kept(worker, caller=caller, resume_tag="chat"))
        resume_id = messages[0].started.resume_id
        for key in ("", "bob", "alic"):
            refusal = await refusal_of(resume(worker, resume_id, key=key))
            assert refusal.code is grpc.StatusCode.NOT_FOUND
            refusal = await refusal_of(resume(worker, "", key=key, resume_tag="chat"))
            assert refusal.code is grpc.StatusCode.NOT_FOUND
        assert await read_rest(resume(worker, resume_id, key="alice")) == messages
        assert await read_rest(resume(worker, "", key="alice", resume_tag="chat")) == messages


async def test_a_tag_means_the_latest_stream_that_was_admitted() -> None:
    async with serve_script() as worker:
        await read_rest(kept(worker, resume_tag="chat", request_id="one"))
        await read_rest(kept(worker, resume_tag="chat", request_id="two"))
        refused = kept(worker, resume_tag="chat", request_id="three", n=1000)
        assert (await refusal_of(refused)).field == "n"
        messages = await read_rest(resume(worker, "", resume_tag="chat"))
        assert messages[0].started.request_id == "two"


async def test_ids_cannot_be_guessed() -> None:
    async with serve_script() as worker:
        ids = {(await worker.generate(resume_window=window()))[0].started.resume_id for _ in "abc"}
        assert len(ids) == 3
        assert all(len(name.removeprefix("rs_")) * 4 >= 128 for name in ids)
        for wrong in ("rs_", "rs_" + "0" * 48, next(iter(ids))[:-1], "x" * 10_000, "\0"):
            refusal = await refusal_of(resume(worker, wrong))
            assert refusal.code is grpc.StatusCode.NOT_FOUND


async def test_abort_ends_a_stream_without_a_reader() -> None:
    async with serve_script(**SLOW) as worker:
        call = kept(worker, **ENDLESS)
        started = await begin(call)
        call.cancel()
        await end(worker, started)
        messages = await read_rest(resume(worker, started.resume_id, 0))
        assert reasons(messages) == ["CANCELLED"]


async def test_what_is_to_be_forgotten_is_ended_and_gone() -> None:
    async with serve_script(**SLOW) as worker:

        async def forget(resume_id: str, **fields: Any) -> pb.AbortOutcome.ValueType:
            request = pb.AbortRequest(resume_id=resume_id, forget=True, **fields)
            return (await worker.stub.Abort(request)).outcome

        call = kept(worker, caller=pb.Caller(key_id="alice"), resume_tag="chat", **ENDLESS)
        resume_id = (await begin(call)).resume_id
        for wrong in ({"key_id": "bob"}, {"key_id": "alic"}):
            assert await forget(resume_id, **wrong) == pb.ABORT_OUTCOME_UNKNOWN
        assert await forget(resume_id, key_id="alice") == pb.ABORT_OUTCOME_ABORTED
        for name, tag in ((resume_id, ""), ("", "chat")):
            refusal = await refusal_of(resume(worker, name, key="alice", resume_tag=tag))
            assert refusal.code is grpc.StatusCode.NOT_FOUND
        assert await forget(resume_id) == pb.ABORT_OUTCOME_UNKNOWN
        assert reasons(await read_rest(call)) == ["CANCELLED"], "who reads it hears its end"

        unread = kept(worker, **ENDLESS)
        resume_id = (await begin(unread)).resume_id
        unread.cancel()
        assert await forget(resume_id) == pb.ABORT_OUTCOME_ABORTED

        ended = await worker.generate(resume_window=window())
        resume_id = ended[0].started.resume_id
        request = pb.AbortRequest(resume_id=resume_id)
        outcome = (await worker.stub.Abort(request)).outcome
        assert outcome == pb.ABORT_OUTCOME_ALREADY_FINISHED
        assert await read_rest(resume(worker, resume_id)) == ended, "it was to end, no more"
        assert await forget(resume_id) == pb.ABORT_OUTCOME_ALREADY_FINISHED
        assert (await refusal_of(resume(worker, resume_id))).code is grpc.StatusCode.NOT_FOUND
        await worker.wait_idle()
        assert worker.worker.num_kept == (0, 0)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("request_id", pb.AbortRequest()),
        ("request_id", pb.AbortRequest(request_id="one", resume_id="two")),
        ("forget", pb.AbortRequest(request_id="one", forget=True)),
    ],
)
async def test_what_an_abort_means_is_said_once(field: str, message: pb.AbortRequest) -> None:
    async with serve_script() as worker:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await worker.stub.Abort(message)
        refusal = Refusal(caught.value)
        assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("resume.resume_id", pb.GenerateRequest(resume=pb.Resume())),
        (
            "resume.resume_id",
            pb.GenerateRequest(resume=pb.Resume(resume_id="rs_", resume_tag="t")),
        ),
        ("n", pb.GenerateRequest(resume=pb.Resume(resume_id="rs_"), n=1)),
        (
            "resume.is_continuable",
            pb.GenerateRequest(
                resume=pb.Resume(resume_id="rs_", snapshot=True, is_continuable=True)
            ),
        ),
        (
            "caller.key_id",
            pb.GenerateRequest(resume=pb.Resume(resume_id="rs_"), caller=pb.Caller(key_id="a b")),
        ),
        ("resume_window", generate_request(resume_window=window(0))),
        ("resume_window", generate_request(resume_window=window(-1))),
        ("resume_window", generate_request(resume_window=window(86_401))),
        ("resume_tag", generate_request(resume_tag="t")),
        ("resume_tag", generate_request(resume_tag="", resume_window=window())),
        ("resume_tag", generate_request(resume_tag="t" * 257, resume_window=window())),
        ("annotation", generate_request(annotation=b"a")),
        ("annotation", generate_request(annotation=b"a" * (2**20 + 1), resume_window=window())),
        ("caller.key_id", generate_request(caller=pb.Caller())),
        ("caller.key_id", generate_request(caller=pb.Caller(key_id="a" * 65))),
    ],
)
async def test_bad_fields_are_named(field: str, request_: pb.GenerateRequest) -> None:
    async with serve_script() as worker:
        refusal = await refusal_of(worker.stub.Generate(request_))
        assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
        assert worker.worker.num_kept == (0, 0)
