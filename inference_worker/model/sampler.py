"""Draws the next token of each row: one vectorised pass over rows with different parameters."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from inference_worker.engine.event import Token
from inference_worker.engine.grammar import GrammarFailed
from inference_worker.engine.request import SamplingParams
from inference_worker.engine.sequence import Sequence
from inference_worker.model.candidates import draw_from_candidates
from inference_worker.model.grammar_masks import restrict
from inference_worker.model.penalties import adjusted
from inference_worker.model.randomness import uniforms
from inference_worker.model.scans import NUMPY, Scans
from inference_worker.model.scores import Scores
from inference_worker.model.transfer import Download, upload
from inference_worker.model.truncation import Truncation, thresholds

# Least and greatest temperature that float32 can divide by; beyond them sampling is greedy or uniform anyway.
_LEAST_TEMPERATURE, _GREATEST_TEMPERATURE = 1e-37, 1e37
# Tokens whose weights are summed together before the one that is drawn is sought inside its group.
_GROUP = 256
_GREEDY = SamplingParams(top_k=1)


class BadLogits(Exception):
    """The model gave a row logits that are not numbers."""


class SamplingFailed(Exception):
    """A row's parameters leave no distribution to draw from."""


class NothingAllowed(GrammarFailed):
    """The tokens that a row's grammar allows are all impossible for the model."""


def sample(
    logits: torch.Tensor, rows: Rows[Sequence], scans: Scans = NUMPY
) -> list[Token | Exception]:
    """Draw a token for each row, or say why it cannot be; see `draw`."""
    return draw(logits, rows, scans).read()


def draw(
    logits: torch.Tensor, rows: Rows[Sequence], scans: Scans = NUMPY, *, one_by_one: bool = False
) -> Drawn:
    """Draw a token for each row.

    `logits` is float32 [rows, vocabulary] and the same afterwards. Bias and penalties come first (`penalties`), then
    what a row's grammar forbids (`grammar_masks`), then temperature, which divides the logits, then `truncation`;
    temperature 0 takes the greatest logit, the first of equal ones. Log-probabilities, where asked for, are those of
    the logits as the model gave them. `scans` go through logits on a CPU.

    A row that fails costs the others nothing. `one_by_one`: nor does a sum's rounding depend on what else is drawn.
    """
    try:
        if one_by_one and len(rows) > 1:
            return _draw_each(logits, rows, scans)
        part = _Part(logits, rows, scans)
        return Drawn(part.tokens, [part])
    except (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError):
        raise  # the device's and the host's; no row's
    except Exception as error:  # whatever one row's parameters raise must not reach the others
        if len(rows) == 1:
            return Drawn(torch.zeros(1, dtype=torch.int64, device=logits.device), [error])
    return _draw_each(logits, rows, scans)


def _draw_each(logits: torch.Tensor, rows: Rows[Sequence], scans: Scans) -> Drawn:
    # copies, for where in memory a row begins may count too
    each = [draw(logits[i : i + 1].clone(), [row], scans) for i, row in enumerate(rows)]
    tokens = torch.cat([drawn.tokens for drawn in each])
    return Drawn(tokens, [part for drawn in each for part in drawn.parts])


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens where they were drawn, and on their way to the host."""

    tokens: torch.Tensor  # [rows]; any token for a row that failed
    parts: list[_Part | Exception]

    def read(self) -> list[Token | Exception]:
        """The token of each row, or why there is none."""
        results: list[Token | Exception] = []
        for part in self.parts:
            results += [part] if isinstance(part, Exception) else part.read()
        return results


class _Part:
    """Rows drawn together."""

    def __init__(self, logits: torch.Tensor, rows: Rows[Sequence], scans: Scans) -> None:
        self._logits = logits
        self._rows = rows
        with adjusted(logits, rows) as changed:
            restricted, self._failures = restrict(changed, rows)
            self.tokens, peaks = _choose(restricted, rows, scans)
        # failed rows are told apart by a negative id: one transfer from the device for tokens and failures
        self._outcome = Download(_or_minus_one(self.tokens, peaks))
        self._asked = [i for i, row in enumerate(rows) if row.request.output.logprobs is not None]
        self._scores = self._score()

    def read(self) -> list[Token | Exception]:
        token_ids: list[int] = self._outcome.tolist()
        results: list[Token | Exception] = [Token(token_id) for token_id in token_ids]
        if self._scores is not None:
            scored = self._scores.read([token_ids[i] for i in self._asked])
            for i, token in zip(self._asked, scored, strict=True):
                results[i] = token
        for i, token_id in enumerate(token_ids):
            if token_id < 0:
                results[i] = _failure(self._logits[i], self._rows[i])
        for i, failure in self._failures.items():
            results[i] = failure
        return results

    def _score(self) -> Scores | None:
        if not self._asked:
            return None
        asked = upload(np.array(self._asked), self._logits.device)
        num_top = [self._rows[i].request.output.logprobs or 0 for i in self._asked]
        return Scores(self._logits[asked], self.tokens[asked], num_top)


def _choose(
    logits: torch.Tensor, rows: Rows[Sequence], scans: Scans
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [rows], and the greatest logits [rows]: those of a row that leaves something to choose are finite."""
    drawn = [i for i, row in enumerate(rows) if row.request.sampling.temperature > 0]
    if len(drawn) == len(rows):
        return _draw(logits, rows, scans)
    tokens, peaks = greatest(logits)
    if drawn:
        where = upload(np.array(drawn), logits.device)
        tokens[where] = _draw(logits, rows, scans)[0][where]
    return tokens, peaks


def _or_minus_one(tokens: torch.Tensor, peaks: torch.Tensor) -> torch.Tensor:
    """Token ids [rows] where the greatest logit is finite, and -1 elsewhere."""
    if tokens.device.type == "cpu":  # where numpy's calls take a fraction of torch's time
        return torch.from_numpy(np.where(np.isfinite(peaks.numpy()), tokens.numpy(), -1))
    return tokens.masked_fill(~peaks.isfinite(), -1)


def greatest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of each row's greatest logit, the first of equal ones, or of a NaN if there is one; and that logit."""
    if logits.device.type == "cpu" and not logits.requires_grad:
        # the same rule, an order of magnitude faster than torch's on a CPU
        values = logits.numpy()
        found = values.argmax(-1)
        return torch.from_numpy(found), torch.from_numpy(values[np.arange(len(found)), found])
    found_there = logits.argmax(-1)
    return found_there, logits.gather(1, found_there[:, None])[:, 0]


def _failure(logits: torch.Tensor, row: Sequence) -> Exception:
    if not bool(logits.max().isfinite()):
        return BadLogits("the model gave logits that are not finite")
    if row.grammar is not None:
        return NothingAllowed("the model finds every token that may come next impossible")
    return SamplingFailed("the sampling parameters make the logits overflow")


def _draw(
    logits: torch.Tensor, rows: Rows[Sequence], scans: Scans
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [rows] drawn at each row's temperature, and the greatest logits [rows]; a row whose greatest is not
    finite gets any token.

    A row at temperature 0 takes part as one of a single candidate, which costs less than leaving its logits out, and
    its token means nothing.
    """
    params = [p if (p := row.request.sampling).temperature > 0 else _GREEDY for row in rows]
    temperatures = _temperatures(params)
    truncation = Truncation(
        top_k=np.array([p.top_k or logits.shape[1] for p in params]),
        top_p=np.array([p.top_p for p in params]),
        min_p=np.array([p.min_p for p in params]),
    )
    u = uniforms(
        [p.seed for p in params],
        [row.choice_index for row in rows],
        [row.num_drawn_tokens for row in rows],
    )
    if logits.device.type != "cpu":
        peaks = logits.amax(1)
        return draw_on_device(logits, peaks, temperatures, truncation, u), peaks
    drawn, greatest_logits = draw_on_cpu(logits.numpy(), temperatures, truncation, u, scans)
    return torch.from_numpy(drawn), torch.from_numpy(greatest_logits)


def draw_on_cpu(
    logits: npt.NDArray[np.float32],
    temperatures: npt.NDArray[np.float32],
    truncation: Truncation,
    u: npt.NDArray[np.float64],
    scans: Scans = NUMPY,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Token ids and greatest logits [rows]. How a row is drawn follows from that row alone, so it draws the same in any
    batch."""
    tokens, is_certain, peaks = draw_from_candidates(logits, temperatures, truncation, u, scans)
    if (left := ~is_certain).any():
        drawn = scans.draw_from_rows(logits, peaks, temperatures, truncation, u, left)
        tokens[left] = drawn[left]
    return tokens, peaks


def draw_on_device(
    logits: torch.Tensor,
    peaks: torch.Tensor,
    temperatures: npt.NDArray[np.float32],
    truncation: Truncation,
    u: npt.NDArray[np.float64],
) -> torch.Tensor:
    """Token ids [rows], all rows together: see `draw_on_cpu`."""
    # with the greatest score at 0 no temperature can overflow: the others go towards minus infinity
    scores = logits - peaks[:, None]
    scores /= upload(temperatures, logits.device)[:, None]
    weights = scores.exp()
    if (least := thresholds(scores, weights, truncation)) is not None:
        weights.masked_fill_(scores < least, 0)
    return invert(weights, upload(u, logits.device))


def _temperatures(params: Rows[SamplingParams]) -> npt.NDArray[np.float32]:
    temperatures = np.array([p.temperature for p in params])
    return temperatures.clip(_LEAST_TEMPERATURE, _GREATEST_TEMPERATURE).astype(np.float32)


def invert(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Inverse of each row's cumulative distribution at `u` [rows], float64 in [0, 1): token ids [rows].

    The cumulative sum of the weights [rows, vocabulary] runs in the order of token ids, so that two tokens of nearly
    equal weight that swap ranks do not change the draw. A token of weight 0 is never drawn.
    """
    vocabulary = weights.shape[1]
    padded = torch.nn.functional.pad(weights, (0, -vocabulary % _GROUP))
    groups = padded.view(len(weights), -1, _GROUP)
    ends = groups.sum(-1, dtype=torch.float64).cumsum(-1)
    target = _below(u * ends[:, -1], ends[:, -1])
    group = _first_above(ends, target)
    before = torch.nn.functional.pad(ends, (1, 0)).gather(1, group[:, None])[:, 0]
    inside = groups[torch.arange(len(weights), device=weights.device), group].double().cumsum(-1)
    # the group's sum was taken in another order: a rounding error must not lead past its last weight
    rest = _below((target - before).clamp_min_(0), inside[:, -1])
    return (group * _GROUP + _first_above(inside, rest)).clamp_max_(vocabulary - 1)


def _below(target: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    return target.minimum(total.nextafter(torch.zeros_like(total)))


def _first_above(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Index [rows] of the first sum above the target; a weight of 0 adds nothing and so never is the first."""
    found = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    return found.clamp_max_(cumulative.shape[1] - 1)  # only NaN goes past the end
