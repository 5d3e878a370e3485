"""What a server did under too much load, and the tables that tell it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from benchmarks.overload_client import Reply
from benchmarks.table import Table, percentile

NEXT_SECONDS: Final = 30.0  # that the next request may take before it is given up


@dataclass
class Outcome:
    """What one server did."""

    name: str
    capacity: float  # tokens a second
    bound: float  # seconds
    tokens_per_second: float = 0.0
    replies: list[Reply] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)  # MB of worker and edge
    idle_before: list[float] = field(default_factory=list)  # seconds to the first token
    next_one: float | None = None  # the same; None: given up
    idle_after: list[float] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)  # seconds of a refused gRPC call
    decisions: list[float] = field(default_factory=list)  # seconds
    longest_queue: int = 0  # requests

    @property
    def accepted(self) -> list[Reply]:
        """Replies that began with a 200."""
        return [reply for reply in self.replies if reply.is_accepted]

    @property
    def refused(self) -> list[Reply]:
        """Replies that were a 429."""
        return [reply for reply in self.replies if reply.is_refused]

    @property
    def failed(self) -> list[Reply]:
        """Accepted ones that failed before their first token."""
        return [reply for reply in self.accepted if reply.has_failed]

    def reasons(self) -> str:
        """Why requests were refused, or failed, in Markdown."""
        codes = Counter(reply.code for reply in (*self.refused, *self.failed))
        return ", ".join(f"`{code}` {number}" for code, number in sorted(codes.items())) or "none"


def overload_tables(outcomes: Sequence[Outcome]) -> list[str]:
    """Markdown of the first part."""
    figures = Table(
        ("Server", "Offered", "Accepted", "Refused", "Other", "Failed", "Unanswered", "Longest queue", "Tokens/s",
         "÷ capacity",
         "First token p50 s", "p99 s", "bound s", "Refusal p50 ms", "p99 ms", "highest ms"), labels=1,
    )  # fmt: skip
    after = Table(
        ("Server", "Worker MB", "Edge MB", "Idle before ms", "Next s", "Idle after ms",
         "Decision p50 ms", "p99 ms", "gRPC refusal p50 ms", "p99 ms"), labels=1,
    )  # fmt: skip
    for outcome in outcomes:
        replies, accepted = outcome.replies, outcome.accepted
        begun = [reply.first_token_seconds for reply in accepted if reply.first_token_at]
        refusals = [reply.seconds * 1e3 for reply in outcome.refused]
        figures.rows.append((
            outcome.name, str(len(replies)), str(len(accepted)), str(len(refusals)),
            str(len(replies) - len(accepted) - len(refusals)), str(len(outcome.failed)),
            str(len(accepted) - len(begun) - len(outcome.failed)), str(outcome.longest_queue),
            f"{outcome.tokens_per_second:.0f}",
            f"{outcome.tokens_per_second / outcome.capacity:.3f}",
            *_figures(begun, 2, 50, 99), f"{outcome.bound:.2f}", *_figures(refusals, 1, 50, 99, 100),
        ))  # fmt: skip
        worker, edge = zip(*outcome.memory, strict=True)
        after.rows.append((
            outcome.name, *(" → ".join(f"{size:.0f}" for size in sizes) for sizes in (worker, edge)),
            f"{statistics.median(outcome.idle_before) * 1e3:.1f}",
            f"over {NEXT_SECONDS:.0f}" if outcome.next_one is None else f"{outcome.next_one:.2f}",
            f"{statistics.median(outcome.idle_after) * 1e3:.1f}",
            *_figures([s * 1e3 for s in outcome.decisions], 2, 50, 99),
            *_figures([s * 1e3 for s in outcome.probes], 1, 50, 99),
        ))  # fmt: skip
    reasons = "; ".join(f"{outcome.name}: {outcome.reasons()}" for outcome in outcomes)
    return [str(figures), f"Reasons of the refusals: {reasons}.", str(after)]


def _figures(values: Sequence[float], digits: int, *shares: float) -> list[str]:
    return [f"{percentile(values, share):.{digits}f}" if values else "–" for share in shares]
