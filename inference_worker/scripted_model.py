"""A model without torch: repeats a given text through the real engine, service and server.

For measuring the transport and for fault tests: `python -m inference_worker.scripted_model --step-milliseconds 5`.
It takes the flags of `python -m inference_worker` and its own; --model names the checkpoint whose tokenizer it uses.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NoReturn

from pydantic import Field

from inference_worker.command_line import read_settings
from inference_worker.early_signals import end_on_signal
from inference_worker.engine.event import Candidate, Token
from inference_worker.engine.request import SamplingParams
from inference_worker.engine.runner import Row, RowOutput, SynchronousRunner
from inference_worker.settings import WorkerSettings
from inference_worker.settings.setting_group import unit

if TYPE_CHECKING:
    from inference_worker.served_model import ServedModel

_CONTEXT_LENGTH: Final = 4096
_CERTAIN: Final = 0.0  # log-probability of the only token that can come


class ScriptedSettings(WorkerSettings):
    """Serve a script in place of a model."""

    text: str = Field(
        "The quick brown fox jumps over the lazy dog. ",
        min_length=1,
        description="What every choice says, again and again.",
        json_schema_extra=unit("text"),
    )
    repeats: int | None = Field(
        None,
        ge=1,
        description="End the text after so many times. Unset: only max_tokens ends it.",
        json_schema_extra=unit("times"),
    )
    step_milliseconds: float = Field(
        0,
        ge=0,
        description="How long a step takes.",
        json_schema_extra=unit("milliseconds"),
    )
    blocks: int = Field(
        8192,
        ge=1,
        description="Blocks of the KV cache, of which nothing is kept but the count.",
        json_schema_extra=unit("blocks"),
    )
    failing_seed: int | None = Field(
        None,
        description="A request with this seed fails at its second token.",
        json_schema_extra=unit("seed"),
    )
    crashing_seed: int | None = Field(
        None,
        description="A request with this seed crashes the engine at its second token.",
        json_schema_extra=unit("seed"),
    )

    hanging_seed: int | None = Field(
        None,
        description="A step with a request of this seed never ends, at the request's second token.",
        json_schema_extra=unit("seed"),
    )


class ScriptedFailure(Exception):
    """The failure that was asked for."""


class ScriptedCrash(BaseException):
    """The crash that was asked for: not an Exception, so that the engine does not contain it."""


class ScriptedRunner(SynchronousRunner):
    """Draws the script's tokens in order; one token a sequence and step, like any model."""

    def __init__(self, settings: ScriptedSettings, script: Sequence[int], end_token: int) -> None:
        self.num_blocks = settings.blocks
        self.block_size = settings.block_size
        self._settings = settings
        self._script = script
        self._end_token = end_token

    def execute(self, rows: Sequence[Row]) -> list[RowOutput]:
        """Take the time of a step, and draw a token for each row whose tokens are all computed."""
        if self._settings.step_milliseconds:
            time.sleep(self._settings.step_milliseconds / 1000)
        return [self._output(row) for row in rows]

    def close(self) -> None:
        """Nothing is held."""

    def _output(self, row: Row) -> RowOutput:
        request = row.sequence.request
        scores: tuple[Token, ...] = ()
        if request.output.prompt_logprobs:
            last = min(row.stop, len(request.prompt) - 1)
            scores = tuple(
                self._token(request.prompt[position], row)
                for position in range(row.start + 1, last + 1)
            )
        if not row.is_whole:
            return RowOutput(prompt_logprobs=scores)
        position = row.sequence.num_completion_tokens
        if position == 1 and request.sampling.seed == self._settings.failing_seed:
            return RowOutput(error=ScriptedFailure("the script fails here"))
        if position == 1 and request.sampling.seed == self._settings.crashing_seed:
            raise ScriptedCrash("the script crashes here")
        if position == 1 and request.sampling.seed == self._settings.hanging_seed:
            threading.Event().wait()
        return RowOutput(token=self._token(self._draw(position), row), prompt_logprobs=scores)

    def _draw(self, position: int) -> int:
        repeats = self._settings.repeats
        if repeats is not None and position >= repeats * len(self._script):
            return self._end_token
        return self._script[position % len(self._script)]

    def _token(self, token_id: int, row: Row) -> Token:
        logprobs = row.sequence.request.output.logprobs
        if logprobs is None:
            return Token(token_id)
        return Token(token_id, _CERTAIN, (Candidate(token_id, _CERTAIN),) if logprobs else ())


def load_script(settings: ScriptedSettings) -> ServedModel:
    """Make the model. The id after the vocabulary's last one is its end-of-sequence token."""
    # Imported only now: --help and a bad setting need no tokenizer.
    from inference_worker.served_model import ModelInfo, ServedModel
    from inference_worker.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(settings.model)
    prefix = tokenizer.encode("")  # what stands before every text, such as BOS
    script = tokenizer.encode(settings.text)[len(prefix) :]
    info = ModelInfo(
        name=settings.served_name,
        context_length=settings.context_length or _CONTEXT_LENGTH,
        vocabulary_size=tokenizer.vocabulary_size,
        architecture="Script",
        dtype="none",
        device="none",
        parameter_count=0,
        eos_token_ids=frozenset({tokenizer.vocabulary_size}),
        default_sampling=SamplingParams(),
        kv_cache=f"{settings.blocks} blocks of {settings.block_size} tokens, without memory",
    )
    runner = ScriptedRunner(settings, script, end_token=tokenizer.vocabulary_size)
    return ServedModel(info=info, tokenizer=tokenizer, runner=runner)


def main() -> NoReturn:
    settings = read_settings(ScriptedSettings, "inference_worker.scripted_model", sys.argv[1:])
    end_on_signal()
    _leave_torch_out()
    from inference_worker.process import run

    run(settings, lambda _: load_script(settings))


def _leave_torch_out() -> None:
    """transformers imports torch wherever it is, which takes seconds, and of it only the tokenizer is needed here."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is none


if __name__ == "__main__":
    main()
