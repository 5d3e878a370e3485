"""lm_eval, unchanged: its models for completions and for chats run whole tasks on the embedded model."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from inference_worker.default_model import CHECKPOINT
from tests.clients.installation import INSTALL_SECONDS, install_once
from tests.integration.stack import Stack

HOME = Path(__file__).parent / "lm_eval"
RUN_SECONDS = 240.0

pytestmark = [
    pytest.mark.timeout(INSTALL_SECONDS + RUN_SECONDS + 60),
    pytest.mark.skipif(
        importlib.util.find_spec("datasets") is None,
        reason="lm_eval reads its tasks with datasets, which comes with the extra quantize",
    ),
]

# lm_eval's model and the arguments that differ; the likelihoods come with token ids, and with texts in batches
RUNS: list[tuple[str, dict[str, object]]] = [
    ("local-completions", {"task": "sluice_finish"}),
    ("local-completions", {"task": "sluice_finish", "tokenized_requests": False, "batch_size": 3}),
    ("local-chat-completions", {"task": "sluice_answer", "num_concurrent": 2}),
    ("local-completions", {"task": "sluice_answer"}),
]


def documents(name: str) -> list[dict[str, Any]]:
    lines = (HOME / "tasks" / name).read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def results(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each run came to."""
    packages = HOME / ".packages"
    pip = (
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--no-deps",
        "--no-compile",
    )
    options = ("--upgrade", "--target", packages, "-r", "requirements.txt")
    packages.mkdir(exist_ok=True)
    install_once(HOME / "requirements.txt", packages, [(*pip, *options)])
    cache = tmp_path_factory.mktemp("huggingface")
    offline = {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    runs = [f"{model}={json.dumps(arguments)}" for model, arguments in RUNS]
    done = subprocess.run(
        [sys.executable, HOME / "client.py", stack.url, CHECKPOINT, *runs],
        env={**os.environ, **offline, "PYTHONPATH": str(packages), "OPENAI_API_KEY": "none"},
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    evaluated: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return evaluated


@pytest.fixture(scope="module")
def likelihoods() -> list[list[tuple[float, bool]]]:
    """For each document and choice what transformers says: its log-likelihood, and whether it is the likeliest text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)

    @torch.inference_mode()
    def score(context: str, continuation: str) -> tuple[float, bool]:
        begin = len(tokenizer.encode(context, add_special_tokens=False))
        ids = torch.tensor(tokenizer.encode(context + continuation, add_special_tokens=False))
        scores = model(ids[None]).logits[0].log_softmax(-1)[begin - 1 : -1]
        picked = scores.gather(1, ids[begin:, None])
        return float(picked.sum()), bool((scores.argmax(-1) == ids[begin:]).all())

    return [
        [score(_context(document), f" {choice}") for choice in document["choices"]]
        for document in documents("finish.jsonl")
    ]


def _context(document: dict[str, Any]) -> str:
    question, begun = document["question"], document["begun"]
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{begun}"


@pytest.mark.parametrize("run", [0, 1], ids=["token ids", "texts in batches"])
def test_likelihoods_are_those_of_the_model(
    results: list[dict[str, Any]], likelihoods: list[list[tuple[float, bool]]], run: int
) -> None:
    evaluated = results[run]
    assert evaluated["metrics"]["acc,none"] == 1.0
    expected = [score for document in likelihoods for score in document]
    got = [score for document in evaluated["responses"] for score in document]
    assert [value for value, _ in got] == pytest.approx([x for x, _ in expected], abs=2e-3)
    assert [is_greedy for _, is_greedy in got] == [is_greedy for _, is_greedy in expected]
    assert {is_greedy for _, is_greedy in got} == {True, False}


@pytest.mark.parametrize("run", [2, 3], ids=["chats", "completions"])
def test_answers_are_those_of_the_model(results: list[dict[str, Any]], run: int) -> None:
    evaluated = results[run]
    assert evaluated["metrics"]["exact_match,none"] == 1.0
    answers = [[document["answer"]] for document in documents("answer.jsonl")]
    assert evaluated["responses"] == answers
