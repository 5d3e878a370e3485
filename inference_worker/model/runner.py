"""Runs the engine's steps on a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Rows
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch

from inference_worker.engine.event import Token
from inference_worker.engine.runner import DeviceLost, InFlight, OutOfMemory, Row, RowOutput
from inference_worker.engine.sequence import Sequence
from inference_worker.model.batch import Span, pack
from inference_worker.model.decode_graphs import DecodeGraphs
from inference_worker.model.fixed_passes import steady
from inference_worker.model.forward import Forward
from inference_worker.model.kv_cache import KVCache
from inference_worker.model.native.decoder import NativeDecoder
from inference_worker.model.sampler import BadLogits, Drawn, draw, greatest
from inference_worker.model.scans import NUMPY
from inference_worker.model.scores import Scores
from inference_worker.model.transfer import Download, upload


class ModelRunner:
    """A forward pass, the KV cache it writes to, and sampling: the engine's `Runner`."""

    def __init__(
        self,
        forward: Forward,
        cache: KVCache,
        *,
        graphs: DecodeGraphs | None = None,
        runs_ahead: bool | None = None,
        is_steady: bool = False,
    ) -> None:
        """`graphs` compute what they can in place of `forward`; `runs_ahead` is by default what the cache's attention
        allows. `is_steady`: what a token gets depends on its own sequence alone, to the last bit; it takes no graphs.
        """
        self.is_steady = is_steady
        self._graphs = None if is_steady else graphs
        self._forward: Forward | None = steady(forward) if is_steady else forward
        self._cache: KVCache | None = cache
        self.scans = forward.scans if isinstance(forward, NativeDecoder) else NUMPY
        self.num_blocks = cache.num_blocks
        self.block_size = cache.block_size
        # Where attention reads whole blocks, what a failed row wrote has to be cleared before anyone else reads them;
        # with a step in flight it would be too late.
        self.runs_ahead = cache.uses_kernels if runs_ahead is None else runs_ahead
        self._latest = _Latest()
        self.step_bytes = 0  # memory that was kept free for the largest step, if that was measured

    @property
    def cache(self) -> KVCache:
        """The KV cache. Raises: RuntimeError once closed."""
        if self._cache is None:
            raise RuntimeError("the runner is closed")
        return self._cache

    @property
    def description(self) -> str:
        """One line about what was made at the start, for the log."""
        parts = [str(self.cache)]
        if self.step_bytes:
            parts.append(f"{self.step_bytes / 2**20:.1f} MiB kept free for a step")
        if self._graphs is not None:
            parts.append(str(self._graphs))
        return "; ".join(parts)

    def execute(self, rows: Rows[Row]) -> list[RowOutput]:
        """Run one step and wait for it. Raises: as `launch` does."""
        return self.launch(rows).collect()

    @torch.inference_mode()
    def launch(self, rows: Rows[Row]) -> InFlight:
        """See Runner."""
        with _use(self.cache.device):
            return self._launch(rows)

    @torch.inference_mode()
    def logits(self, spans: Rows[Span], wanted: Rows[int]) -> torch.Tensor:
        """Run the spans and give the logits [wanted, vocabulary] of the packed tokens at indices `wanted`."""
        with _on(self.cache.device):
            return self._compute(spans, wanted)[0]

    def close(self) -> None:
        """See Runner."""
        self._forward = self._cache = self._graphs = None
        self._latest = _Latest()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _launch(self, rows: Rows[Row]) -> _Flight:
        spans = [_span(row) for row in rows]
        # Of every row the last token's logits are looked at, also of a chunk that ends inside a prompt: whatever goes
        # wrong in a row shows there, before its keys and values can be shared or its blocks given to someone else.
        ends = _ends(spans)
        prompts = [_scored_positions(row) for row in rows]
        wanted = [end - 1 for end in ends]
        for end, row, scored in zip(ends, rows, prompts, strict=True):
            wanted.extend(range(end - row.stop + scored.start, end - row.stop + scored.stop))
        logits, slots = self._compute(spans, wanted, rows)
        flight = _Flight(self, rows, slots, logits, prompts)
        if self.runs_ahead:
            self._latest = flight.latest()
        return flight

    def _compute(
        self, spans: Rows[Span], wanted: Rows[int], rows: Rows[Row] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the packed tokens at indices `wanted`, and the slots of all that were packed.

        `rows` are those of the spans, if some of their tokens are known to the device alone.
        """
        batch, graphs = None, self._graphs
        if graphs is not None and list(wanted) == list(range(len(spans))):
            batch = graphs.batch(spans)
        if graphs is not None and batch is not None:
            self._latest.feed(batch.input_ids, rows)
            return graphs.logits(batch, len(spans)), batch.slots
        batch = pack(spans, self.cache)
        self._latest.feed(batch.input_ids, rows)
        assert self._forward is not None  # noqa: S101 - the cache is there, so this is
        return self._forward(batch, upload(np.array(wanted), batch.slots.device)), batch.slots

    def clear(self, slots: torch.Tensor) -> None:
        """Forget what a failed row wrote to slots [tokens]."""
        if not self.runs_ahead:
            self.cache.clear(slots)


@dataclass(frozen=True, slots=True)
class _Latest:
    """What the latest step drew, on the device."""

    tokens: torch.Tensor | None = None  # [drawn]
    index_of: Mapping[Sequence, int] = field(default_factory=dict)

    def feed(self, input_ids: torch.Tensor, rows: Rows[Row]) -> None:
        """Put the tokens that the host does not know yet into the packed ones [tokens] of the next step."""
        unknown = [i for i, row in enumerate(rows) if row.start == len(row.sequence.token_ids)]
        if not unknown:
            return
        assert self.tokens is not None  # noqa: S101 - a pending token was drawn by the latest step
        # decode rows come first, so that their indices are those of their tokens
        moves = np.array([unknown, [self.index_of[rows[i].sequence] for i in unknown]])
        to, source = upload(moves, input_ids.device).unbind()
        input_ids.index_copy_(0, to, self.tokens.index_select(0, source))


class _Flight:
    """A step whose forward pass and draws are under way."""

    def __init__(
        self,
        runner: ModelRunner,
        rows: Rows[Row],
        slots: torch.Tensor,
        logits: torch.Tensor,
        prompts: Rows[range],
    ) -> None:
        """`logits` [rows + scored positions, vocabulary] are those of each row's last token, then of `prompts`."""
        self._runner = runner
        self._rows = rows
        self._slots = slots
        self._whole = [i for i, row in enumerate(rows) if row.is_whole]
        self._partial = [i for i, row in enumerate(rows) if not row.is_whole]
        self._drawn: Drawn | None = None
        self._peaks: Download | None = None
        ends = logits if len(logits) == len(rows) else logits[: len(rows)]
        if self._whole:
            whole = ends if not self._partial else ends[upload(np.array(self._whole), ends.device)]
            sequences = [rows[i].sequence for i in self._whole]
            self._drawn = draw(whole.float(), sequences, runner.scans, one_by_one=runner.is_steady)
        if self._partial:
            self._peaks = Download(greatest(ends.float())[1])
        scores = Scores.one_by_one if runner.is_steady else Scores
        self._scored = _ScoredPrompts(logits, rows, prompts, scores)

    def latest(self) -> _Latest:
        """What the next step may need."""
        if self._drawn is None:
            return _Latest()
        index_of = {self._rows[i].sequence: at for at, i in enumerate(self._whole)}
        return _Latest(self._drawn.tokens, index_of)

    @torch.inference_mode()
    def collect(self) -> list[RowOutput]:
        """See InFlight."""
        with _use(self._slots.device):
            outcomes = self._outcomes()
            prompts = self._scored.read()
            self._clear_bad(outcomes)
        return [
            RowOutput(error=outcome)
            if isinstance(outcome, Exception)
            else RowOutput(token=outcome, prompt_logprobs=prompt)
            for outcome, prompt in zip(outcomes, prompts, strict=True)
        ]

    def _outcomes(self) -> list[Token | Exception | None]:
        """A token of each row that is whole, an error, or None."""
        outcomes: list[Token | Exception | None] = [None] * len(self._rows)
        if self._drawn is not None:
            for i, outcome in zip(self._whole, self._drawn.read(), strict=True):
                outcomes[i] = outcome
        if self._peaks is not None:
            peaks: list[float] = self._peaks.tolist()
            for i in self._partial:
                if not math.isfinite(peaks[i]):
                    outcomes[i] = BadLogits("the model gave logits that are not finite")
        return outcomes

    def _clear_bad(self, outcomes: list[Token | Exception | None]) -> None:
        end = 0
        for row, outcome in zip(self._rows, outcomes, strict=True):
            end += row.num_tokens
            if isinstance(outcome, BadLogits):
                self._runner.clear(self._slots[end - row.num_tokens : end])


class _ScoredPrompts:
    """The prompt tokens that a step scores, on their way to the host."""

    def __init__(
        self,
        logits: torch.Tensor,
        rows: Rows[Row],
        prompts: Rows[range],
        scores: Callable[[torch.Tensor, torch.Tensor, list[int]], Scores],
    ) -> None:
        """`logits` holds those of each row's last token, and then of the scoring positions of all rows."""
        self._prompts = prompts
        self._token_ids: list[int] = []
        num_top: list[int] = []
        for row, scored in zip(rows, prompts, strict=True):
            self._token_ids += row.sequence.token_ids[scored.start + 1 : scored.stop + 1]
            num_top += [row.sequence.request.output.logprobs or 0] * len(scored)
        self._scores: Scores | None = None
        if self._token_ids:
            token_ids = upload(np.array(self._token_ids), logits.device)
            self._scores = scores(logits[len(rows) :], token_ids, num_top)

    def read(self) -> list[tuple[Token, ...]]:
        """Scored prompt tokens of each row."""
        if self._scores is None:
            return [()] * len(self._prompts)
        tokens = iter(self._scores.read(self._token_ids))
        return [tuple(next(tokens) for _ in scored) for scored in self._prompts]


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Make it the current device: kernels are launched there, and each thread has its own."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def _use(device: torch.device) -> Iterator[None]:
    """Work on a device, and raise torch's errors as the engine knows them."""
    try:
        with _on(device):
            yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            # what torch keeps in pieces of the wrong size may do for the retry
            if device.type == "cuda":
                torch.cuda.empty_cache()
            raise OutOfMemory(str(error)) from error
        if isinstance(error, torch.AcceleratorError):
            # such as a CUDA error, after which every call fails
            raise DeviceLost(str(error)) from error
        raise


# Whoever allocates says it in words of his own: CUDA, for what torch's allocator does not give out (pinned memory, a
# kernel that is loaded when it is first used), and Triton; cuBLAS; torch on a CPU.
_OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory could not be allocated, of the device or of the host; nothing else is wrong then."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def _span(row: Row) -> Span:
    sequence = row.sequence
    return Span(sequence.token_ids, row.start, row.stop, sequence.block_table)


def _ends(spans: Rows[Span]) -> list[int]:
    """Index after the last packed token of each span."""
    ends: list[int] = []
    total = 0
    for span in spans:
        total += span.stop - span.start
        ends.append(total)
    return ends


def _scored_positions(row: Row) -> range:
    """Positions of this row whose logits score the prompt token after them."""
    if not row.sequence.request.output.prompt_logprobs:
        return range(row.start, row.start)
    return range(row.start, max(row.start, min(row.stop, row.sequence.num_prompt_tokens - 1)))
