"""The log: JSON lines on stdout, one for each request. Prompts and completions stay out of it unless asked for."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import threading
import time
from collections import defaultdict, deque
from typing import Any, Final

import structlog
from google.protobuf import json_format

from inference_worker.engine.event import (
    Delta,
    Event,
    Finished,
    FinishReason,
    Scheduled,
    Started,
)
from inference_worker.field_rules import REQUEST_ID
from inference_worker.request_metrics import RequestMetrics
from protos.sluice.v1 import generation_pb2 as pb

Logger = structlog.typing.FilteringBoundLogger

# What may be waiting to be written: thousands of ordinary lines. With --log-prompts one line may have megabytes.
_MAX_PENDING_CHARS: Final = 8 * 1024 * 1024


def configure_logging(level: str) -> None:
    """Send every line of this process, the libraries' too, to stdout as one JSON object.

    Of the libraries warnings and errors alone, whatever the level.
    """
    # JSON escapes line breaks and all non-ASCII characters: nobody can forge a line.
    render = structlog.processors.JSONRenderer(sort_keys=False)
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*shared, render],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=lambda *_: _line_writer(),
    )
    _line_writer()  # one for the whole process, made before there are other threads
    handler = _LinesHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(number, logging.WARNING), force=True)
    logging.getLogger("inference_worker").setLevel(number)


class _LineWriter:
    """Writes lines to stdout, on a thread of its own.

    A stdout that nobody reads (a stopped terminal, a log driver that blocks) must not hold the event loop: what does
    not fit the queue is dropped, and counted in a line of its own once there is room. Nor may a stdout that is gone
    fail the request that a line is about.
    """

    def __init__(self) -> None:
        self._pending: deque[str] = deque()  # the first one is being written
        self._pending_chars = 0
        self._dropped = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def write(self, line: str) -> None:
        """Queue a line, or drop it. Never waits for the reader."""
        with self._changed:
            if self._pending and self._pending_chars + len(line) > _MAX_PENDING_CHARS:
                self._dropped += 1
                return
            self._pending.append(line)
            self._pending_chars += len(line)
            self._changed.notify_all()

    debug = info = warning = error = critical = write

    def flush(self, seconds: float) -> bool:
        """Wait until everything is written; False if that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending, seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending)
                line = self._pending[0]
            with contextlib.suppress(OSError, ValueError):  # a broken pipe, a closed file
                sys.stdout.write(f"{line}\n")  # in one piece: others may write to the same place
                sys.stdout.flush()
            with self._changed:
                self._pending_chars -= len(self._pending.popleft())
                self._report_dropped()
                self._changed.notify_all()

    def _report_dropped(self) -> None:
        if self._dropped and self._pending_chars < _MAX_PENDING_CHARS // 2:
            dropped, self._dropped = self._dropped, 0
            get_logger().warning("log lines dropped", lines=dropped)


@functools.cache
def _line_writer() -> _LineWriter:
    return _LineWriter()


class _LinesHandler(logging.Handler):
    """The same for what libraries log."""

    def emit(self, record: logging.LogRecord) -> None:
        _line_writer().write(self.format(record))


def flush_log(seconds: float) -> bool:
    """Wait until every line so far is out, at the end of the process; False if that takes longer."""
    return _line_writer().flush(seconds)


def get_logger() -> Logger:
    """The process's logger."""
    logger: Logger = structlog.get_logger()
    return logger


class RequestRecord:
    """Collects what the line and the metrics of one request say."""

    def __init__(
        self, message: pb.GenerateRequest, metrics: RequestMetrics, *, logs_prompts: bool
    ) -> None:
        self._metrics = metrics
        self._began = time.monotonic()
        # Not checked yet: what is none may be anything, a text of the prompt's too.
        is_id = REQUEST_ID.fullmatch(message.request_id) is not None
        self._fields: dict[str, Any] = {"request_id": message.request_id if is_id else None}
        self._phase = "admission"
        self._finish_reasons: dict[int, str] = {}
        self._last_reason: FinishReason | None = None
        self._completion_tokens = 0
        self._texts: defaultdict[int, list[str]] | None = None
        if logs_prompts:
            self._texts = defaultdict(list)
            self._fields["prompt"] = json_format.MessageToDict(message.prompt)

    @property
    def request_id(self) -> str | None:
        """The request's id as far as it is known."""
        request_id: str | None = self._fields["request_id"]
        return request_id

    def admitted(self, request_id: str, model: str) -> None:
        """The request has a place, and its final id."""
        self._fields |= {"request_id": request_id, "model": model}
        self._phase = "tokenizing"

    def note(self, event: Event) -> None:
        """Remember what the engine says."""
        match event:
            case Started():
                self._phase = "queue"
                self._fields["prompt_tokens"] = event.prompt_tokens
                self._fields["cached_tokens"] = event.cached_tokens
            case Scheduled():
                self._phase = "prefill"
                self._metrics.scheduled()
            case Delta():
                self._note_delta(event)
            case Finished():
                self._note_finished(event)
            case _:
                pass

    def write(self, status: str, reason: str | None = None, **facts: object) -> None:
        """Write the line; `status` is the gRPC status of the call, `reason` that of its error."""
        self._metrics.ended(status, reason, self._last_reason)
        if reason is not None:
            facts["reason"] = reason
        fields = self._fields | {
            "status": status,
            "phase": self._phase,  # how far it came
            "finish_reasons": [reason for _, reason in sorted(self._finish_reasons.items())],
            "completion_tokens": self._completion_tokens,
            "total_seconds": _round(time.monotonic() - self._began),
        }
        if self._texts is not None:
            fields["completions"] = ["".join(parts) for _, parts in sorted(self._texts.items())]
        get_logger().info("request", **fields, **facts)

    def _note_delta(self, delta: Delta) -> None:
        if delta.is_prompt:
            return
        self._phase = "decode"
        self._metrics.delta(delta.choice_index)
        self._completion_tokens += len(delta.tokens)
        if self._texts is not None:
            self._texts[delta.choice_index].append(delta.text)

    def _note_finished(self, finished: Finished) -> None:
        self._finish_reasons[finished.choice_index] = finished.reason.name
        self._last_reason = finished.reason
        if (usage := finished.usage) is not None:
            self._phase = "finished"
            self._completion_tokens = usage.completion_tokens
            self._fields["prompt_tokens"] = usage.prompt_tokens
            self._fields["cached_tokens"] = usage.cached_tokens
        if (timings := finished.timings) is not None:
            self._fields |= {
                "queued_seconds": _round(timings.queued),
                "prefill_seconds": _round(timings.prefill),
                "decode_seconds": _round(timings.decode),
                "ttft_seconds": _round(timings.time_to_first_token),
            }


_DIGITS: Final = 6


def _round(seconds: float) -> float:
    return round(seconds, _DIGITS)
