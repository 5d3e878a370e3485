"""What the engine and admission count anyway, read when somebody scrapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from inference_worker.admission import Admission
from inference_worker.engine.load import Load
from inference_worker.served_model import ModelInfo


class LoadMetrics(Collector):
    """The state of one worker."""

    def __init__(
        self,
        info: ModelInfo,
        context_length: int,
        admission: Admission,
        load: Callable[[], Load],
    ) -> None:
        self._info = info
        self._context_length = context_length
        self._admission = admission
        self._load = load

    def collect(self) -> Iterable[Metric]:
        """The state as it is."""
        load = self._load()
        yield from self._model()
        yield from self._sequences(load)
        yield from self._blocks(load)
        for name, text, count in (
            ("sluice_engine_steps", "Engine steps.", load.steps),
            ("sluice_prompt_tokens", "Prompt tokens of requests that ran.", load.prompt_tokens),
            (
                "sluice_cached_tokens",
                "Prompt tokens that came from the prefix cache.",
                load.cached_tokens,
            ),
            ("sluice_completion_tokens", "Tokens drawn.", load.generated_tokens),
            (
                "sluice_preemptions",
                "Sequences that gave their blocks back and were recomputed.",
                load.preemptions,
            ),
        ):
            yield CounterMetricFamily(name, text, value=count)

    def _model(self) -> Iterable[Metric]:
        info = self._info
        labels = {
            "model": info.name,
            "architecture": info.architecture,
            "dtype": info.dtype,
            "device": info.device,
        }
        family = GaugeMetricFamily("sluice_model_info", "The served model.", labels=list(labels))
        family.add_metric(list(labels.values()), 1)
        yield family
        yield _gauge("sluice_model_parameters", "Parameters of the model.", info.parameter_count)
        yield _gauge(
            "sluice_context_tokens",
            "Most tokens of prompt and completion together.",
            self._context_length,
        )

    def _sequences(self, load: Load) -> Iterable[Metric]:
        admission, limits = self._admission, self._admission.limits
        for name, text, value in (
            ("sluice_running_sequences", "Sequences that take part in steps.", load.running),
            ("sluice_waiting_sequences", "Sequences in the engine's queue.", load.waiting),
            ("sluice_requests", "Requests inside.", admission.requests),
            (
                "sluice_waiting_requests",
                "Requests that wait for a slot.",
                admission.waiting_requests,
            ),
            ("sluice_waiting_tokens", "Prompt tokens of those.", admission.waiting_tokens),
            ("sluice_max_running_sequences", "Limit of running sequences.", limits.max_running),
            ("sluice_max_waiting_requests", "Limit of waiting requests.", limits.max_waiting),
            ("sluice_max_waiting_tokens", "Limit of their tokens.", limits.max_waiting_tokens),
            ("sluice_draining", "1 while the worker shuts down.", int(admission.is_draining)),
        ):
            yield _gauge(name, text, value)

    def _blocks(self, load: Load) -> Iterable[Metric]:
        token_bytes = self._info.kv_bytes_per_token
        block_bytes = token_bytes * load.block_size
        used = load.total_blocks - load.free_blocks
        for name, text, value in (
            ("sluice_kv_blocks", "Blocks of the KV cache.", load.total_blocks),
            ("sluice_kv_blocks_used", "Blocks that sequences hold.", used),
            ("sluice_kv_block_tokens", "Tokens in a block.", load.block_size),
            ("sluice_kv_cache_bytes", "Memory of the KV cache.", self._info.kv_cache_bytes),
            ("sluice_kv_used_bytes", "Memory of the blocks in use.", used * block_bytes),
            ("sluice_kv_token_bytes", "Memory of one token in it.", token_bytes),
            (
                "sluice_kv_sequence_max_bytes",
                "Memory of a sequence at full length.",
                token_bytes * self._context_length,
            ),
        ):
            yield _gauge(name, text, value)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)
