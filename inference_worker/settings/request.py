"""Settings of requests: how many may wait, and how much of each thing one of them may bring."""

from __future__ import annotations

from pydantic import Field

from inference_worker.count_limits import CONTRACT
from inference_worker.settings.setting_group import SettingGroup, unit


class RequestSettings(SettingGroup):
    """What is let in."""

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
    max_template_arguments: int = Field(
        CONTRACT.max_template_arguments,
        ge=0,
        le=CONTRACT.max_template_arguments,
        description="Most variables that one chat may give its template.",
        json_schema_extra=unit("variables"),
    )
    max_template_bytes: int = Field(
        CONTRACT.max_template_bytes,
        ge=0,
        le=CONTRACT.max_template_bytes,
        description="Longest such variables of a chat, all together.",
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
    max_tokenize_bytes: int | None = Field(
        None,
        ge=1,
        description="Most bytes of a prompt that is only to be tokenized. Unset: those of the longest that could be"
        " generated from.",
        json_schema_extra=unit("bytes"),
    )
    max_grammar_texts: int = Field(
        CONTRACT.max_grammar_texts,
        ge=1,
        le=CONTRACT.max_grammar_texts,
        description="Most texts of a constraint that is a choice of texts.",
        json_schema_extra=unit("texts"),
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
