"""Serves litellm's `completion` to the tests, as `foreign_process` says. It runs where litellm is installed."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else the import asks the network for prices

import litellm  # type: ignore[import-not-found]  # not in the tests' own environment

litellm.suppress_debug_info = True  # what it prints beside an exception


def complete(question: dict[str, Any], **more: Any) -> Any:
    return litellm.completion(
        model=f"openai/{question['model']}",
        api_base=f"{question['url']}/v1",
        api_key=question["key"],
        messages=[{"role": "user", "content": question["content"]}],
        max_tokens=question["max_tokens"],
        temperature=question["temperature"],
        max_retries=0,
        **more,
    )


def answer(completion: Any) -> dict[str, Any]:
    (choice,) = completion.choices
    return {
        "text": choice.message.content,
        "finish_reason": choice.finish_reason,
        "prompt_tokens": completion.usage.prompt_tokens,
        "completion_tokens": completion.usage.completion_tokens,
    }


def ask(question: dict[str, Any]) -> dict[str, Any]:
    return answer(complete(question))


def stream(question: dict[str, Any]) -> dict[str, Any]:
    chunks = list(complete(question, stream=True, stream_options={"include_usage": True}))
    joined = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    built = answer(litellm.stream_chunk_builder(chunks))
    assert built["text"] == joined
    return built


def leave(question: dict[str, Any]) -> str:
    chunks = complete(question, stream=True)
    for chunk in chunks:
        if text := chunk.choices[0].delta.content:
            chunks.completion_stream.close()
            return str(text)
    raise AssertionError("no text came")


FUNCTIONS = {"ask": ask, "stream": stream, "leave": leave}


def main() -> None:
    replies, sys.stdout = sys.stdout, sys.stderr  # stdout is the answers' alone
    for line in sys.stdin:
        request = json.loads(line)
        reply: dict[str, Any]
        try:
            reply = {"value": FUNCTIONS[request["call"]](request["arguments"])}
        except Exception as error:
            raised = {"name": type(error).__name__, "message": str(error)}
            reply = {"raised": raised | {"status": getattr(error, "status_code", None)}}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
