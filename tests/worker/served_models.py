"""Real models behind the contract, small enough to be served many times: a random one, and the embedded one."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from inference_worker.default_model import CHECKPOINT
from inference_worker.engine.request import SamplingParams
from inference_worker.model.loader import load_model, make_runner
from inference_worker.served_model import ModelInfo, ServedModel
from inference_worker.settings import WorkerSettings
from inference_worker.tokenizer import Tokenizer
from tests.worker.model.tiny_models import build_from

CONTEXT = 192
# The second worker's steps are cut differently, and its memory is so small that sequences are preempted.
ROOMY: dict[str, Any] = {"max_running": 16, "max_batch_tokens": 256}
TIGHT: dict[str, Any] = {"max_running": 6, "max_batch_tokens": 11, "block_size": 8}


def tiny_llama() -> Any:
    """A random model with the embedded one's tokenizer: it says anything, broken characters too."""
    return build_from(
        LlamaConfig(
            vocab_size=Tokenizer.load(str(CHECKPOINT)).vocabulary_size,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def serve_random(model: Any, **options: Any) -> tuple[ServedModel, WorkerSettings]:
    worker_settings = WorkerSettings(port=0, **options)
    info = ModelInfo(
        name="random",
        context_length=CONTEXT,
        vocabulary_size=model.config.vocab_size,
        architecture="LlamaForCausalLM",
        dtype="float32",
        device="cpu",
        parameter_count=0,
        eos_token_ids=frozenset(),
        default_sampling=SamplingParams(),
        kv_cache="",
    )
    runner = make_runner(model, CONTEXT, worker_settings)
    return ServedModel(info, Tokenizer.load(str(CHECKPOINT)), runner), worker_settings


def serve_embedded(**options: Any) -> tuple[ServedModel, WorkerSettings]:
    worker_settings = WorkerSettings(port=0, context_length=CONTEXT, **options)
    return load_model(worker_settings), worker_settings


MODELS = ["random", "embedded"]
