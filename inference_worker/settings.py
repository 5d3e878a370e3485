"""Settings of the worker: each one a field, a flag and an environment variable, read once at the start."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from inference_worker.certificates import check_pair, check_roots
from inference_worker.count_limits import CONTRACT
from inference_worker.default_model import CHECKPOINT

EMBEDDED_MODEL_NAME = "sluice-tiny"


def unit(name: str) -> dict[str, Any]:
    """Say what a setting counts; --help shows it as the flag's placeholder."""
    return {"unit": name}


class WorkerSettings(BaseSettings):
    """Serve one language model over gRPC."""

    model_config = SettingsConfigDict(
        env_prefix="SLUICE_WORKER_",
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
    )

    # --- the model
    model: str = Field(
        str(CHECKPOINT),
        min_length=1,
        description="Checkpoint to serve: a directory or a Hugging Face hub id. The default is the embedded model.",
        json_schema_extra=unit("path or id"),
    )
    model_name: str | None = Field(
        None,
        min_length=1,
        description=f"Name the model answers to. Unset: {EMBEDDED_MODEL_NAME} for the embedded model, "
        "else the last part of --model.",
        json_schema_extra=unit("name"),
    )
    model_aliases: Annotated[tuple[str, ...], NoDecode] = Field(
        ("default", "dummy", "tgi"),
        description="Other names the model answers to, separated by commas.",
        json_schema_extra=unit("names"),
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Number type of the weights; auto takes the checkpoint's.",
        json_schema_extra=unit("type"),
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="Where the model runs: auto, cpu, cuda or cuda:N; auto takes a GPU if there is one.",
        json_schema_extra=unit("device"),
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="Threads of one matrix product on a CPU. Unset: one for a model below 20 million parameters, "
        "else torch's choice.",
        json_schema_extra=unit("threads"),
    )
    native: bool = Field(
        True,
        description="Run the steps of a model in C instead of in torch, on one CPU thread, or on several if it has "
        "below 100 million parameters. Compiled at the first start, if there is a C compiler. For float32 and bfloat16 "
        "models of the kinds Llama, Mistral, Qwen2 and Qwen3.",
        json_schema_extra=unit("bool"),
    )
    context_length: int | None = Field(
        None,
        ge=2,
        description="Most tokens of prompt and completion together. Unset: what the checkpoint allows.",
        json_schema_extra=unit("tokens"),
    )

    deterministic: bool = Field(
        False,
        description="Compute every token alike to the last bit, whatever else is in the batch, however its prompt is "
        "cut, and whether or not its prefix was cached. Slower. "
        "A model or machine on which it does not hold is refused.",
        json_schema_extra=unit("bool"),
    )

    # --- the engine
    engine: str | None = Field(
        None,
        pattern=r"^\w+(\.\w+)*:\w+$",
        description="An engine of your own in place of the worker's, made by calling what MODULE:FACTORY names. "
        "--model then names the tokenizer and chat template; settings of the worker's engine mean what yours makes "
        "of them. Unset: the worker's.",
        json_schema_extra=unit("module:factory"),
    )
    max_running: int = Field(
        32,
        ge=1,
        description="Most sequences that take part in one step.",
        json_schema_extra=unit("sequences"),
    )
    max_batch_tokens: int = Field(
        512,
        ge=1,
        description="Most tokens of one step, decode rows and prefill chunks together; at least --max-running.",
        json_schema_extra=unit("tokens"),
    )
    block_size: int = Field(
        16,
        ge=1,
        le=1024,
        description="Tokens in one block of the KV cache.",
        json_schema_extra=unit("tokens"),
    )
    step_timeout_seconds: float = Field(
        120,
        gt=0,
        description="A step of the engine that takes longer hangs: every stream is told, the stack of the engine's "
        "thread is logged, and the process ends with 1. An engine of your own hangs when its event loop does not turn "
        "for so long. More for a large model on a slow processor.",
        json_schema_extra=unit("seconds"),
    )
    kv_cache_mib: int | None = Field(
        None,
        ge=1,
        description="Memory of the KV cache. Unset: --kv-cache-fraction decides.",
        json_schema_extra=unit("MiB"),
    )
    kv_cache_fraction: float = Field(
        0.8,
        gt=0,
        le=0.98,
        description="Share of the memory that is free once the model is loaded, for the KV cache; on a GPU, of what is "
        "free beside the largest step, which is run to find out.",
        json_schema_extra=unit("fraction"),
    )
    prefix_cache: bool = Field(
        True,
        description="Keep the KV of ended prompts and share it with later ones that begin alike.",
        json_schema_extra=unit("bool"),
    )

    # --- admission
    max_waiting: int = Field(
        128,
        ge=0,
        description="Most requests that wait for a slot; more are refused.",
        json_schema_extra=unit("requests"),
    )
    max_waiting_tokens: int = Field(
        262_144,
        ge=0,
        description="Most prompt tokens of the waiting requests; more are refused.",
        json_schema_extra=unit("tokens"),
    )
    max_waiting_kv: float = Field(
        4,
        ge=1,
        le=1000,
        description="Most KV blocks that the prompts of the waiting requests need, as a multiple of the whole cache; "
        "more are refused.",
        json_schema_extra=unit("caches"),
    )
    max_choices: int = Field(
        16,
        ge=1,
        description="Most choices (n) of one request.",
        json_schema_extra=unit("choices"),
    )

    max_messages: int = Field(
        CONTRACT.max_messages,
        ge=1,
        le=CONTRACT.max_messages,
        description="Most messages of one chat.",
        json_schema_extra=unit("messages"),
    )
    max_tools: int = Field(
        CONTRACT.max_tools,
        ge=0,
        le=CONTRACT.max_tools,
        description="Most functions that a chat may offer, and most calls in one of its messages.",
        json_schema_extra=unit("tools"),
    )
    max_tool_bytes: int = Field(
        CONTRACT.max_tool_bytes,
        ge=0,
        le=CONTRACT.max_tool_bytes,
        description="Longest description of all of a chat's functions together, their schemas included.",
        json_schema_extra=unit("bytes"),
    )
    max_stop_sequences: int = Field(
        CONTRACT.max_stop_sequences,
        ge=0,
        le=CONTRACT.max_stop_sequences,
        description="Most stop sequences of one request.",
        json_schema_extra=unit("texts"),
    )
    max_stop_characters: int = Field(
        CONTRACT.max_stop_characters,
        ge=1,
        le=CONTRACT.max_stop_characters,
        description="Longest stop sequence.",
        json_schema_extra=unit("characters"),
    )
    max_stop_token_ids: int = Field(
        CONTRACT.max_stop_token_ids,
        ge=0,
        le=CONTRACT.max_stop_token_ids,
        description="Most stop tokens of one request.",
        json_schema_extra=unit("tokens"),
    )
    max_logit_biases: int = Field(
        CONTRACT.max_logit_biases,
        ge=0,
        le=CONTRACT.max_logit_biases,
        description="Most tokens whose logits one request changes.",
        json_schema_extra=unit("tokens"),
    )
    max_logprobs: int = Field(
        CONTRACT.max_logprobs,
        ge=0,
        le=CONTRACT.max_logprobs,
        description="Most candidates of a token whose log-probabilities are sent.",
        json_schema_extra=unit("candidates"),
    )
    max_grammar_bytes: int = Field(
        131_072,
        ge=1,
        description="Longest JSON schema, regex or grammar of a constraint; of a choice, all its texts together.",
        json_schema_extra=unit("bytes"),
    )
    grammar_seconds: float = Field(
        1,
        gt=0,
        description="Most processor time to compile a constraint; one that takes longer is refused.",
        json_schema_extra=unit("seconds"),
    )
    grammar_token_ms: float = Field(
        1,
        gt=0,
        description="Most processor time that a constraint may take for a token of one choice, on average over some "
        "100 tokens; a choice that takes more ends with INVALID_ARGUMENT.",
        json_schema_extra=unit("milliseconds"),
    )
    grammar_cache: int = Field(
        64,
        ge=0,
        description="Compiled constraints that are kept for requests with the same one.",
        json_schema_extra=unit("grammars"),
    )

    # --- streams that may be resumed
    max_resume_seconds: float = Field(
        300,
        ge=0,
        le=86_400,
        description="Longest resume window: how long a stream is kept after its end, and goes on without a reader. 0 "
        "keeps none.",
        json_schema_extra=unit("seconds"),
    )
    replay_messages: int = Field(
        65_536,
        ge=1,
        description="Most messages that are kept of one stream; the oldest go first, and what needs them cannot be "
        "resumed.",
        json_schema_extra=unit("messages"),
    )
    replay_bytes: int = Field(
        4 * 1024 * 1024,
        ge=1024,
        description="Most bytes that are kept of one stream, likewise.",
        json_schema_extra=unit("bytes"),
    )
    replay_streams: int = Field(
        1024,
        ge=1,
        description="Most streams that are kept. Where there are more, those that ended first go first; beside so many "
        "that run, a new one cannot be resumed.",
        json_schema_extra=unit("streams"),
    )
    replay_total_bytes: int = Field(
        256 * 1024 * 1024,
        ge=1024,
        description="Most bytes that are kept of all streams together; those that ended first go first.",
        json_schema_extra=unit("bytes"),
    )

    # --- the server
    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address to listen on. Without --tls-client-ca only trusted callers should reach it.",
        json_schema_extra=unit("address"),
    )
    port: int = Field(
        50051,
        ge=0,
        le=65535,
        description="TCP port to listen on; 0 takes a free one and tells it in the ready line.",
        json_schema_extra=unit("port"),
    )
    unix_socket: str | None = Field(
        None,
        min_length=1,
        description="Path of a Unix socket to listen on, in place of --host and --port.",
        json_schema_extra=unit("path"),
    )
    tls_cert: str | None = Field(
        None,
        min_length=1,
        description="PEM file of the certificate, and those between it and its root, for TLS. Unset: none.",
        json_schema_extra=unit("path"),
    )
    tls_key: str | None = Field(
        None,
        min_length=1,
        validate_default=True,
        description="PEM file of its private key.",
        json_schema_extra=unit("path"),
    )
    tls_client_ca: str | None = Field(
        None,
        min_length=1,
        description="PEM file of roots: callers need a certificate of one of them. Unset: they need none.",
        json_schema_extra=unit("path"),
    )
    max_message_bytes: int = Field(
        16 * 1024 * 1024,
        ge=1024,
        le=2**31 - 1,
        description="Largest message received or sent.",
        json_schema_extra=unit("bytes"),
    )
    max_streams: int = Field(
        4096,
        ge=1,
        le=2**31 - 1,
        description="Most calls at once on one connection; more wait until others have ended.",
        json_schema_extra=unit("calls"),
    )
    max_metadata_bytes: int = Field(
        16 * 1024,
        ge=1024,
        le=2**24,
        description="Most metadata of one call; a call with more is refused.",
        json_schema_extra=unit("bytes"),
    )
    heartbeat_seconds: float = Field(
        15,
        gt=0,
        description="A stream that was silent this long sends a heartbeat.",
        json_schema_extra=unit("seconds"),
    )
    send_timeout_seconds: float = Field(
        60,
        gt=0,
        description="A stream that its caller did not read for this long is ended, and its memory freed.",
        json_schema_extra=unit("seconds"),
    )
    unready_seconds: float = Field(
        0,
        ge=0,
        le=600,
        description="Time between telling health checks that the worker stops and refusing new work, for callers that "
        "only ask now and then to notice.",
        json_schema_extra=unit("seconds"),
    )
    drain_seconds: float = Field(
        30,
        ge=0,
        description="How long running streams may take to finish after SIGTERM or SIGINT.",
        json_schema_extra=unit("seconds"),
    )
    keepalive_seconds: float = Field(
        20,
        gt=0,
        description="A connection that was silent this long is pinged.",
        json_schema_extra=unit("seconds"),
    )
    keepalive_timeout_seconds: float = Field(
        10,
        gt=0,
        description="A connection whose ping got no answer for this long is closed and its requests are cancelled.",
        json_schema_extra=unit("seconds"),
    )
    min_client_ping_seconds: float = Field(
        5,
        gt=0,
        description="Clients that ping more often than this are disconnected.",
        json_schema_extra=unit("seconds"),
    )

    vllm_engine: bool = Field(
        False,
        description="Serve vllm.grpc.engine.VllmEngine too, for a gateway that drives vLLM's workers. Needs the extra "
        "gateway.",
        json_schema_extra=unit("bool"),
    )

    # --- metrics
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="TCP port where Prometheus finds /metrics over HTTP; 0 takes a free one and tells it in the ready "
        "line. Unset: nowhere.",
        json_schema_extra=unit("port"),
    )
    metrics_host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address of --metrics-port.",
        json_schema_extra=unit("address"),
    )

    # --- the log
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info",
        description="Least severe line that is written.",
        json_schema_extra=unit("level"),
    )
    log_prompts: bool = Field(
        False,
        description="Write prompts and completions into the log.",
        json_schema_extra=unit("bool"),
    )

    @field_validator("tls_key")
    @classmethod
    def _is_key(cls, value: str | None, info: ValidationInfo) -> str | None:
        check_pair(info.data.get("tls_cert") or "", value or "", "--tls-cert")
        if value and info.data.get("unix_socket"):
            raise ValueError("is not for a --unix-socket")
        return value

    @field_validator("tls_client_ca")
    @classmethod
    def _are_roots(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value and not info.data.get("tls_key"):
            raise ValueError("needs --tls-cert and --tls-key")
        check_roots(value or "")
        return value

    @field_validator("model_aliases", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(name.strip() for name in value.split(",") if name.strip())
        return value

    @field_validator("vllm_engine")
    @classmethod
    def _check_vllm_engine(cls, value: bool) -> bool:
        if value:
            # Imported only now, and before a model is loaded: the package is an extra, and wants a newer protobuf than
            # the worker does.
            try:
                import smg_grpc_proto.generated.vllm_engine_pb2_grpc  # noqa: F401
            except Exception as error:
                raise ValueError(
                    f"needs the extra gateway: pip install 'sluice[gateway]' ({error})"
                ) from error
        return value

    @model_validator(mode="after")
    def _check_batch(self) -> WorkerSettings:
        if self.max_batch_tokens < self.max_running:
            # A decode row is one token: a smaller budget could never run --max-running sequences in one step.
            raise ValueError(
                f"--max-batch-tokens ({self.max_batch_tokens}) must be at least "
                f"--max-running ({self.max_running})"
            )
        return self

    @property
    def served_name(self) -> str:
        """The model's own name."""
        if self.model_name is not None:
            return self.model_name
        if self.model == str(CHECKPOINT):
            return EMBEDDED_MODEL_NAME
        return self.model.rstrip("/").rsplit("/", 1)[-1] or self.model
