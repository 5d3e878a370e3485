"""What the engine tells the reader of a request: started, then deltas, then one finished for each choice; or failed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


class FinishReason(Enum):
    """Why a choice ended; the names are those of the wire contract."""

    STOP = auto()
    STOP_SEQUENCE = auto()
    LENGTH = auto()
    CANCELLED = auto()
    DEADLINE = auto()
    SHUTDOWN = auto()
    PREEMPTED = auto()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that could stand at one position."""

    token_id: int
    logprob: (
        float | None
    )  # natural logarithm; None for the first token of a prompt, which nothing precedes


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a prompt or completion, with log-probabilities if they were asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[Candidate, ...] = ()  # likeliest first


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request, all choices together; the prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a request's time went, in seconds. A phase that was never reached is 0."""

    queued: float
    prefill: float
    decode: float
    time_to_first_token: float


@dataclass(frozen=True, slots=True)
class Started:
    """The engine has the request."""

    prompt_tokens: int
    cached_tokens: int  # prompt tokens found in the prefix cache at this moment
    queue_position: int  # requests that are likely to be served before it, of those that wait


@dataclass(frozen=True, slots=True)
class Scheduled:
    """The request left the queue: its first step begins. For admission's books; not sent on the wire."""

    num_uncached: int = 0  # tokens that its first choice lacks in the cache: of its prompt, and what it goes on after


@dataclass(frozen=True, slots=True)
class Delta:
    """More of one choice: text that follows what came before, and the tokens that it makes certain."""

    choice_index: int
    text: str
    tokens: tuple[Token, ...]
    is_prompt: bool = False


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of one choice. Usage and timings come with the last one of a request."""

    choice_index: int
    reason: FinishReason
    stop_sequence: str | None = None
    stop_token_id: int | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    completion_tokens: int = 0  # of this choice, those that ended it included
    withheld: tuple[Token, ...] = ()  # its last tokens, which no delta carries


class Expired(Exception):
    """A request's deadline came before its first token."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The request failed, alone; nothing follows."""

    error: Exception


class Interrupted(Exception):
    """Of Failed: the engine shut down, and the request goes on at another one."""


class EngineStopped(Exception):
    """Of Failed: the engine crashed or hangs, and every request in it failed."""


Event = Started | Scheduled | Delta | Finished | Failed
