"""What is compared without a server: each takes prompts, draws greedily, and notes when every token came."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from inference_worker.engine.engine import Engine, EngineOptions
from inference_worker.engine.event import Delta, Failed
from inference_worker.engine.request import Request, SamplingParams, StoppingParams
from inference_worker.model.loader import load_model
from inference_worker.settings import WorkerSettings

Prompts = Sequence[Sequence[int]]

_KV_CACHE_MIB: Final = 512
_CONTINUOUS_PAGE: Final = 64  # tokens
_CONTINUOUS_PAGES: Final = (
    128  # what 32 sequences of 256 tokens take: its CPU attention looks at every page
)


class NotHere(Exception):
    """Something that this machine cannot run, and why."""


class GenerationFailed(Exception):
    """Tokens are missing."""


@dataclass
class Output:
    """Tokens and the moment each came, by prompt; moments are time.perf_counter()'s seconds."""

    began_at: float
    tokens: list[list[int]]
    times: list[list[float]]

    @classmethod
    def begin(cls, num_prompts: int) -> Output:
        """Nothing yet, from now on."""
        nothing: list[list[int]] = [[] for _ in range(num_prompts)]
        return cls(time.perf_counter(), nothing, [[] for _ in range(num_prompts)])

    def add(self, index: int, token_ids: Sequence[int]) -> None:
        """Tokens that came just now."""
        self.tokens[index] += token_ids
        self.times[index] += [time.perf_counter()] * len(token_ids)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def seconds(self) -> float:
        return max(times[-1] for times in self.times) - self.began_at

    def times_to_first_token(self) -> list[float]:
        """Seconds, one a prompt."""
        return [times[0] - self.began_at for times in self.times]

    def gaps(self) -> list[float]:
        """Seconds between the tokens of one prompt, of all prompts."""
        return [b - a for times in self.times for a, b in pairwise(times)]

    def check(self, num_tokens: int) -> None:
        """Raises: GenerationFailed unless every prompt has so many tokens."""
        found = [len(tokens) for tokens in self.tokens]
        if found != [num_tokens] * len(found):
            raise GenerationFailed(f"{found} tokens came in place of {num_tokens} for each prompt")


class Generator(Protocol):
    """An engine with a model loaded."""

    name: str

    def generate(self, prompts: Prompts, num_tokens: int) -> Output:
        """Greedy tokens, exactly so many for each prompt, past any end of text; all prompts at once.

        Raises: GenerationFailed.
        """
        ...

    def close(self) -> None:
        """Give threads and memory back."""
        ...


class Sluice:
    """The worker's engine and model, with the settings it serves with; no thread and no transport around it."""

    name = "Sluice"

    def __init__(
        self,
        folder: Path,
        dtype: str,
        threads: int,
        *,
        deterministic: bool = False,
        native: bool = True,
        name: str = name,
    ) -> None:
        self.name = name
        settings = WorkerSettings(
            model=str(folder),
            dtype=dtype,
            threads=threads,
            deterministic=deterministic,
            native=native,
            kv_cache_mib=_KV_CACHE_MIB,
            device="cpu",
        )
        served = load_model(settings)
        options = EngineOptions(
            settings.max_running,
            settings.max_batch_tokens,
            served.info.context_length,
            settings.prefix_cache,
        )
        self._engine = Engine(served.runner, served.tokenizer.new_detokenizer, options)

    def generate(self, prompts: Prompts, num_tokens: int) -> Output:
        """See Generator."""
        stopping, sampling = StoppingParams(num_tokens), SamplingParams(temperature=0)
        output = Output.begin(len(prompts))
        requests = [Request("benchmark", tuple(p), stopping, sampling) for p in prompts]
        places = {request.key: place for place, request in enumerate(requests)}
        for request in requests:
            self._engine.add(request)
        while self._engine.has_work:
            self._engine.step()
            for request, event in self._engine.take_events():
                if isinstance(event, Failed):
                    raise GenerationFailed(str(event.error)) from event.error
                if isinstance(event, Delta):
                    output.add(places[request.key], [token.token_id for token in event.tokens])
        output.check(num_tokens)
        return output

    def close(self) -> None:
        """See Generator."""
        self._engine.close()


class ContinuousBatching:
    """transformers' own continuous batching: paged cache, a thread of its own.

    As well tuned as it was found to go on a CPU: no block sharing, small pages, and no more of them than the load
    needs, since its CPU attention runs over a dense mask of all of them.
    """

    name = "transformers, continuous batching"

    def __init__(self, folder: Path, dtype: str) -> None:
        self._model = _load(folder, dtype)
        self._manager = self._model.init_continuous_batching(
            generation_config=_greedy(eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=_CONTINUOUS_PAGE,
                num_blocks=_CONTINUOUS_PAGES,
                max_batch_tokens=WorkerSettings.model_fields["max_batch_tokens"].default,
                allow_block_sharing=False,
            ),
        )
        self._manager.start()

    def generate(self, prompts: Prompts, num_tokens: int) -> Output:
        """See Generator."""
        output = Output.begin(len(prompts))
        inputs = [list(prompt) for prompt in prompts]
        names = self._manager.add_requests(
            inputs, max_new_tokens=num_tokens, record_timestamps=True
        )
        places = {name: place for place, name in enumerate(names)}
        while places:
            result = self._manager.get_result(timeout=1)
            if result is None:
                if not self._manager.is_running():
                    raise GenerationFailed("its thread has ended")
                continue
            if result.error is not None:
                raise GenerationFailed(result.error)
            place = places.pop(result.request_id)
            output.tokens[place] = result.generated_tokens
            output.times[place] = result.timestamps
        output.check(num_tokens)
        return output

    def close(self) -> None:
        """See Generator."""
        self._manager.stop(block=True)


class StaticGenerate:
    """`generate`: one batch from beginning to end, which nobody joins and nobody leaves."""

    name = "transformers, generate"

    def __init__(self, folder: Path, dtype: str) -> None:
        self._model = _load(folder, dtype)

    def generate(self, prompts: Prompts, num_tokens: int) -> Output:
        """See Generator."""
        input_ids = torch.tensor([list(prompt) for prompt in prompts])
        watch = _Watch(Output.begin(len(prompts)))
        with torch.inference_mode():
            ids = self._model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_config=_greedy(max_new_tokens=num_tokens),
                streamer=watch,
            )
        watch.output.check(num_tokens)
        if ids[:, input_ids.shape[1] :].tolist() != watch.output.tokens:
            raise GenerationFailed("the streamer saw other tokens")
        return watch.output

    def close(self) -> None:
        """See Generator."""


@dataclass
class _Watch(BaseStreamer):
    """Notes each step's tokens as `generate` makes them."""

    output: Output
    has_prompt: bool = field(default=False)

    def put(self, value: torch.Tensor) -> None:
        if not self.has_prompt:  # comes first
            self.has_prompt = True
            return
        for place, token_id in enumerate(value.tolist()):
            self.output.add(place, [token_id])

    def end(self) -> None:
        pass


def _load(folder: Path, dtype: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    model.train(False)
    # what it stops at, and how it draws, is the benchmark's to say
    model.generation_config = _greedy()
    model.config.eos_token_id = None
    return model


def _greedy(**fields: int) -> GenerationConfig:
    return GenerationConfig(do_sample=False, pad_token_id=0, **fields)  # type: ignore[no-untyped-call]
