"""An engine whose model is noise: real paging, real sampling, real grammars, and a token that means nothing."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from inference_worker.engine.engine import Engine, EngineOptions
from inference_worker.engine.event import Delta, Failed, Finished, Token
from inference_worker.engine.request import OutputParams, Request, SamplingParams, StoppingParams
from inference_worker.engine.runner import RowOutput
from inference_worker.engine.sequence import Sequence
from inference_worker.grammar.compiled import CompiledGrammar
from inference_worker.grammar.compiler import CompilerLimits, GrammarCompiler
from inference_worker.grammar.source import GrammarSource, Kind
from inference_worker.model.sampler import sample
from inference_worker.tokenizer import Tokenizer
from tests.worker.engine.hash_runner import HashRunner

PADDING = 8  # ids that the model knows and the tokenizer does not
# Noise alone would seldom end what it began.
_CLOSING = frozenset(b'"}],: \x00019')


class NoiseRunner(HashRunner):
    """Draws, with the model's own sampler, from logits that are a hash of what is kept of the last position."""

    def __init__(self, tokenizer: Tokenizer, num_blocks: int = 512, block_size: int = 4) -> None:
        super().__init__(num_blocks, block_size)
        size = tokenizer.vocabulary_size
        self.logit_of_end = 6.0
        self._tilt = torch.zeros(size + PADDING)
        for token_id in range(size):
            token = tokenizer.token_bytes(token_id)
            if len(token) == 1 and token[0] in _CLOSING:
                self._tilt[token_id] = 4.0

    def logits(self, last: int) -> torch.Tensor:
        """[1, vocabulary]; those of special tokens and padding are as likely as any."""
        generator = torch.Generator().manual_seed(last)
        return (3 * torch.randn(len(self._tilt), generator=generator) + self._tilt)[None]

    def draw(self, last: int, sequence: Sequence) -> RowOutput:
        logits = self.logits(last)
        logits[0, list(sequence.request.stopping.stop_token_ids)] = self.logit_of_end
        (outcome,) = sample(logits, [sequence])
        if isinstance(outcome, Token):
            return RowOutput(outcome)
        return RowOutput(error=outcome)


@dataclass
class Choice:
    """What a reader gets of one choice."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finished: Finished | None = None
    failed: Failed | None = None

    @property
    def reason(self) -> str:
        assert self.finished is not None, self.failed
        return self.finished.reason.name

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]


class Noise:
    """Compiles and runs requests."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.vocabulary_size = tokenizer.vocabulary_size + PADDING
        self.end_ids = frozenset(end_ids)
        self.compiler = GrammarCompiler(
            tokenizer, self.vocabulary_size, CompilerLimits(1, 16, token_seconds=1)
        )
        self.runner = NoiseRunner(tokenizer)
        self.engine = self.new_engine(self.runner)

    def new_engine(self, runner: NoiseRunner, **options: Any) -> Engine:
        limits = {"max_running": 8, "max_batch_tokens": 64, "context_length": 2000, **options}
        return Engine(runner, self.tokenizer.new_detokenizer, EngineOptions(**limits))

    def compile(self, kind: Kind, source: object) -> CompiledGrammar:
        text = source if isinstance(source, str) and kind != "json_schema" else json.dumps(source)
        return asyncio.run(self.compiler.compile(GrammarSource(kind, text)))

    def request(
        self,
        grammar: CompiledGrammar | None,
        *,
        prompt: tuple[int, ...] = (5, 6, 7, 8, 9, 10, 11, 12, 13),
        max_tokens: int = 400,
        stop_sequences: tuple[str, ...] = (),
        stop_token_ids: frozenset[int] | None = None,
        output: OutputParams | None = None,
        n: int = 1,
        **sampling: Any,
    ) -> Request:
        ends = self.end_ids if stop_token_ids is None else stop_token_ids
        return Request(
            request_id="noise",
            prompt=prompt,
            stopping=StoppingParams(max_tokens, stop_sequences, ends),
            sampling=SamplingParams(**sampling),
            output=output or OutputParams(),
            n=n,
            grammar=grammar,
        )

    def run(self, *requests: Request, engine: Engine | None = None) -> list[list[Choice]]:
        """The choices of each request, run together; a failed one is told in all of its choices."""
        engine = engine or self.engine
        for request in requests:
            engine.add(request)
        choices: dict[int, defaultdict[int, Choice]] = {
            request.key: defaultdict(Choice) for request in requests
        }
        while engine.has_work:
            engine.step()
            for request, event in engine.take_events():
                of_request = choices[request.key]
                match event:
                    case Delta():
                        of_request[event.choice_index].text += event.text
                        of_request[event.choice_index].tokens += event.tokens
                    case Finished():
                        of_request[event.choice_index].finished = event
                    case Failed():
                        for index in range(request.n):
                            of_request[index].failed = event
                    case _:
                        pass
        engine.check()
        return [[choices[r.key][i] for i in range(r.n)] for r in requests]

    def write(self, grammar: CompiledGrammar, **fields: Any) -> Choice:
        """One choice of one request."""
        ((choice,),) = self.run(self.request(grammar, **fields))
        return choice
