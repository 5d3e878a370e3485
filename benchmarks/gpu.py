"""How fast a GPU decodes, beside what its memory allows and beside vLLM.

`python -m benchmarks.gpu` builds a Llama of random weights in the shape of Llama 3.1 8B on the GPU, in bfloat16 and
with 4-bit AWQ weights (groups of 128), and lets the worker's engine decode 1, 8, 32 and 128 sequences at once, as it
serves them: kernels, decode graphs and a step in flight. `--keep benchmarks/RESULTS.md` puts the section into that
file.

A step must read every weight but the embedding's, and the keys and values of every sequence. The time that this takes
at the speed of a copy, measured on the same card in the same run, is the bound; the table says what share of a step it
is. Where vLLM is installed it decodes the same shapes in a process of its own (gpu_vllm.py), otherwise the output says
that it is left out. `--shape tiny --device cpu` shows on any machine that all of this runs, but for kernels and graphs.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.random_llama import Shape
from benchmarks.report import Report
from benchmarks.table import Table, spread
from inference_worker.engine.detokenizer import ByteDetokenizer
from inference_worker.engine.engine import Engine, EngineOptions
from inference_worker.engine.event import Failed, FinishReason
from inference_worker.engine.request import Request, SamplingParams, StoppingParams
from inference_worker.model.awq import AwqLinear
from inference_worker.model.awq_layout import AwqWeights
from inference_worker.model.loader import make_runner
from inference_worker.model.runner import ModelRunner
from inference_worker.settings import WorkerSettings

SHAPES: Final = {
    "8B": Shape(
        vocabulary=128_256,
        hidden=4096,
        intermediate=14_336,
        layers=32,
        heads=32,
        kv_heads=8,
        context=8192,
    ),
    "tiny": Shape(
        vocabulary=512, hidden=128, intermediate=256, layers=2, heads=4, kv_heads=2, context=512
    ),
}
WEIGHTS: Final = ("bfloat16", "awq")
GROUP_SIZE: Final = 128
_COPIED_BYTES: Final = {"cuda": 2**30, "cpu": 2**24}
_MIB: Final = 2**20


@dataclass(frozen=True)
class Plan:
    """What to run."""

    shape: str = "8B"
    device: str = "cuda"
    weights: tuple[str, ...] = WEIGHTS
    batches: tuple[int, ...] = (1, 8, 32, 128)
    prompt_tokens: int = 128
    steps: int = 64  # of a repetition
    repetitions: int = 5
    with_vllm: bool = True

    @property
    def length(self) -> int:
        """Most tokens of a sequence: some are ahead of others when all decode."""
        return self.prompt_tokens + self.steps * (self.repetitions + 1) + 64

    @property
    def mean_length(self) -> int:
        """Tokens of a sequence, over the measured steps."""
        return self.prompt_tokens + self.steps + self.steps * self.repetitions // 2


@dataclass(frozen=True)
class Measurement:
    """One engine at one number of sequences."""

    seconds: list[float]  # of a step, one a repetition
    least_bytes: int  # that a step reads


class NotDecoding(Exception):
    """The engine did something else than decoding all sequences while it was measured."""


def build(shape: Shape, weights: str, device: torch.device) -> PreTrainedModel:
    """The model, made on the device."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    if weights == "awq":
        _quantize_at_random(model)
    built: PreTrainedModel = model.train(False)
    return built


def _quantize_at_random(model: PreTrainedModel) -> None:
    """Put 4-bit weights in place of every layer's, as autoawq does: the head keeps its own."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        groups, device = module.in_features // GROUP_SIZE, module.weight.device
        size = (module.out_features, module.in_features)
        codes = torch.randint(16, size, dtype=torch.uint8, device=device)
        zeros = torch.full((groups, module.out_features), 8, dtype=torch.uint8, device=device)
        # codes are spread as evenly as the weights of a new layer are narrow
        scales = torch.full(zeros.shape, 0.02 / 4.6, dtype=torch.float16, device=device)
        packed = AwqLinear.pack(AwqWeights(codes, zeros, scales), None, torch.bfloat16)
        model.set_submodule(name, packed)


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of all weights but the embedding's, of which a step reads a row a sequence."""
    packed = sum(m.num_bytes for m in model.modules() if isinstance(m, AwqLinear))
    dense = sum(p.nbytes for n, p in model.named_parameters() if "embed_tokens" not in n)
    return packed + dense


def copy_speed(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes; the best of several."""
    source = torch.ones(_COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        _wait(device)
        began = time.perf_counter()
        target.copy_(source)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return 2 * source.nbytes / min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def new_detokenizer(*, at_start: bool = False) -> ByteDetokenizer:  # noqa: ARG001
    """Every token is the same letter: its text is not what is measured."""
    return _DETOKENIZER


_DETOKENIZER: Final = ByteDetokenizer([b"x"] * max(shape.vocabulary for shape in SHAPES.values()))


def decode(plan: Plan, runner: ModelRunner, num_sequences: int) -> list[float]:
    """Seconds of a step of so many sequences, one figure a repetition. Raises: NotDecoding."""
    options = EngineOptions(
        max_running=num_sequences,
        max_batch_tokens=max(2048, num_sequences),
        context_length=plan.length,
    )
    engine = Engine(runner, new_detokenizer, options)
    random = torch.Generator().manual_seed(num_sequences)
    for index in range(num_sequences):
        size = (plan.prompt_tokens,)
        prompt = torch.randint(SHAPES[plan.shape].vocabulary, size, generator=random).tolist()
        stopping = StoppingParams(plan.length - plan.prompt_tokens)
        sampling = SamplingParams(temperature=0)
        engine.add(Request(str(index), tuple(prompt), stopping, sampling))
    while engine.load().waiting or engine.load().generated_tokens < 4 * num_sequences:
        engine.step()
    _run(engine, num_sequences, plan.steps)  # warms up
    seconds = [_run(engine, num_sequences, plan.steps) for _ in range(plan.repetitions)]
    for request, event in engine.take_events():
        if isinstance(event, Failed):
            raise NotDecoding(f"request {request.request_id}: {event.error}")
    engine.cancel_all(FinishReason.CANCELLED)
    while engine.has_work:  # a step in flight
        engine.step()
    return seconds


def _run(engine: Engine, num_sequences: int, steps: int) -> float:
    """Seconds of a step. With a step in flight each call launches one and ends another."""
    before = engine.load().generated_tokens
    gc.collect()
    gc.disable()
    try:
        began = time.perf_counter()
        for _ in range(steps):
            engine.step()
        seconds = (time.perf_counter() - began) / steps
    finally:
        gc.enable()
    made = engine.load().generated_tokens - before
    if made != steps * num_sequences:
        raise NotDecoding(f"{made} tokens came in {steps} steps of {num_sequences} sequences")
    return seconds


def measure_sluice(plan: Plan, weights: str) -> tuple[dict[int, Measurement], str]:
    """By number of sequences; and what the runner says of itself."""
    device, shape = torch.device(plan.device), SHAPES[plan.shape]
    model = build(shape, weights, device)
    most = max(plan.batches)
    kv_bytes = 2 * shape.layers * shape.kv_heads * (shape.hidden // shape.heads) * 2  # of a token
    settings = WorkerSettings(
        device=plan.device,
        max_running=most,
        max_batch_tokens=max(2048, most),
        kv_cache_mib=2 * most * plan.length * kv_bytes // _MIB + 64,
    )
    runner = make_runner(model, plan.length, settings)
    fixed = weight_bytes(model)
    found = {
        count: Measurement(decode(plan, runner, count), fixed + count * plan.mean_length * kv_bytes)
        for count in plan.batches
    }
    description = runner.description
    runner.close()
    return found, description


def measure_vllm(plan: Plan, weights: str) -> dict[int, list[float]] | str:
    """Seconds of a step by number of sequences, or why there are none."""
    if not plan.with_vllm:
        return "vLLM is left out, as asked"
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is left out: it is not installed"
    job = {**asdict(plan), "weights": weights, "length": plan.length}
    command = [sys.executable, "-m", "benchmarks.gpu_vllm", json.dumps(job)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    except subprocess.TimeoutExpired:
        return "vLLM is left out: it took more than an hour"
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    if result.returncode != 0 or not lines:
        return f"vLLM is left out: {(result.stderr.strip() or 'it failed').splitlines()[-1]}"
    found: dict[str, Any] = json.loads(lines[-1])
    return {int(count): seconds for count, seconds in found.items()}


def _row(weights: str, name: str, count: int, seconds: Sequence[float], bound: float) -> list[str]:
    return [
        weights,
        str(count),
        name,
        spread([second * 1e3 for second in seconds], 3),
        f"{count / statistics.median(seconds):,.0f}",
        f"{bound * 1e3:.4g}",
        f"{100 * bound / statistics.median(seconds):.0f} %",
    ]


def run(plan: Plan, speed: float) -> Iterator[str]:
    """A table, and what is worth saying of how it came about."""
    header = ("Weights", "Sequences", "Engine", "Step ms", "Tokens/s", "Bound ms", "Share of bound")
    table = Table(header, labels=3)
    remarks = []
    for weights in plan.weights:
        ours, description = measure_sluice(plan, weights)
        _release()
        theirs = measure_vllm(plan, weights)
        remarks.append(
            f"{weights}: {description}." + (f" {theirs}." if isinstance(theirs, str) else "")
        )
        for count, measurement in ours.items():
            bound = measurement.least_bytes / speed
            table.rows.append(_row(weights, "Sluice", count, measurement.seconds, bound))
            if not isinstance(theirs, str):
                table.rows.append(_row(weights, "vLLM", count, theirs[count], bound))
    yield str(table)
    yield "\n\n".join(remarks)


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def report(plan: Plan) -> Report:
    """Run, and write it up."""
    load = os.getloadavg()[0]
    speed = copy_speed(torch.device(plan.device))
    _release()
    introduction = (
        f"A {SHAPES[plan.shape]}; {_device(plan.device)}. Sequences of {plan.prompt_tokens} tokens and more, all "
        f"decoding, greedily; {plan.repetitions} × {plan.steps} steps: median (lowest–highest) of a step. A copy moves "
        f"{speed / 1e9:,.0f} GB/s; the bound is what a step must read at that speed."
    )
    return Report(f"GPU, {plan.shape}", (introduction, *run(plan, speed)), load)


def _device(name: str) -> str:
    if torch.device(name).type != "cuda":
        return f"on the {name}, where nothing but that it runs is of interest"
    versions = {"CUDA": torch.version.cuda, "torch": torch.__version__}
    for package in ("triton", "vllm"):
        if importlib.util.find_spec(package) is not None:
            versions[package] = importlib.metadata.version(package)
    described = ", ".join(f"{key} {value}" for key, value in versions.items())
    return f"{torch.cuda.get_device_name(name)}, {described}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    plan = Plan()
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--shape", choices=list(SHAPES), default=plan.shape)
    parser.add_argument("--device", default=plan.device)
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=plan.weights)
    parser.add_argument("--batches", type=int, nargs="+", default=plan.batches)
    parser.add_argument("--prompt-tokens", type=int, default=plan.prompt_tokens)
    parser.add_argument("--steps", type=int, default=plan.steps)
    parser.add_argument("--repetitions", type=int, default=plan.repetitions)
    parser.add_argument("--without-vllm", action="store_true")
    parser.add_argument("--keep", type=Path, help="Markdown file that keeps the result")
    given = parser.parse_args()
    if torch.device(given.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --shape tiny --device cpu runs anywhere")
    plan = Plan(
        shape=given.shape,
        device=given.device,
        weights=tuple(given.weights),
        batches=(1, 3) if given.quick else tuple(given.batches),
        prompt_tokens=8 if given.quick else given.prompt_tokens,
        steps=4 if given.quick else given.steps,
        repetitions=2 if given.quick else given.repetitions,
        with_vllm=not given.without_vllm,
    )
    result = report(plan)
    print(result, flush=True)
    if given.keep is not None:
        result.keep(given.keep)


if __name__ == "__main__":
    main()
