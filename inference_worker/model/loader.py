"""Loads a checkpoint and makes everything that serving it takes."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from inference_worker.engine.request import SamplingParams
from inference_worker.model import kernels, self_check
from inference_worker.model.architecture import check_config, max_context_length, probe_layers
from inference_worker.model.awq import AwqLinear
from inference_worker.model.awq_checkpoint import awq_format, finish, native_awq
from inference_worker.model.cache_room import CacheRoom, CacheSettings
from inference_worker.model.decode_graphs import DecodeGraphs, new_capture
from inference_worker.model.errors import LoadError, ModelNotFound, UnsupportedModel
from inference_worker.model.fast_forward import fast_forwards
from inference_worker.model.forward import Forward, TransformersForward
from inference_worker.model.kv_cache import KVCache
from inference_worker.model.largest_step import Meter, new_meter
from inference_worker.model.runner import ModelRunner
from inference_worker.served_model import ModelInfo, ServedModel
from inference_worker.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
_MIB = 2**20
# Parameters below which a second thread costs more than it gives: the embedded model, of 2.7 million, was seen to make
# 2 to 5 times as many tokens a second with one thread as with two on two cores that other processes use too.
_SMALL_MODEL = 20_000_000
# Taken where neither the checkpoint nor a setting says how long a sequence may be.
_DEFAULT_CONTEXT_LENGTH = 8192


class LoadSettings(CacheSettings, Protocol):
    """What to load and how; a part of the worker's settings."""

    @property
    def model(self) -> str: ...  # a directory or a hub id
    @property
    def served_name(self) -> str: ...
    @property
    def dtype(self) -> str: ...  # auto, float32, bfloat16, float16
    @property
    def device(self) -> str: ...  # auto, cpu, cuda, cuda:N
    @property
    def threads(self) -> int | None: ...
    @property
    def context_length(self) -> int | None: ...  # tokens
    @property
    def log_level(self) -> str: ...  # debug lets transformers write its log and progress bars


def load_model(settings: LoadSettings) -> ServedModel:
    """Load a checkpoint, check that it is served as its own code would, and allocate its KV cache.

    Raises: LoadError, whose message is one line.
    """
    _configure(settings)
    config = _load_config(settings.model)
    check_config(config)
    device = _choose_device(settings.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread: kernels are launched on the current one
    tokenizer = _load_tokenizer(settings.model)
    model = _load_weights(settings, config, device)
    num_parameters = _count_parameters(model)
    if settings.threads is None and num_parameters < _SMALL_MODEL:
        torch.set_num_threads(1)
    if tokenizer.vocabulary_size > (known := _vocabulary_size(model)):
        raise UnsupportedModel(
            f"its tokenizer has {tokenizer.vocabulary_size} tokens, the model knows {known}"
        )
    context_length = min(
        max_context_length(config) or settings.context_length or _DEFAULT_CONTEXT_LENGTH,
        settings.context_length or 2**62,
    )
    runner = make_runner(model, context_length, settings)
    return ServedModel(
        info=ModelInfo(
            name=settings.served_name,
            context_length=context_length,
            vocabulary_size=_vocabulary_size(model),
            architecture=type(model).__name__,
            dtype=str(model.dtype).removeprefix("torch."),
            device=_describe(device),
            parameter_count=num_parameters,
            eos_token_ids=_eos_token_ids(model),
            default_sampling=default_sampling(_generation_config(settings.model)),
            kv_cache=f"{runner.description}; a sequence of {context_length} tokens takes "
            f"{context_length * runner.cache.bytes_per_token / _MIB:.1f} MiB",
            kv_cache_bytes=runner.cache.num_bytes,
            kv_bytes_per_token=runner.cache.bytes_per_token,
            step_bytes=runner.step_bytes,
        ),
        tokenizer=tokenizer,
        runner=runner,
    )


def make_runner(
    model: PreTrainedModel,
    context_length: int,
    settings: LoadSettings,
    meter: Meter | None = None,
) -> ModelRunner:
    """Make a loaded model's runner and check it against the model's own forward pass.

    `meter` finds out what to keep free for steps, and is by default what the device has.

    Raises: UnsupportedModel, LoadError (no memory for the KV cache).
    """
    layers = probe_layers(model)
    room = CacheRoom(
        model,
        layers,
        context_length,
        settings,
        uses_kernels=not settings.deterministic and _can_use_kernels(model.device, model.dtype),
        meter=meter or new_meter(model.device),
    )
    cache = _make_cache(room, model.device)
    samples = self_check.make_samples(
        vocabulary_size=_vocabulary_size(model),
        windows=[layer.window for layer in layers.values() if layer.window is not None],
        context_length=context_length,
        num_blocks=cache.num_blocks,
        block_size=cache.block_size,
    )
    try:
        references = self_check.reference_logits(model, samples)
        runner = _try_faster(model, cache, context_length, samples, references, settings)
        if runner is None:
            runner = ModelRunner(
                TransformersForward(model), cache, is_steady=settings.deterministic
            )
            self_check.check(runner, samples, references)
        if settings.deterministic:
            self_check.check_steady(runner, samples)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{model.config.model_type}: {error}") from error
    except torch.OutOfMemoryError as error:
        raise LoadError(f"the model does not fit on {_describe(model.device)}") from error
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError) as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UnsupportedModel(
            f"{model.config.model_type}: paged attention does not work with it ({line})"
        ) from error
    runner.step_bytes = room.step_bytes
    return runner


def _try_faster(
    model: PreTrainedModel,
    cache: KVCache,
    context_length: int,
    samples: list[self_check.Sample],
    references: list[torch.Tensor],
    settings: LoadSettings,
) -> ModelRunner | None:
    """A runner that does without the model's own code, if there is one for the model and it passes the check."""
    for forward in fast_forwards(model, cache, context_length, native=settings.native):
        try:
            runner = ModelRunner(forward, cache, is_steady=settings.deterministic)
            self_check.check(runner, samples, references)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the general path serves what the fast ones cannot
            _log.warning("%s is not used: %s", type(forward).__name__, _first_line(error))
        else:
            _log.info("steps run in %s", type(forward).__name__)
            graphs = _capture(forward, cache, context_length, settings)
            return (
                runner
                if graphs is None
                else _try_graphs(runner, forward, graphs, samples, references)
            )
    return None


def _try_graphs(
    runner: ModelRunner,
    forward: Forward,
    graphs: DecodeGraphs,
    samples: list[self_check.Sample],
    references: list[torch.Tensor],
) -> ModelRunner:
    """A runner with graphs in place of one without, if it passes the check."""
    captured = ModelRunner(forward, runner.cache, graphs=graphs)
    try:
        self_check.check(captured, samples, references)
    except UnsupportedModel as error:  # one by one, the same kernels have passed it
        _log.warning("decode graphs are not used: %s", error)
        return runner
    return captured


def _capture(
    forward: Forward, cache: KVCache, context_length: int, settings: LoadSettings
) -> DecodeGraphs | None:
    """The decode graphs of a forward pass by kernels, if the device has graphs and memory for them."""
    capture = new_capture(cache.device)
    if capture is None or not cache.uses_kernels:
        return None
    max_length = min(context_length, cache.num_blocks * cache.block_size)
    try:
        return DecodeGraphs(
            forward, cache, max_rows=settings.max_running, max_length=max_length, capture=capture
        )
    except RuntimeError as error:
        _log.warning("decode graphs are not used: %s", _first_line(error))
        return None


def _can_use_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cuda":
        return False
    if (fault := kernels.find_fault(device, dtype)) is not None:
        _log.warning("the CUDA kernels are not used: %s", fault)
    return fault is None


def default_sampling(generation_config: dict[str, Any]) -> SamplingParams:
    """Sampling defaults that a checkpoint's generation_config.json states; what it leaves out stays neutral."""
    given = {k: v for k, v in generation_config.items() if isinstance(v, int | float)}
    neutral = SamplingParams()
    temperature = float(given.get("temperature", neutral.temperature))
    if given.get("do_sample") is False or temperature < 0:
        temperature = 0.0
    top_k = int(given.get("top_k", 0))
    top_p = float(given.get("top_p", neutral.top_p))
    min_p = float(given.get("min_p", neutral.min_p))
    penalty = float(given.get("repetition_penalty", neutral.repetition_penalty))
    return SamplingParams(
        temperature=temperature,
        top_k=top_k if top_k > 0 else None,
        top_p=top_p if 0 < top_p <= 1 else neutral.top_p,
        min_p=min_p if 0 <= min_p <= 1 else neutral.min_p,
        repetition_penalty=penalty if penalty > 0 else neutral.repetition_penalty,
    )


def _configure(settings: LoadSettings) -> None:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.log_level != "debug":
        transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _load_config(model: str) -> PretrainedConfig:
    if _is_path(model) and not Path(model).is_dir():
        raise ModelNotFound("no such directory")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(model)
    except OSError as error:
        raise ModelNotFound(_not_found_reason(model)) from error
    except (ValueError, KeyError) as error:
        raise UnsupportedModel(_first_line(error)) from error
    return config


def _is_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or Path(model).exists()


def _not_found_reason(model: str) -> str:
    if Path(model).is_dir():
        return "the directory has no config.json that can be read"
    return "not a directory, and the Hugging Face hub has no such model or cannot be reached"


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise LoadError(f"device {name}: torch finds no CUDA device here")
        index = torch.cuda.current_device() if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise LoadError(f"device {name}: there are {torch.cuda.device_count()} CUDA devices")
        device = torch.device("cuda", index)
    return device


def _load_weights(
    settings: LoadSettings, config: PretrainedConfig, device: torch.device
) -> PreTrainedModel:
    awq = awq_format(config)
    dtype = settings.dtype
    if awq is not None and dtype == "auto" and device.type == "cpu":
        dtype = "bfloat16"  # the only one that a CPU multiplies 4-bit weights fast in
    if awq is not None and device.type == "cuda":
        _check_kernels(device)
    try:
        with nullcontext() if awq is None else native_awq(awq):
            loaded: tuple[PreTrainedModel, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(  # type: ignore[assignment]
                settings.model,
                dtype=dtype,
                attn_implementation="eager",  # every model has it; the paged one takes its place later
                output_loading_info=True,
            )
        model, report = loaded
        model.to(device)  # type: ignore[arg-type]
        missing = sorted(report["missing_keys"])
        if awq is not None:
            missing = finish(model, awq, missing, model.dtype)
        if missing:
            # transformers would fill them with random numbers
            raise LoadError(f"{len(missing)} weights are missing, {missing[0]} for one")
    except torch.OutOfMemoryError as error:
        raise LoadError(f"the model does not fit on {_describe(device)}") from error
    except OSError as error:
        raise ModelNotFound(_first_line(error)) from error
    except (ValueError, ImportError, RuntimeError, KeyError, AttributeError) as error:
        raise UnsupportedModel(_first_line(error)) from error
    return model


def _check_kernels(device: torch.device) -> None:
    if (fault := kernels.find_fault(device, torch.float16)) is not None:
        raise LoadError(f"AWQ weights on a GPU need the CUDA kernels, which do not run: {fault}")


def _count_parameters(model: PreTrainedModel) -> int:
    """Parameters of the model, packed ones by what they stand for."""
    packed = sum(m.num_weights for m in model.modules() if isinstance(m, AwqLinear))
    return packed + sum(p.numel() for p in model.parameters())


def _load_tokenizer(model: str) -> Tokenizer:
    try:
        return Tokenizer.load(model)
    except Exception as error:  # a damaged tokenizer.json raises whatever its parser does
        raise LoadError(f"no usable tokenizer ({_first_line(error)})") from error


def _make_cache(room: CacheRoom, device: torch.device) -> KVCache:
    try:
        return room.make_cache()
    except (RuntimeError, MemoryError) as error:
        raise LoadError(
            f"no memory for a KV cache of {room.num_bytes // _MIB} MiB on {_describe(device)}"
        ) from error


def _vocabulary_size(model: PreTrainedModel) -> int:
    size: int = model.config.get_text_config(decoder=True).vocab_size
    return size


def _eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    generation = getattr(model, "generation_config", None)
    found = getattr(generation, "eos_token_id", None)
    if found is None:
        found = model.config.get_text_config(decoder=True).eos_token_id
    if found is None:
        return frozenset()
    return frozenset([found] if isinstance(found, int) else found)


def _generation_config(model: str) -> dict[str, Any]:
    """The file as it is: transformers' own class fills in defaults that the checkpoint does not state."""
    path = cached_file(
        model,
        "generation_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).read_text())
    except ValueError as error:
        raise LoadError("generation_config.json is not JSON") from error
    return content if isinstance(content, dict) else {}


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
