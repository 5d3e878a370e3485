"""The steps that are on their way through the model: launched in order, collected in order, run again if they fail."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from inference_worker.engine.runner import DeviceLost, InFlight, Row, RowOutput, Runner
from inference_worker.engine.sequence import State


@dataclass(slots=True)
class _Step:
    rows: list[Row]
    in_flight: InFlight | None = None  # None: the rows must be run (again) when its turn comes
    error: Exception | None = None  # with which the rows, run together, failed


class Steps:
    """Runs steps on a runner, keeps the counts of their sequences, and tells apart the rows that fail.

    A sequence that ends while a step is in flight gives its blocks back at once. The step still writes to them, which
    is harmless: the device takes steps in order, so whoever gets such a block writes it later and reads only what it
    wrote; and nobody writes a block that is full, the only kind that is shared. What the step gives is dropped.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._steps: deque[_Step] = deque()  # oldest first

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def can_run_ahead(self) -> bool:
        """Whether one more step can be launched before those in flight are collected."""
        return all(
            step.in_flight is not None
            and not any(row.is_whole and row.sequence.must_know_last_token for row in step.rows)
            for step in self._steps
        )

    def launch(self, rows: list[Row]) -> None:
        """Begin a step. Raises: DeviceLost; any other failure shows when it is collected."""
        step = _Step(rows)
        try:
            step.in_flight = self._runner.launch(rows)
        except DeviceLost:
            raise
        except Exception as error:
            step.error = error
        for row in rows:
            row.sequence.num_computed_tokens = row.stop
        _count_pending([step], 1)
        self._steps.append(step)

    def collect(self) -> list[tuple[Row, RowOutput]]:
        """End the oldest step: what it gave to each row whose sequence has not ended since.

        Raises: DeviceLost.
        """
        outputs = self._collect(self._steps[0])
        _count_pending([self._steps.popleft()], -1)
        return [(row, output) for row, output in outputs if _is_live(row)]

    def _collect(self, step: _Step) -> Iterable[tuple[Row, RowOutput]]:
        if step.in_flight is not None:
            try:
                return zip(step.rows, step.in_flight.collect(), strict=True)
            except DeviceLost:
                raise
            except Exception as error:
                step.error = error
                self._void_later_steps()
        rows = [row for row in step.rows if _is_live(row)]
        with self._as_if_not_launched():
            if step.error is None or len(rows) < len(step.rows):
                return self._run(rows)
            return self._run_halves(rows, step.error)

    def _run(self, rows: list[Row]) -> list[tuple[Row, RowOutput]]:
        try:
            outputs = self._runner.launch(rows).collect() if rows else []
        except DeviceLost:
            raise
        except Exception as error:
            return self._run_halves(rows, error)
        return list(zip(rows, outputs, strict=True))

    def _run_halves(self, rows: list[Row], error: Exception) -> list[tuple[Row, RowOutput]]:
        """Run each half of failed rows alone, so that a row that cannot run fails alone.

        Running a row again is harmless: it writes the same KV and draws the same token.
        """
        if len(rows) == 1:
            return [(rows[0], RowOutput(error=error))]
        half = len(rows) // 2
        return self._run(rows[:half]) + self._run(rows[half:])

    def _void_later_steps(self) -> None:
        """What was launched after a failed step read what that step did not write."""
        for step in self._steps:
            in_flight, step.in_flight = step.in_flight, None
            if step is not self._steps[0] and in_flight is not None:
                with suppress(Exception):
                    in_flight.collect()

    @contextmanager
    def _as_if_not_launched(self) -> Iterator[None]:
        _count_pending(self._steps, -1)
        yield
        _count_pending(self._steps, 1)


def _is_live(row: Row) -> bool:
    return row.sequence.state is State.RUNNING


def _count_pending(steps: Iterable[_Step], sign: int) -> None:
    for step in steps:
        for row in step.rows:
            if row.is_whole:
                row.sequence.num_pending_tokens += sign
