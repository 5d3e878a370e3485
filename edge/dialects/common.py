"""What all dialects send alike: ids, tokens and their log-probabilities, names of fields."""

import uuid
from collections.abc import Callable
from typing import Literal, TypeAlias

from google.protobuf import duration_pb2

from protos.sluice.v1 import generation_pb2 as pb

# JSON has no minus infinity, the log-probability of a token that logit_bias forced in; this is what OpenAI and others
# send for it. All dialects do: a null would say that nothing precedes the token.
LOWEST_LOGPROB = -9999.0


def new_id(prefix: str) -> str:
    """An id that the worker takes and nobody guesses."""
    return f"{prefix}-{uuid.uuid4().hex}"


def shown_bytes(token: bytes) -> str:
    """A token's bytes as text; those that make no character are shown as \\xNN."""
    return token.decode("utf-8", "backslashreplace")


def shown_logprob(candidate: pb.Candidate) -> float | None:
    """A log-probability that JSON can hold; None where nothing precedes the token."""
    if not candidate.HasField("logprob"):
        return None
    # In this order NaN, which JSON has neither, becomes the lowest, too.
    return max(LOWEST_LOGPROB, candidate.logprob)


def shown_float(value: float) -> float:
    """A float32 as the number that was meant: 0.7, not 0.699999988079071."""
    return float(f"{value:.7g}")


# Of a resume window that a client may ask for; what the worker grants is its own affair.
MAX_WINDOW_SECONDS = 86_400


def window_message(seconds: float) -> duration_pb2.Duration | None:
    """A resume window in the contract's words; none for 0."""
    if not seconds:
        return None
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


# What becomes of a generation with such a window while nobody reads it.
WhileUnread: TypeAlias = Literal["park", "continue"]
WHILE_UNREAD: dict[WhileUnread, "pb.WhileUnread.ValueType"] = {
    "park": pb.WHILE_UNREAD_PARK,
    "continue": pb.WHILE_UNREAD_CONTINUE,
}


def field_names(table: dict[str, str]) -> Callable[[str], str]:
    """Translates paths of the worker's contract: by the longest prefix in the table, else by the last part."""

    def name(path: str) -> str:
        prefix = path
        while prefix:
            if prefix in table:
                return table[prefix] + path[len(prefix) :]
            prefix = prefix[: max(prefix.rfind("."), prefix.rfind("["), 0)]
        return path.rsplit(".", 1)[-1]

    return name
