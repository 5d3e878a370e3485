"""The benchmarks run, and their tables have every row. No figure of time is judged here."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import uvloop
from tokenizers import Tokenizer
from transformers import LlamaConfig

from benchmarks.answer_check import AnswerCheck, WrongAnswer
from benchmarks.awq import CONTENDERS
from benchmarks.compiled import COLD, measure
from benchmarks.engine import Plan, contest, make_prompts
from benchmarks.generators import GenerationFailed, Output, Sluice
from benchmarks.gguf_checkpoint import write_gguf
from benchmarks.gpu import SHAPES, measure_vllm
from benchmarks.gpu import Plan as GpuPlan
from benchmarks.gpu_vllm import write_config
from benchmarks.llama_cpp_server import llama_cpp
from benchmarks.load_client import StreamFailed
from benchmarks.processes import StartFailed
from benchmarks.random_llama import END, write_random_llama
from benchmarks.recording import read_writes
from benchmarks.report import Report
from benchmarks.sampling import KINDS
from benchmarks.structured_output import CONSTRAINTS
from benchmarks.table import Table, percentile, spread
from benchmarks.transport import measure_bare, measure_edge, running_stack
from inference_worker.default_model import CHECKPOINT
from inference_worker.model.awq_checkpoint import awq_format

ROOT = Path(__file__).parent.parent
HAS_LLAMA_CPP = all(find_spec(name) for name in ("llama_cpp", "gguf"))


def rows(output: str) -> list[list[str]]:
    """The cells of all table rows, without headers and rules."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = {index for index, row in enumerate(cells) if set(row[0]) == {"-"}}
    return [row for index, row in enumerate(cells) if not {index, index + 1} & rules]


def quick(module: str, kept: Path, *flags: str) -> list[list[str]]:
    """Run a benchmark as a user does; the file it keeps says the same as its output."""
    command = [sys.executable, "-m", module, "--quick", f"--keep={kept}", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() in kept.read_text()
    return rows(result.stdout)


@pytest.mark.slow
def test_transport_measures_every_pace_and_number_of_streams(tmp_path: Path) -> None:
    found = quick("benchmarks.transport", tmp_path / "RESULTS.md")
    servers = ["edge", "bare", "edge ÷ bare"]
    assert [row[:2] for row in found] == [[n, server] for n in "14" for server in servers] * 3
    for row in found:
        assert [row[5] == "–"] == [row[1] != "edge"]  # only the edge has a worker
        assert all(cell[0].isdigit() for cell in row[2:] if cell != "–")


@pytest.mark.slow
def test_cancellation_measures_every_phase(tmp_path: Path) -> None:
    found = quick("benchmarks.cancellation", tmp_path / "RESULTS.md")
    phases = ["queue", "prefill", "decode"]
    # phase, how many leave, how many stay, times of leaving: 2 repetitions
    assert [row[1:5] for row in found] == [
        *([phase, "1", "1" if phase == "queue" else "0", "2"] for phase in phases),
        *([phase, "4", "1" if phase == "queue" else "0", "8"] for phase in phases),
        ["decode", "1", "3", "2"],
    ]
    for row in found:
        step, beyond, p99 = float(row[7]), float(row[8]), float(row[6])
        assert step > 9  # the script was told 10; GetLoad sees a step's end up to one answer late
        assert beyond == pytest.approx(p99 - step, abs=0.11)  # each is rounded to a tenth


@pytest.mark.slow
def test_overload_measures_both_servers_and_both_orders(tmp_path: Path) -> None:
    found = quick("benchmarks.overload", tmp_path / "RESULTS.md")
    assert [row[0] for row in found] == ["Sluice", "unbounded queue"] * 2 + ["told", "not told"]
    bounded, unbounded = found[:2]
    for row in (bounded, unbounded):
        offered, accepted, refused, other, failed, unanswered, queue = map(int, row[1:8])
        assert offered == accepted + refused + other
        assert accepted > 0
        assert failed == 0
        assert unanswered < accepted
        assert 0 < queue <= accepted
        assert float(row[8]) > 0
    assert int(bounded[3]) > 0
    assert int(bounded[7]) <= 4  # --quick's max_waiting
    assert unbounded[1] == unbounded[2]
    assert int(unbounded[7]) > 4
    for row in found[2:4]:
        assert all(len(cell.split(" → ")) == 3 for cell in row[1:3])
    assert all(float(cell) > 0 for row in found[4:] for cell in row[1:])


@pytest.mark.slow
def test_engine_measures_every_engine(tmp_path: Path) -> None:
    flags = ("--models=10M", "--weights=bfloat16")
    found = quick("benchmarks.engine", tmp_path / "RESULTS.md", *flags)
    names = ["Sluice", "transformers, continuous batching", "transformers, generate"]
    if HAS_LLAMA_CPP:
        names.append("llama.cpp")
    assert [row[:2] for row in found] == [[n, name] for n in "13" for name in names]
    for row in found:
        assert all(float(cell) > 0 for cell in row[2:6])
        assert [cell != "" for cell in row[6:]] == [row[1] != "Sluice"] * 2


@pytest.mark.parametrize("package", ["llama_cpp.llama_cpp", "gguf"])
def test_engine_says_why_llama_cpp_is_left_out(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    plan = Plan(engines=("llama.cpp",))
    with contest(plan, CHECKPOINT, "float32") as (generators, _check, missing):
        assert generators == []
    assert len(missing) == 1
    assert missing[0].startswith("llama.cpp is left out: ")


@pytest.mark.skipif(not HAS_LLAMA_CPP, reason="llama-cpp-python or gguf is not installed")
def test_llama_cpp_computes_the_model_that_it_is_given() -> None:
    plan = Plan(engines=("llama.cpp",))
    prompts = make_prompts(3, 40, seed=1)
    with contest(plan, CHECKPOINT, "float32") as ([generator], check, _missing):
        for _ in range(2):  # the second time with the cache that the first has left
            tokens = generator.generate(prompts, 8).tokens
            check.check(generator.name, prompts, tokens)


@pytest.mark.skipif(not HAS_LLAMA_CPP, reason="llama-cpp-python or gguf is not installed")
def test_llama_cpp_reads_a_text_as_the_tokens_that_sluice_reads(tmp_path: Path) -> None:
    import gguf
    from llama_cpp import Llama

    write_random_llama(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    write_gguf(gguf, tmp_path, tmp_path / "model.gguf", "float32", has_tokenizer=True)
    model = Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    text = "8410 time year\u00e9 children, worlds\nanswer "
    expected = tokenizer.encode(text).ids
    assert model.tokenize(text.encode(), add_bos=True, special=True) == expected
    assert model.detokenize(expected).decode() == text
    assert model.token_eos() == tokenizer.token_to_id(END)
    model.close()


def test_a_server_that_does_not_start_is_told_with_what_it_says(tmp_path: Path) -> None:
    server = tmp_path / "llama-server"
    server.write_text("#!/bin/sh\necho no such model: $2\nexit 1\n")
    server.chmod(0o700)
    with (
        pytest.raises(StartFailed, match="no such model: model"),
        llama_cpp(server, Path("model.gguf"), threads=1, slots=1),
    ):
        pytest.fail("it is up")


def test_a_compiled_step_that_computes_something_else_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random_llama(tmp_path)
    monkeypatch.setattr(torch, "compile", lambda forward, **_: lambda *given: forward(*given) + 1)
    with pytest.raises(ValueError, match="something else"):
        measure(COLD, tmp_path, tmp_path / "artefact", sizes=(1, 3), steps=1)
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    outcome = measure(COLD, tmp_path, tmp_path / "artefact", sizes=(1, 3), steps=1)
    assert set(outcome.step_ms) == {1, 3}


@pytest.mark.slow
def test_engine_measures_awq_beside_the_same_values_dense(tmp_path: Path) -> None:
    flags = ("--models=embedded", "--weights=awq", "--engines=sluice")
    found = quick("benchmarks.engine", tmp_path / "RESULTS.md", *flags)
    names = ["Sluice", "Sluice, the same weights dense"]
    assert [row[:2] for row in found] == [[n, name] for n in "13" for name in names]


@pytest.mark.slow
def test_sampling_measures_every_kind(tmp_path: Path) -> None:
    flags = ("--distributions=sharp", "--weights=float32")
    found = quick("benchmarks.sampling", tmp_path / "RESULTS.md", *flags)
    assert [row[:3] for row in found] == [["sharp", "float32", kind] for kind in KINDS]
    assert all(float(row[3]) > 0 for row in found)


@pytest.mark.slow
def test_awq_is_measured_by_layers_and_by_whole_models(tmp_path: Path) -> None:
    found = quick("benchmarks.awq", tmp_path / "RESULTS.md")
    layers, models = found[:2], found[2:]
    assert [row[:2] for row in layers] == [["256 x 128", rows] for rows in "13"]
    assert all(float(cell) > 0 for row in layers for cell in row[2:])
    assert [row[:2] for row in models] == [["10M", name] for name in CONTENDERS]
    assert all(float(row[3]) > 0 for row in models)


@pytest.mark.slow
def test_structured_output_measures_every_constraint(tmp_path: Path) -> None:
    found = quick("benchmarks.structured_output", tmp_path / "RESULTS.md", "--models=10M")
    speeds, costs = found[: 2 * len(CONSTRAINTS)], found[2 * len(CONSTRAINTS) :]
    assert [row[:2] for row in speeds] == [[name, n] for name in CONSTRAINTS for n in "13"]
    assert [row[0] for row in costs] == list(CONSTRAINTS)
    cells = [cell for row in speeds for cell in row[2:]] + [
        cell for row in costs for cell in row[1:]
    ]
    assert all(float(cell.replace(",", "")) > 0 for cell in cells)


@pytest.mark.slow
def test_conversations_show_what_the_prefix_cache_saves(tmp_path: Path) -> None:
    flags = ("--turns=3", "--words=20", f"--model={CHECKPOINT}")
    found = quick("benchmarks.multi_turn", tmp_path / "RESULTS.md", *flags)
    assert [row[:2] for row in found] == [[n, state] for n in "123" for state in ("on", "off")]
    for before, row in zip(found[:-2], found[2:], strict=True):
        prompt_tokens, cached = int(row[2]), int(row[3])
        # all that the last turn computed is there, but for its last block
        assert cached == 0 if row[1] == "off" else int(before[2]) - 16 <= cached < prompt_tokens
    assert {row[3] for row in found[:2]} == {"0"}


@pytest.mark.slow
def test_gpu_runs_on_a_cpu(tmp_path: Path) -> None:
    kept = tmp_path / "RESULTS.md"
    found = quick("benchmarks.gpu", kept, "--shape=tiny", "--device=cpu", "--without-vllm")
    assert [row[:3] for row in found] == [
        [weights, count, "Sluice"] for weights in ("bfloat16", "awq") for count in "13"
    ]
    bounds = [float(row[5]) for row in found]
    # 4 bits are fewer than 16, and three sequences read more than one
    assert 0 < bounds[2] < bounds[0] < bounds[1]
    assert kept.read_text().count("vLLM is left out, as asked") == 2


@pytest.mark.parametrize(
    ("outcome", "found"),
    [
        (subprocess.CompletedProcess([], 0, 'INFO it runs\n{"8": [0.5, 0.25]}\n', ""), {8: [0.5, 0.25]}),
        (subprocess.CompletedProcess([], 0, "INFO it ran\n", ""), "vLLM is left out: it failed"),
        (subprocess.CompletedProcess([], 1, "{}\n", "log\nno memory\n"), "vLLM is left out: no memory"),
        (subprocess.TimeoutExpired([], 3600), "vLLM is left out: it took more than an hour"),
    ],
)  # fmt: skip
def test_vllm_is_measured_or_it_is_said_why_not(
    outcome: Any, found: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object, **__: object) -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr("benchmarks.gpu.importlib.util.find_spec", lambda _: object())
    monkeypatch.setattr("benchmarks.gpu.subprocess.run", run)
    assert measure_vllm(GpuPlan(shape="tiny", device="cpu"), "awq") == found


def test_vllm_gets_the_same_shape(tmp_path: Path) -> None:
    write_config(tmp_path, "8B", "awq")
    config, shape = LlamaConfig.from_pretrained(tmp_path), SHAPES["8B"]
    assert config.head_dim == 128
    assert (config.vocab_size, config.hidden_size) == (shape.vocabulary, shape.hidden)
    assert (config.num_hidden_layers, config.num_key_value_heads) == (32, 8)
    assert shape.num_parameters == pytest.approx(8.03e9, rel=1e-3)  # as Llama 3.1 8B
    awq = awq_format(config)
    assert awq is not None
    assert awq.group_size == 128


def test_an_answer_that_is_not_the_models_own_is_no_result() -> None:
    prompts = make_prompts(2, num_tokens=20, seed=1)
    generator = Sluice(CHECKPOINT, "bfloat16", threads=1)
    completions = generator.generate(prompts, 12).tokens
    generator.close()
    check = AnswerCheck(CHECKPOINT, "bfloat16")
    assert check.check("Sluice", prompts, completions).share > 0.8
    completions[1][7] = (completions[1][7] + 1) % 1792
    with pytest.raises(WrongAnswer, match="Sluice"):
        check.check("Sluice", prompts, completions)


def test_missing_tokens_are_no_result() -> None:
    output = Output.begin(2)
    output.add(0, [5, 6])
    output.add(1, [7])
    with pytest.raises(GenerationFailed):
        output.check(2)
    output.add(1, [8])
    output.check(2)
    assert output.num_tokens == 4
    assert len(output.gaps()) == 2


def test_every_token_and_byte_is_counted() -> None:
    streams, tokens = 3, 40

    async def measure() -> None:
        with running_stack(str(CHECKPOINT), streams) as stack:
            edge = await measure_edge(stack, streams, tokens, 0.01)
            bare = await measure_bare(stack, edge, 0.01)
        for measurement in (edge, bare):
            assert len(measurement.writes) == streams
            for writes in measurement.writes:
                assert sum(len(write.stamps()) for write in writes) == tokens
                assert writes[-1].data.endswith(b"data: [DONE]\n\n")
            # each stream had its first token, and maybe more, before the count began
            assert 0 < measurement.tokens <= streams * (tokens - 1)
            assert measurement.tokens == len(measurement.latencies)
            assert min(measurement.latencies) > 0
            assert measurement.server_cpu_seconds > 0
        texts = [[write.data for write in stream] for stream in edge.writes]
        assert [[len(text) for text in stream] for stream in texts] == [
            [len(write.data) for write in stream] for stream in bare.writes
        ]

    uvloop.run(measure())


def test_a_recording_knows_when_an_event_was_whole() -> None:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    receipts = [
        (10, head + b"5\r\nab"),
        (20, b"c\n\n\r\n"),
        (30, b"6\r\nd\n\ne\n\n\r\n0\r\n\r\n"),
    ]
    found = read_writes(receipts)
    assert [(write.data, write.received_at, write.events) for write in found] == [
        (b"abc\n\n", 20, 1),
        (b"d\n\ne\n\n", 30, 2),
    ]


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 503 Busy\r\n\r\n0\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n5\r\nab"]
)
def test_a_stream_that_is_not_whole_is_no_result(answer: bytes) -> None:
    with pytest.raises(StreamFailed):
        read_writes([(1, answer)])


def test_percentile_is_a_value_that_was_measured() -> None:
    values = [float(value) for value in range(1, 101)]
    assert (percentile(values, 50), percentile(values, 99), percentile(values, 100)) == (
        50,
        99,
        100,
    )
    assert percentile([3.0], 99) == 3.0


def test_spread_tells_median_lowest_and_highest() -> None:
    assert spread([3.0, 1.0, 2.0], 1) == "2.0 (1.0–3.0)"
    assert spread([1234.0], 0) == "1,234"


def test_a_table_is_markdown() -> None:
    table = Table(("Name", "ms"), labels=1, rows=[("a", "1.5")])
    assert str(table) == "| Name |  ms |\n| ---- | --: |\n| a    | 1.5 |"


def test_a_report_replaces_its_own_section_only(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    path.write_text("# Results\n")
    for name, text in (("One", "old"), ("Two", "other"), ("One", "new")):
        Report(name, (text,), load=0.5).keep(path)
    kept = path.read_text()
    assert kept.startswith("# Results\n")
    assert "old" not in kept
    assert kept.index("new") < kept.index("other")
