"""Writes AWQ checkpoints with autoawq, which is deprecated but does this well with current torch and transformers."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils.hub import cached_file

from inference_worker.model.awq_layout import GROUP_SIZES, SYMMETRIC_ZERO
from inference_worker.model.errors import LoadError, ModelNotFound, UnsupportedModel

# autoawq looks for the best clipping this many outputs at a time, and takes no rest.
_OUTPUTS_AT_A_TIME: Final = 64
_LEAST_TOKENS: Final = 64
# Copied as they are; what else a checkpoint holds is weights or written anew.
_KEPT_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class CannotQuantize(Exception):
    """Why no checkpoint was written, in one line."""


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """How to quantize; see `python -m inference_worker.quantize --help`."""

    group_size: int = 128
    layout: str = "gemm"
    zero_point: bool = True
    calibration_tokens: int = 32768  # at most
    sequence_length: int = 512  # tokens that calibration sees at a time


def quantize(model: str, out: Path, text: str, options: QuantizeOptions) -> None:
    """Write the AWQ form of a checkpoint, a directory or a hub id, calibrated on a text.

    `out` appears when it is complete. autoawq shows its progress on stderr.

    Raises: CannotQuantize, LoadError.
    """
    awq = _import_autoawq()
    config = _read_config(model)
    if config.model_type not in awq.families:
        known = ", ".join(sorted(awq.families))
        raise CannotQuantize(f"autoawq knows no {config.model_type} models; it knows {known}")
    family = awq.families[config.model_type]
    _check_layers(config, family, options)
    blocks = _calibration_blocks(model, text, options)
    with _building(out) as partial, _one_line_failures():
        loaded = _load(model)
        # or else every trial of the search would attend to the tokens of those before it
        use_cache, loaded.config.use_cache = loaded.config.use_cache, False
        writer = family(loaded, config.model_type, False, loaded.config, None, None)
        writer.quantize(
            quant_config={
                "zero_point": options.zero_point,
                "q_group_size": options.group_size,
                "w_bit": 4,
                "version": options.layout,
            },
            calib_data=blocks,
            max_calib_samples=len(blocks),
            max_calib_seq_len=len(blocks[0]),
            quantizer_cls=_corrected(awq.quantizer),
        )
        loaded.to(torch.float16)  # type: ignore[arg-type]  # what was not quantized is float16, too, in AWQ checkpoints
        loaded.config.dtype, loaded.config.use_cache = torch.float16, use_cache
        writer.save_quantized(str(partial))
        _copy_files(model, partial)


def _import_autoawq() -> SimpleNamespace:
    try:
        # recorded, and so not shown, that it is deprecated: it sets its own filter, so none of ours would do
        with warnings.catch_warnings(record=True):
            from awq.models.auto import AWQ_CAUSAL_LM_MODEL_MAP
            from awq.quantize.quantizer import AwqQuantizer
    except Exception as error:  # with a transformers that it does not know it may fail in any way
        raise CannotQuantize(
            f"autoawq cannot be imported ({_first_line(error)}): pip install '.[quantize]', in Sluice's directory"
        ) from error
    return SimpleNamespace(families=AWQ_CAUSAL_LM_MODEL_MAP, quantizer=AwqQuantizer)


def _corrected(quantizer: Any) -> Any:
    """autoawq's quantizer with two faults of its mended."""

    class Corrected(quantizer):  # type: ignore[misc]
        def _compute_best_scale(self, *arguments: Any, **options: Any) -> torch.Tensor:
            """On a CPU its copy of the weights, which each trial is to begin with, is no copy: `v.cpu()` shares memory,
            and every trial spoils it.
            """
            module = arguments[3]
            original = {name: tensor.clone() for name, tensor in module.state_dict().items()}
            module.state_dict = lambda: original
            try:
                scale: torch.Tensor = super()._compute_best_scale(*arguments, **options)
            finally:
                del module.state_dict
            return scale

        def pseudo_quantize_tensor(self, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
            """Of symmetric weights it knows no zeros, which its own packing wants."""
            rounded, scales, zeros = super().pseudo_quantize_tensor(w)
            if zeros is None:
                zeros = torch.full_like(scales, SYMMETRIC_ZERO)
            return rounded, scales, zeros

    return Corrected


def _read_config(model: str) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(model)
    except OSError as error:
        raise ModelNotFound("no such model") from error
    except (ValueError, KeyError) as error:
        raise UnsupportedModel(_first_line(error)) from error
    if getattr(config, "quantization_config", None) is not None:
        raise CannotQuantize("it is quantized already")
    return config


def _check_layers(config: PretrainedConfig, family: Any, options: QuantizeOptions) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    kept = getattr(family, "modules_to_not_convert", None) or []
    for name, module in family.get_model_layers(model)[0].named_modules():
        if not isinstance(module, torch.nn.Linear) or any(part in name for part in kept):
            continue
        if module.in_features % options.group_size:
            others = [str(size) for size in GROUP_SIZES if module.in_features % size == 0]
            hint = f"; {' and '.join(others)} would" if others else ""
            raise CannotQuantize(
                f"groups of {options.group_size} do not divide the {module.in_features} inputs of {name}{hint}"
            )
        if module.out_features % _OUTPUTS_AT_A_TIME:
            raise CannotQuantize(
                f"{name} has {module.out_features} outputs; autoawq wants a multiple of {_OUTPUTS_AT_A_TIME}"
            )


def _calibration_blocks(model: str, text: str, options: QuantizeOptions) -> list[list[int]]:
    """Token ids of the text in blocks of one length; what is left over is left out."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        token_ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    except Exception as error:  # a damaged one raises whatever its parser does
        raise LoadError(f"no usable tokenizer ({_first_line(error)})") from error
    if len(token_ids) < _LEAST_TOKENS:
        raise CannotQuantize(
            f"the calibration text has {len(token_ids)} tokens; at least {_LEAST_TOKENS} are wanted"
        )
    length = min(options.sequence_length, len(token_ids), options.calibration_tokens)
    count = min(len(token_ids), options.calibration_tokens) // length
    return [token_ids[i * length : (i + 1) * length] for i in range(count)]


def _load(model: str) -> PreTrainedModel:
    # a CPU computes half precision slowly, autoawq's CUDA path nothing else
    dtype = torch.float16 if torch.cuda.is_available() else torch.float32
    try:
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise LoadError(_first_line(error)) from error
    loaded.train(False)
    return loaded


@contextmanager
def _building(out: Path) -> Iterator[Path]:
    """A directory beside `out` that takes its name once all is in it, and is gone if that fails."""
    partial = out.with_name(f"{out.name}.partial")
    try:
        partial.mkdir(parents=True)
    except FileExistsError as error:
        raise CannotQuantize(
            f"{partial} exists: what another run is writing, or what one that was killed has left"
        ) from error
    try:
        yield partial
        for path in partial.iterdir():
            path.chmod(0o644)  # safetensors writes files that only their owner can read
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def _one_line_failures() -> Iterator[None]:
    try:
        yield
    except (AssertionError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise CannotQuantize(f"autoawq failed: {_first_line(error)}") from error


def _copy_files(model: str, into: Path, names: Sequence[str] = _KEPT_FILES) -> None:
    # autoawq lets it sample, whatever it said
    (into / "generation_config.json").unlink(missing_ok=True)
    for name in names:
        path = cached_file(
            model,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if path is not None:
            shutil.copyfile(path, into / name)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
