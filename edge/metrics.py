"""What the edge counts and measures for Prometheus; the README lists the names.

Labels are few and ours: route templates, statuses, error types. Nothing that a client writes becomes one. All is
counted once a request, or read when somebody scrapes.
"""

import asyncio
import platform
from typing import Final

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from starlette.requests import Request
from starlette.responses import Response

from edge.version import version_of_sluice

# How far a stream came, as the edge knows it: before the worker's first message, before the first token, after it.
PHASES: Final = ("queued", "prefill", "decode")
# Upper bounds in seconds.
_CANCELS: Final = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)
_WAITS: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_REQUESTS: Final = (0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_NO_ROUTE: Final = "none"
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "DELETE", "OPTIONS"})

# When a counter was made is of no use to anybody, and would double what is sent.
disable_created_metrics()  # type: ignore[no-untyped-call]


class EdgeMetrics:
    """The metrics of one edge process, in a registry of their own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        info = Gauge("sluice_build_info", "The software.", ["version", "python"], registry=registry)
        info.labels(version_of_sluice(), platform.python_version()).set(1)
        self._tasks = Gauge("sluice_tasks", "Tasks of the event loop.", registry=registry)

        # --- requests
        self._requests = Counter(
            "sluice_edge_requests",
            "HTTP requests answered; 499 for those whose client left.",
            ["route", "method", "status"],
            registry=registry,
        )
        self._durations = Histogram(
            "sluice_edge_request_seconds",
            "From a request's arrival to the end of its answer.",
            ["route"],
            buckets=_REQUESTS,
            registry=registry,
        )
        self._failures = Counter(
            "sluice_edge_failures",
            "Answers that failed, before their 200 or after it.",
            ["type"],
            registry=registry,
        )
        self._first_tokens = Histogram(
            "sluice_edge_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_WAITS,
            registry=registry,
        )
        self._sent_bytes = Counter(
            "sluice_edge_sent_bytes", "Bytes of answers that ended.", registry=registry
        )
        self.generations = Gauge(
            "sluice_edge_generations", "Generations that run, streamed or not.", registry=registry
        )
        self.heartbeats = Counter(
            "sluice_edge_heartbeats", "Pings in streams that were silent.", registry=registry
        )

        # --- who goes away, and who comes back
        self._cancels = Histogram(
            "sluice_cancel_seconds",
            "From the end of a client's connection to the cancel of its calls.",
            ["phase"],
            buckets=_CANCELS,
            registry=registry,
        )
        for phase in PHASES:
            self._cancels.labels(phase)
        self.slow_readers = Counter(
            "sluice_edge_slow_readers",
            "Streams dropped since their client did not read.",
            registry=registry,
        )
        self.resumes = Counter(
            "sluice_edge_resumes", "Clients that came back.", ["outcome"], registry=registry
        )

        # --- the workers
        self.workers = Gauge("sluice_edge_workers", "Workers that are known.", registry=registry)
        self.workers_ready = Gauge(
            "sluice_edge_workers_ready", "Workers that take work.", registry=registry
        )
        self.retries = Counter(
            "sluice_edge_retries",
            "Calls begun on another worker before the first message.",
            registry=registry,
        )
        self.repeated_refusals = Counter(
            "sluice_edge_refusals_repeated",
            "Refusals that a worker had said to hold for a moment, without asking it again.",
            registry=registry,
        )
        self.failovers = Counter(
            "sluice_edge_failovers",
            "Streams whose worker was lost after their first message.",
            ["outcome"],
            registry=registry,
        )

    def watch_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Count the tasks of this event loop from now on."""
        self._tasks.set_function(lambda: len(asyncio.all_tasks(loop)))

    def answered(
        self, route: str | None, method: str, status: int, seconds: float, sent_bytes: int
    ) -> None:
        """A request was answered; `route` is the template that it matched."""
        route = route or _NO_ROUTE
        method = method if method in _METHODS else "other"
        self._requests.labels(route, method, status).inc()
        self._durations.labels(route).observe(seconds)
        self._sent_bytes.inc(sent_bytes)

    def failed(self, error_type: str) -> None:
        """An answer failed; its type is one of the table of errors."""
        self._failures.labels(error_type).inc()

    def first_token(self, seconds: float) -> None:
        """The first token of an answer came."""
        self._first_tokens.observe(seconds)

    def cancelled(self, phase: str, seconds: float) -> None:
        """A client left, and its calls were cancelled so long after."""
        self._cancels.labels(phase).observe(seconds)

    async def show(self, request: Request) -> Response:  # noqa: ARG002
        """The endpoint."""
        return Response(
            generate_latest(self.registry), headers={"content-type": CONTENT_TYPE_LATEST}
        )
