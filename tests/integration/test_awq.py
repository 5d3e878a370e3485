"""The embedded model's AWQ form, made by the quantize command and served through gRPC and SSE."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file

from inference_worker.default_model import CHECKPOINT
from protos.sluice.v1 import generation_pb2 as pb
from tests.integration.stack import ROOT, Stack, running_stack

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("awq") is None, reason="autoawq is not installed"
)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, pinned: list[dict[str, Any]]) -> Path:
    """Calibrated on a few of the answers that it is to give."""
    directory = tmp_path_factory.mktemp("awq")
    text = directory / "calibration.txt"
    text.write_text("\n".join(row["answer"] for row in pinned), encoding="utf-8")
    out = directory / "sluice-tiny-awq"
    options = [f"--calibration={text}", "--calibration-tokens=128", "--group-size=64"]
    command = [sys.executable, "-m", "inference_worker.quantize", str(CHECKPOINT), str(out)]
    result = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr
    assert "6/6" in result.stderr  # its progress, by layers
    assert str(out) in result.stdout
    return out


@pytest.fixture(scope="module")
def served(quantized: Path) -> Iterator[Stack]:
    with running_stack({"model": quantized}) as running:
        yield running


def test_the_checkpoint_is_a_standard_one(quantized: Path) -> None:
    config = json.loads((quantized / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": None,
    }
    assert (config["dtype"], config["use_cache"]) == ("float16", True)
    weights = load_file(quantized / "model.safetensors")
    assert weights["model.layers.0.mlp.up_proj.qweight"].shape == (192, 512 // 8)
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (quantized / name).read_bytes() == (CHECKPOINT / name).read_bytes()
    assert not quantized.with_name(f"{quantized.name}.partial").exists()


def test_it_gives_the_pinned_answers_through_grpc_and_sse(
    served: Stack, pinned: list[dict[str, Any]]
) -> None:
    """Calibrated 4-bit weights are near enough for every greedy answer to stay what it was."""
    assert served.stub.GetModel(pb.GetModelRequest()).dtype == "bfloat16"
    for conversation in pinned:
        chat = pb.Chat(messages=[pb.ChatMessage(**row) for row in conversation["messages"]])
        request = pb.GenerateRequest(prompt=pb.Prompt(chat=chat))
        text = "".join(message.delta.text for message in served.stub.Generate(request))
        assert text == conversation["answer"]
    for conversation in pinned[:5]:
        body = {"model": "default", "stream": True, "messages": conversation["messages"]}
        response = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60)
        events = [
            json.loads(line.removeprefix("data: "))
            for line in response.text.splitlines()
            if line.startswith("data: {")
        ]
        deltas = [choice["delta"] for event in events for choice in event["choices"]]
        assert "".join(delta.get("content") or "" for delta in deltas) == conversation["answer"]
