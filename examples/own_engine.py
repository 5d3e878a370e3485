"""An engine of your own: any model that transformers loads, without a line of Sluice's engine."""

import asyncio
from collections.abc import AsyncIterator

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from inference_worker.own_engine.protocol import EngineCard, EngineRequest, SamplingParams
from inference_worker.settings import WorkerSettings


class Plain:
    async def initialize(self, settings: WorkerSettings) -> EngineCard:
        self.model = await asyncio.to_thread(AutoModelForCausalLM.from_pretrained, settings.model)
        eos = self.model.generation_config.eos_token_id
        return EngineCard(
            context_length=self.model.config.max_position_embeddings,
            eos_token_ids=frozenset(eos if isinstance(eos, list) else [eos]),
            default_sampling=SamplingParams(temperature=0),
            honours=frozenset({"temperature", "seed"}),
        )

    async def generate(self, request: EngineRequest) -> AsyncIterator[int]:
        random = torch.Generator().manual_seed(request.sampling.seed)
        tokens, cache = list(request.prompt_token_ids), DynamicCache()
        while True:  # until the worker has what it wants: max_tokens, a stop, or nobody who listens
            tokens = [await asyncio.to_thread(self.step, tokens, cache, request, random)]
            yield tokens[0]

    @torch.inference_mode()
    def step(self, tokens, cache, request, random) -> int:  # type: ignore[no-untyped-def]
        logits = self.model(torch.tensor([tokens]), past_key_values=cache).logits[0, -1].float()
        if not (temperature := request.sampling.temperature):
            return int(logits.argmax())
        return int(torch.softmax(logits / temperature, -1).multinomial(1, generator=random))

    async def abort(self, request_id: str) -> None: ...  # all that goes on is in `generate`

    async def close(self) -> None: ...
