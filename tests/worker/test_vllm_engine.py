"""The worker as VllmEngine: every call over a real connection, with the scripted model behind it."""

from __future__ import annotations

import hashlib
import io
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from inference_worker.default_model import CHECKPOINT
from inference_worker.errors import ContextExceeded, InvalidField
from inference_worker.vllm_engine.request import read_request, their_names
from protos.sluice.v1 import generation_pb2 as pb
from protos.sluice.v1.generation_pb2_grpc import GenerationServiceStub
from tests.gateway_packages import gateway_variables, needs_gateway, vllm_contract
from tests.integration.stack import PATIENCE, ROOT, LoggedProcess
from tests.worker.served_worker import NARROW, Refusal

pytestmark = needs_gateway

TEXT = "One two three."
SERVICE = "vllm.grpc.engine.VllmEngine"
LONG = {"max_tokens": 4000, "ignore_eos": True}  # 20 seconds


@dataclass
class Engine:
    """A worker process, seen through both contracts."""

    vllm: Any  # messages
    calls: Any  # stub
    native: GenerationServiceStub
    channel: grpc.Channel
    address: str
    process: LoggedProcess
    script: list[int]  # token ids of the text
    eos_token_id: int

    def request(self, **fields: Any) -> Any:
        """A request for the script; what is no field of the request is a sampling parameter."""
        own = {"request_id", "stream", "tokenized", "text", "media_refs", "data_parallel_rank"}
        own |= {"mm_inputs", "extra_mm_inputs", "kv_transfer_params", "kv_transfer_params_json"}
        params = {name: fields.pop(name) for name in tuple(fields) if name not in own}
        if not {"tokenized", "text"} & fields.keys():
            fields["tokenized"] = self.vllm.TokenizedInput(original_text="Hi", input_ids=[5, 6, 7])
        return self.vllm.GenerateRequest(
            sampling_params=self.vllm.SamplingParams(**params), **fields
        )

    def generate(self, **fields: Any) -> list[Any]:
        return list(self.calls.Generate(self.request(**fields), timeout=PATIENCE))

    def refusal(self, **fields: Any) -> Refusal:
        with pytest.raises(grpc.RpcError) as caught:
            self.generate(**fields)
        return Refusal(cast(grpc.Call, caught.value))  # it is both

    def wait_idle(self) -> None:
        idle = threading.Event()
        for _ in range(round(PATIENCE / 0.01)):
            load = self.native.GetLoad(pb.GetLoadRequest(), timeout=PATIENCE)
            if not (load.requests or load.running) and load.free_blocks == load.total_blocks:
                return
            idle.wait(0.01)
        raise AssertionError(load)


@contextmanager
def running_engine(**flags: object) -> Iterator[Engine]:
    fixed = {"port": 0, "text": TEXT, "repeats": 1, "step_milliseconds": 5, "vllm_engine": True}
    process = LoggedProcess(
        "inference_worker.scripted_model", fixed | flags, variables=gateway_variables()
    )
    try:
        address = process.wait_for_line(event="ready")["address"]
        vllm, services = vllm_contract()
        with grpc.insecure_channel(address) as channel:
            native = GenerationServiceStub(channel)
            prompt = pb.Prompt(text=TEXT)
            script = native.Tokenize(pb.TokenizeRequest(prompt=prompt), timeout=PATIENCE).token_ids
            (eos,) = native.GetModel(pb.GetModelRequest(), timeout=PATIENCE).eos_token_ids
            calls = services.VllmEngineStub(channel)
            yield Engine(vllm, calls, native, channel, address, process, list(script), eos)
    finally:
        process.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with running_engine() as engine:
        yield engine
        engine.wait_idle()


def chunks_of(answers: list[Any]) -> list[Any]:
    return [answer.chunk for answer in answers if answer.HasField("chunk")]


def test_a_stream_is_chunks_with_every_token_and_one_last_answer(engine: Engine) -> None:
    answers = engine.generate(stream=True, request_id="cmpl-1")
    assert [answer.WhichOneof("response") for answer in answers][-1] == "complete"
    chunks, complete = chunks_of(answers), answers[-1].complete
    assert len(chunks) == len(answers) - 1
    ids = [token_id for chunk in chunks for token_id in chunk.token_ids]
    assert ids == [*engine.script, engine.eos_token_id] == list(complete.output_ids)
    assert [chunk.completion_tokens for chunk in chunks] == [len(c.token_ids) for c in chunks]
    assert {chunk.prompt_tokens for chunk in chunks} == {3}
    assert (complete.prompt_tokens, complete.completion_tokens) == (3, len(ids))
    assert (complete.finish_reason, complete.WhichOneof("matched_stop")) == ("stop", None)
    line = engine.process.wait_for_line(event="request", request_id="cmpl-1")
    assert (line["status"], line["completion_tokens"]) == ("OK", len(ids))


def test_without_stream_there_is_one_answer_a_choice(engine: Engine) -> None:
    answers = engine.generate(n=3, max_tokens=2, temperature=1.0, logprobs=1)
    completes = sorted((answer.complete for answer in answers), key=lambda each: each.index)
    assert [complete.index for complete in completes] == [0, 1, 2]
    for complete in completes:
        assert list(complete.output_ids) == engine.script[:2]
        assert list(complete.output_logprobs.token_ids) == engine.script[:2]
        assert complete.finish_reason == "length"


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_stop_sequence_ends_it_and_its_tokens_come_too(engine: Engine, is_streamed: bool) -> None:
    complete = engine.generate(stop=["never", "wo th"], stream=is_streamed)[-1].complete
    ids = list(complete.output_ids)
    assert ids == engine.script[: len(ids)]
    detokenize = pb.DetokenizeRequest(token_ids=ids)
    text = engine.native.Detokenize(detokenize, timeout=PATIENCE).text
    assert text.startswith("One two th")
    assert (complete.finish_reason, complete.matched_stop_str) == ("stop", "wo th")


def test_a_stop_token_of_the_request_is_told(engine: Engine) -> None:
    wanted = engine.script[1]
    complete = engine.generate(stop_token_ids=[wanted])[-1].complete
    assert list(complete.output_ids) == engine.script[:2]
    assert (complete.finish_reason, complete.matched_token_id) == ("stop", wanted)


def test_logprobs_come_as_many_as_asked_for(engine: Engine) -> None:
    answers = engine.generate(stream=True, logprobs=0, prompt_logprobs=1, max_tokens=3)
    chunks = chunks_of(answers)
    assert [chunk.HasField("input_logprobs") for chunk in chunks][1:] == [False] * (len(chunks) - 1)
    prompt = chunks[0].input_logprobs
    assert list(prompt.token_ids) == [5, 6, 7]
    assert [value.HasField("value") for value in prompt.token_logprobs] == [False, True, True]
    assert [len(top.values) for top in prompt.top_logprobs] == [0, 1, 1]
    scored = [chunk.output_logprobs for chunk in chunks]
    assert [i for each in scored for i in each.token_ids] == engine.script[:3]
    assert [x for each in scored for x in each.token_logprobs] == [0.0] * 3
    assert not any(each.top_logprobs for each in scored)

    plain = engine.generate(stream=True, prompt_logprobs=0, max_tokens=1)
    assert chunks_of(plain)[0].HasField("input_logprobs")
    assert not chunks_of(plain)[0].input_logprobs.top_logprobs
    assert not chunks_of(plain)[0].HasField("output_logprobs")


def test_text_is_a_prompt_too_and_a_grammar_holds(engine: Engine) -> None:
    choice = engine.vllm.ChoiceConstraint(choices=[TEXT])
    complete = engine.generate(text="Say it", choice=choice)[-1].complete
    assert complete.prompt_tokens > 0
    assert list(complete.output_ids) == engine.script
    refusal = engine.refusal(regex="(")
    assert (refusal.code, refusal.field) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "sampling_params.regex",
    )


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("sampling_params.min_tokens", {"min_tokens": 1}),
    ("sampling_params.truncate_prompt_tokens", {"truncate_prompt_tokens": -1}),
    ("sampling_params.structural_tag", {"structural_tag": "{}"}),
    ("sampling_params.logprobs", {"logprobs": -1}),
    ("sampling_params.prompt_logprobs", {"prompt_logprobs": 21, "logprobs": 1}),
    ("sampling_params.logit_bias[-1]", {"logit_bias": {-1: 1.0}}),
    ("sampling_params.top_p", {"top_p": 1.5}),
    ("sampling_params.n", {"n": 1000}),
    ("sampling_params.max_tokens", {"max_tokens": 100_000}),
    ("sampling_params.stop[0]", {"stop": [""]}),
    ("sampling_params.stop_token_ids[0]", {"stop_token_ids": [10**9]}),
    ("sampling_params.choice.choices", {"choice": {}}),
    ("sampling_params.json_schema", {"json_schema": "no schema"}),
    ("tokenized.input_ids[0]", {"tokenized": {"input_ids": [10**9]}}),
    ("tokenized.input_ids", {"tokenized": {}}),
    ("data_parallel_rank", {"data_parallel_rank": 1}),
    ("kv_transfer_params_json", {"kv_transfer_params_json": "{}"}),
    ("media_refs", {"media_refs": {}}),
]


@pytest.mark.parametrize(("field", "fields"), REFUSED, ids=[field for field, _ in REFUSED])
def test_what_cannot_be_honoured_is_refused_by_its_name(
    engine: Engine, field: str, fields: dict[str, Any]
) -> None:
    request_id = re.sub(r"\W", "-", field)
    refusal = engine.refusal(request_id=request_id, **fields)
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    assert refusal.message.startswith(f"{field}: ")
    line = engine.process.wait_for_line(event="request", request_id=request_id)
    assert line["status"] == "INVALID_ARGUMENT"


def test_unset_means_what_it_means_to_vllm() -> None:
    vllm, _ = vllm_contract()
    params = vllm.SamplingParams(skip_special_tokens=True, include_stop_str_in_output=True)
    tokenized = vllm.TokenizedInput(input_ids=[1])
    request = read_request(vllm.GenerateRequest(tokenized=tokenized, sampling_params=params), 100)
    neutral = pb.Sampling(
        top_k=100, top_p=1, min_p=0, repetition_penalty=1, presence_penalty=0, frequency_penalty=0
    )
    assert request.sampling == neutral  # temperature and seed are optional there: the model's own
    assert not request.HasField("request_id")
    assert not request.stopping.HasField("max_tokens")
    assert request.n == 1
    assert request.output == pb.Output(token_ids=True, echo=False, prompt_logprobs=False)
    assert not request.HasField("constraint")


def test_errors_name_the_input_that_the_request_has() -> None:
    vllm, _ = vllm_contract()
    for message, name in (
        (vllm.GenerateRequest(text="a"), "text"),
        (vllm.GenerateRequest(tokenized=vllm.TokenizedInput(input_ids=[1])), "tokenized.input_ids"),
    ):
        with pytest.raises(InvalidField) as caught, their_names(message):
            raise ContextExceeded("prompt", "too long", limit=1, tokens=2)
        assert (caught.value.field, str(caught.value)) == (name, f"{name}: too long")


def test_abort_ends_it_and_knows_no_error(engine: Engine) -> None:
    stream = engine.calls.Generate(engine.request(request_id="a-1", stream=True, **LONG))
    assert next(stream).HasField("chunk")
    request = engine.vllm.AbortRequest(request_ids=["nobody", "", "a-1"])
    with pytest.raises(grpc.RpcError) as told:
        engine.calls.Abort(request, timeout=PATIENCE)
    refusal = Refusal(cast(grpc.Call, told.value))
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "request_ids[1]")
    assert list(stream)[-1].complete.finish_reason == "abort"
    engine.wait_idle()


def test_a_caller_that_leaves_or_is_late_frees_its_place(engine: Engine) -> None:
    request = engine.request(request_id="left", stream=True, **LONG)
    stream = engine.calls.Generate(request)
    next(stream)
    stream.cancel()
    engine.wait_idle()
    line = engine.process.wait_for_line(event="request", request_id="left")
    assert line["status"] == "CANCELLED"

    late = engine.calls.Generate(engine.request(request_id="late", **LONG), timeout=0.5)
    try:  # it ends a little before the call does
        assert list(late)[-1].complete.finish_reason == "abort"
    except grpc.RpcError:
        assert late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    engine.wait_idle()
    line = engine.process.wait_for_line(event="request", request_id="late")
    assert line["finish_reasons"] == ["DEADLINE"] or line["status"] == "DEADLINE_EXCEEDED"


def test_it_tells_of_model_server_and_load(engine: Engine) -> None:
    vllm, calls = engine.vllm, engine.calls
    assert calls.HealthCheck(vllm.HealthCheckRequest(), timeout=PATIENCE).healthy
    health = health_pb2_grpc.HealthStub(engine.channel)
    check = health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=PATIENCE)
    assert check.status == health_pb2.HealthCheckResponse.SERVING

    ours = engine.native.GetModel(pb.GetModelRequest(), timeout=PATIENCE)
    model = calls.GetModelInfo(vllm.GetModelInfoRequest(), timeout=PATIENCE)
    assert (model.served_model_name, model.is_generation) == (ours.model, True)
    assert (model.max_context_length, model.vocab_size) == (
        ours.context_length,
        ours.vocabulary_size,
    )
    assert list(model.eos_token_ids) == list(ours.eos_token_ids)
    assert '"temperature"' in model.default_sampling_params_json

    stream = calls.Generate(engine.request(stream=True, **LONG))
    next(stream)
    server = calls.GetServerInfo(vllm.GetServerInfoRequest(), timeout=PATIENCE)
    assert (server.server_type, server.active_requests) == ("vllm-grpc", 1)
    loads = calls.GetLoads(vllm.GetLoadsRequest(), timeout=PATIENCE)
    (load,) = loads.loads
    assert (load.num_running_reqs, load.num_waiting_reqs, load.num_total_reqs) == (1, 0, 1)
    assert 0 < load.token_usage < 1
    assert load.max_total_num_tokens == 8192 * 16
    assert not calls.GetLoads(vllm.GetLoadsRequest(dp_rank=1), timeout=PATIENCE).loads
    stream.cancel()
    engine.wait_idle()


def test_the_tokenizer_comes_as_an_archive(engine: Engine) -> None:
    common, _ = grpc.protos_and_services("common.proto")
    pieces = list(engine.calls.GetTokenizer(common.GetTokenizerRequest(), timeout=PATIENCE))
    archive = b"".join([piece.data for piece in pieces])
    assert [bool(piece.sha256) for piece in pieces] == [*[False] * (len(pieces) - 1), True]
    assert pieces[-1].sha256 == hashlib.sha256(archive).hexdigest()
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        for name in ("tokenizer.json", "config.json", "chat_template.jinja"):
            assert files.read(name) == (CHECKPOINT / name).read_bytes()
        assert "model.safetensors" not in files.namelist()


def test_who_does_not_read_the_archive_is_left(tmp_path: Path) -> None:
    """And holds nobody: it is far larger than what is on its way to one who does not read."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"):
        shutil.copy(CHECKPOINT / name, tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(random.Random(1).randbytes(8 * 1024 * 1024))
    common, _ = grpc.protos_and_services("common.proto")
    _, services = vllm_contract()
    with (
        running_engine(model=tmp_path, send_timeout_seconds=0.5) as engine,
        grpc.insecure_channel(engine.address, options=NARROW) as channel,
    ):
        calls = services.VllmEngineStub(channel)
        stalled = calls.GetTokenizer(common.GetTokenizerRequest(), timeout=PATIENCE)
        next(stalled)
        engine.process.wait_for_line(event="slow reader", call="GetTokenizer")
        # What was on its way still comes, and then the reason.
        with pytest.raises(grpc.RpcError) as caught:
            list(stalled)
        refusal = Refusal(cast(grpc.Call, caught.value))
        assert (refusal.code, refusal.info.reason) == (grpc.StatusCode.ABORTED, "SLOW_READER")
        assert engine.calls.HealthCheck(engine.vllm.HealthCheckRequest(), timeout=PATIENCE).healthy


def test_other_methods_are_unimplemented_by_name(engine: Engine) -> None:
    common, _ = grpc.protos_and_services("common.proto")
    for name, request in (
        ("Embed", engine.vllm.EmbedRequest()),
        ("FlushCache", common.FlushCacheRequest()),
        ("StartProfile", common.StartProfileRequest()),
        ("StopProfile", common.StopProfileRequest()),
        ("SubscribeKvEvents", common.SubscribeKvEventsRequest()),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            # a stream fails when it is read
            list(getattr(engine.calls, name)(request, timeout=PATIENCE))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert caught.value.details() == f"{name}: not supported by this worker"


def test_a_worker_that_shuts_down_fails_the_stream() -> None:
    with running_engine(drain_seconds=0) as engine:
        stream = engine.calls.Generate(engine.request(stream=True, **LONG))
        next(stream)
        engine.process.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert engine.process.process.wait(timeout=PATIENCE) == 0


def test_without_the_package_the_flag_stops_the_start() -> None:
    program = (
        "import sys; sys.modules['smg_grpc_proto'] = None;"
        "from inference_worker.__main__ import main; main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, "--vllm-engine"], capture_output=True, text=True, cwd=ROOT
    )
    assert ended.returncode == 2
    assert "--vllm-engine: needs the extra gateway" in ended.stderr
    assert ended.stderr.count("\n") == 1
