"""Runs lm_eval's tasks of `tasks/` and prints what came of them as one JSON object. It runs where lm_eval is installed.

`client.py URL TOKENIZER [MODEL={"argument": …} …]`: one run for each model of lm_eval's that is named, in order.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import lm_eval  # type: ignore[import-not-found]  # not in the tests' own environment
from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

TASKS = Path(__file__).parent / "tasks"


def run(url: str, tokenizer: str, model: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The metrics and the responses of each document."""
    task = arguments.pop("task")
    is_chat = model == "local-chat-completions"
    if not is_chat:
        arguments |= {"tokenizer": tokenizer, "tokenizer_backend": "huggingface"}
    path = "chat/completions" if is_chat else "completions"
    evaluated = lm_eval.simple_evaluate(
        model=model,
        model_args={
            "model": "sluice-tiny",
            "base_url": f"{url}/v1/{path}",
            "max_retries": 1,
            **arguments,
        },
        tasks=[task],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        apply_chat_template=task == "sluice_answer",
        bootstrap_iters=0,
    )
    samples = sorted(evaluated["samples"][task], key=lambda sample: sample["doc_id"])
    return {
        "metrics": evaluated["results"][task],
        "responses": [[response for (response,) in sample["resps"]] for sample in samples],
    }


def main() -> None:
    url, tokenizer, *runs = sys.argv[1:]
    os.chdir(TASKS)  # where the tasks look for their data
    results = []
    for text in runs:
        model, _, arguments = text.partition("=")
        results.append(run(url, tokenizer, model, json.loads(arguments)))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
