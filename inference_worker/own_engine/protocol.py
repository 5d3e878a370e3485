"""What an engine of your own implements, to be served by `python -m inference_worker --engine module:factory`.

Needs neither torch nor grpc. `factory` is called without arguments (a class will do) and gives an `OwnEngine`.

The worker keeps what is the same for every engine: the gRPC contract and its checks, admission and its queue,
deadlines, Abort, the tokenizer and chat template of --model, stop sequences, end-of-sequence tokens, max_tokens, n,
echo, usage, timings, heartbeats, the log and the drain. The engine says in its card which of the rest it honours; a
request that asks for more is refused as UNIMPLEMENTED, with the field's name, and never reaches it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeAlias, get_args

from inference_worker.engine.event import Candidate, Token
from inference_worker.engine.request import SamplingParams

if TYPE_CHECKING:
    from inference_worker.settings import WorkerSettings

__all__ = [
    "FEATURES",
    "Candidate",
    "EngineCard",
    "EngineRequest",
    "Feature",
    "OwnEngine",
    "Piece",
    "SamplingParams",
    "Token",
]

# One more token of a choice: its id, or with log-probabilities; or text, whose tokens --model's tokenizer counts.
Piece: TypeAlias = int | Token | str

# What only the engine itself can honour, named as in the contract's Sampling, Stopping and Output.
Feature = Literal[
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "ignore_eos",
    "logprobs",
]
FEATURES: Final[frozenset[str]] = frozenset(get_args(Feature))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCard:
    """What an engine says of itself once it is initialized."""

    context_length: int  # most tokens of prompt and completion together
    honours: frozenset[Feature] = frozenset()
    # What it does where a request leaves a parameter unset. A parameter that it does not honour may be sent with just
    # this value.
    default_sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: frozenset[int] = frozenset()  # end a choice, unless stopping.ignore_eos
    vocabulary_size: int | None = None  # None: the tokenizer's
    architecture: str = ""  # this and what follows is only told to callers, by GetModel
    dtype: str = ""
    device: str = ""
    parameter_count: int = 0


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One choice of a checked request; a request with n choices is n of these, with one request id."""

    request_id: str  # unique among the running ones
    choice_index: int  # from 0
    prompt_token_ids: tuple[int, ...]  # chat template and special tokens included; at least one
    max_tokens: int  # at least 1; fits the context. The worker takes no more than these.
    sampling: SamplingParams  # every default resolved; each choice has a seed of its own
    ignore_eos: bool
    logprobs: (
        int | None
    )  # if set, every piece is a Token with logprob and this many `top` candidates
    decode: Callable[[tuple[int, ...]], str] = field(repr=False)  # of --model's tokenizer

    @property
    def prompt(self) -> str:
        """The prompt as text, chat template and special tokens included."""
        return self.decode(self.prompt_token_ids)


class OwnEngine(Protocol):
    """An engine. All methods are called on one event loop that no one else uses, on a thread of its own.

    Code that blocks (a forward pass) belongs into `asyncio.to_thread`: while the loop is held the engine's other
    requests stand still, though the worker itself answers on. An exception fails its request alone, with INTERNAL and
    without detail; the traceback is in the worker's log.
    """

    async def initialize(self, settings: WorkerSettings) -> EngineCard:
        """Get ready. Called once, before everything else; an exception ends the start with one line."""
        ...

    def generate(self, request: EngineRequest) -> AsyncIterator[Piece]:
        """Yield the pieces of one choice: usually an async generator (`async def` with `yield`).

        Its end is the end of the text. At most --max-running of them run at once. It is closed early (CancelledError
        at its `await`, or GeneratorExit at its `yield`) when the choice ends otherwise: by a stop sequence, by
        max_tokens, or because the request is given up. What it holds is freed in its `finally`.
        """
        ...

    async def abort(self, request_id: str) -> None:
        """The request was given up: its caller went away, its deadline passed, Abort was called, a drain ended, or
        one of its choices failed.

        Called once, as its generators are closed: for work that goes on elsewhere.
        """
        ...

    async def close(self) -> None:
        """Release everything. Called once; nothing follows."""
        ...
