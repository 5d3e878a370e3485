"""The scripted model, saying the time: every token's text is the moment at which its step was computed.

Engine, service and server are the worker's own. The script is replaced in two places only: a step takes as long as
the pace says, which the benchmark may change meanwhile, and the tokenizer reads a clock in place of a table.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from benchmarks.pace import Pace
from benchmarks.stamp import stamp
from inference_worker.command_line import read_settings
from inference_worker.engine.detokenizer import Detokenizer
from inference_worker.engine.runner import Row, RowOutput, Runner, SynchronousRunner
from inference_worker.process import run
from inference_worker.scripted_model import ScriptedSettings, load_script
from inference_worker.served_model import ServedModel
from inference_worker.settings.setting_group import unit
from inference_worker.tokenizer import Tokenizer


class StampedSettings(ScriptedSettings):
    """Serve clock readings in place of a model."""

    pace_file: str = Field(
        description="File that holds the pace of the steps.", json_schema_extra=unit("path")
    )


class StampedRunner(SynchronousRunner):
    """The scripted runner with a clock. Sleeping, like a model's computing, holds no interpreter lock."""

    def __init__(self, script: Runner, pace: Pace) -> None:
        self.num_blocks = script.num_blocks
        self.block_size = script.block_size
        self.stamp = ""  # of the latest step
        self._script = script
        self._pace = pace

    def execute(self, rows: Sequence[Row]) -> list[RowOutput]:
        """Wait for the next tick and take its time."""
        if delay := self._pace.delay():
            time.sleep(delay)
        outputs = self._script.launch(rows).collect()
        self.stamp = stamp().decode()
        return outputs

    def close(self) -> None:
        """Nothing is held."""
        self._script.close()


class StampDetokenizer:
    """Shows every token as the time of the step that drew it."""

    is_pending = False

    def __init__(self, runner: StampedRunner) -> None:
        self._runner = runner

    def push(self, token_id: int) -> str:  # noqa: ARG002
        """The latest step's time: detokenizing follows the step, on the same thread."""
        return self._runner.stamp

    def flush(self) -> str:
        """Nothing is held back."""
        return ""


class StampTokenizer(Tokenizer):
    """The checkpoint's tokenizer for prompts, the clock for completions."""

    runner: StampedRunner

    def new_detokenizer(self, *, at_start: bool = False) -> Detokenizer:  # noqa: ARG002
        """For one choice."""
        return StampDetokenizer(self.runner)


def load_stamps(settings: StampedSettings) -> ServedModel:
    """Make the model."""
    served = load_script(settings)
    runner = StampedRunner(served.runner, Pace(Path(settings.pace_file)))
    tokenizer = StampTokenizer.load(settings.model)
    assert isinstance(tokenizer, StampTokenizer)
    tokenizer.runner = runner
    return dataclasses.replace(served, runner=runner, tokenizer=tokenizer)


def main() -> int:
    settings = read_settings(StampedSettings, "benchmarks.stamped_model", sys.argv[1:])
    return run(settings, lambda _: load_stamps(settings))


if __name__ == "__main__":
    sys.exit(main())
