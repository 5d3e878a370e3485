"""What the worker counts and measures for Prometheus; the README lists the names.

Nothing is done for a token but what `Gaps` does. What the engine counts anyway is read when somebody asks
(`load_metrics`), on a thread of its own; all else happens once a request or once a step.
"""

from __future__ import annotations

import asyncio
import platform
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from inference_worker.engine.observer import Phase
from inference_worker.version import version_of_sluice

# Upper bounds in seconds.
_STEPS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5, 30)
_CANCELS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)
_GAPS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)
_WAITS: Final = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_REQUESTS: Final = (0.01, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)

# How a request ends; one more label value than these would be a mistake of ours.
OUTCOMES: Final = (
    *("stop", "stop_sequence", "length", "aborted", "deadline", "shutdown", "preempted"),
    *("disconnected", "slow_reader", "refused", "failed"),
)

# When a counter was made is of no use to anybody, and would double what is sent.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Gaps(Collector):
    """A histogram for what happens at every token: a third of the cost of the library's, which locks.

    Observed on one thread. A scrape may see the newest observation in the counts and not yet in the sum.
    """

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterable[Metric]:
        """The histogram as it is."""
        total = 0
        buckets = []
        for bound, count in zip((*self._bounds, float("inf")), list(self._counts), strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else str(float(bound)), total))
        family = HistogramMetricFamily(self._name, self._documentation)
        family.add_metric([], buckets, self._sum)
        yield family


class WorkerMetrics:
    """The metrics of one worker process, in a registry of their own. An engine's `Observer` too."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        info = Gauge("sluice_build_info", "The software.", ["version", "python"], registry=registry)
        info.labels(version_of_sluice(), platform.python_version()).set(1)
        self._tasks = Gauge("sluice_tasks", "Tasks of the event loop.", registry=registry)

        # --- requests
        self._requests = Histogram(
            "sluice_request_seconds",
            "From a request's arrival to its end, by how it ended.",
            ["outcome"],
            buckets=_REQUESTS,
            registry=registry,
        )
        self._refused = Counter(
            "sluice_requests_refused", "Refused requests.", ["reason"], registry=registry
        )
        self.queue_time = Histogram(
            "sluice_queue_seconds",
            "From a request's arrival to its first step, tokenizing included.",
            buckets=_WAITS,
            registry=registry,
        )
        self.first_token_time = Histogram(
            "sluice_time_to_first_token_seconds",
            "From a request's arrival to its first text.",
            buckets=_WAITS,
            registry=registry,
        )
        self.gaps = Gaps(
            "sluice_inter_token_seconds", "Between two pieces of text of a choice.", _GAPS
        )
        registry.register(self.gaps)
        self.heartbeats = Counter("sluice_heartbeats", "Heartbeats sent.", registry=registry)

        # --- who goes away, and who comes back
        self._cancels = Histogram(
            "sluice_cancel_seconds",
            "From a cancel's arrival in this process to free blocks, by the phase it found.",
            ["phase"],
            buckets=_CANCELS,
            registry=registry,
        )
        for phase in Phase:
            self._cancels.labels(phase.value)
        self._tokens_after_cancel = Counter(
            "sluice_tokens_after_cancel",
            "Tokens drawn for a request after its cancel came.",
            registry=registry,
        )
        self._resumes = Counter(
            "sluice_resumes", "Readers that came back to a stream.", ["outcome"], registry=registry
        )
        self.continuations = Counter(
            "sluice_continuations",
            "Requests that go on where another worker ended.",
            registry=registry,
        )
        self.replay_streams = Gauge(
            "sluice_replay_streams", "Streams kept for readers that come back.", registry=registry
        )
        self.parked_streams = Gauge(
            "sluice_parked_streams",
            "Of them, those whose generation waits for a reader to go on.",
            registry=registry,
        )
        self.replay_bytes = Gauge("sluice_replay_bytes", "What they take.", registry=registry)

        # --- the engine
        self._steps = Histogram(
            "sluice_engine_step_seconds", "Engine steps.", buckets=_STEPS, registry=registry
        )
        self._grammars = Counter(
            "sluice_grammar_compiles",
            "Constraints compiled, found compiled, or refused.",
            ["outcome"],
            registry=registry,
        )

    def watch_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Count the tasks of this event loop from now on."""
        self._tasks.set_function(lambda: len(asyncio.all_tasks(loop)))

    def ended(self, outcome: str, seconds: float) -> None:
        """A request ended; `outcome` is one of OUTCOMES."""
        self._requests.labels(outcome).observe(seconds)

    def refused(self, reason: str) -> None:
        """A request was refused, for a reason of the table of errors."""
        self._refused.labels(reason).inc()

    def resumed(self, outcome: str) -> None:
        """A reader asked for the rest of a stream.

        `outcome`: "resumed" for one that had any of it, "disconnected" for one that left before, or else the reason of
        the table of errors.
        """
        self._resumes.labels(outcome).inc()

    def compiled(self, outcome: str) -> None:
        """A constraint was "compiled", "cached" (found compiled) or "refused"."""
        self._grammars.labels(outcome).inc()

    # --- Observer

    def stepped(self, seconds: float) -> None:
        """A step was computed."""
        self._steps.observe(seconds)

    def cancelled(self, phase: Phase, seconds: float, num_tokens: int) -> None:
        """A request that its caller gave up is gone, and its blocks are free."""
        self._cancels.labels(phase.value).observe(seconds)
        self._tokens_after_cancel.inc(num_tokens)
