"""The README's table of limits: it has every limit of a stranger, with its default, and each has a test."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from edge.settings import EdgeSettings
from inference_worker.settings import WorkerSettings

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, Any] = {"edge": EdgeSettings, "worker": WorkerSettings}
UNITS = {"KiB": 1024, "MiB": 1024**2}

REQUEST_LIMITS = "worker/test_request_limits.py::test_one_too_many_is_refused"
HTTP_LIMITS = "edge/test_limits.py::test_one_too_many_is_refused"
ATTACKS = "worker/test_grpc_attacks.py::test_"
KEPT = "worker/test_resume_window.py::test_"
TESTS: dict[tuple[str, str], str] = {
    ("edge", "max_body_bytes"): HTTP_LIMITS,
    ("edge", "max_bodies_bytes"): "edge/test_limits.py::test_large_bodies_share_a_limit",
    ("edge", "max_json_depth"): HTTP_LIMITS,
    ("edge", "max_json_values"): HTTP_LIMITS,
    ("edge", "max_prompts"): HTTP_LIMITS,
    ("edge", "max_url_bytes"): HTTP_LIMITS,
    ("edge", "max_query_parameters"): HTTP_LIMITS,
    ("edge", "max_header_bytes"): HTTP_LIMITS,
    ("edge", "max_headers"): HTTP_LIMITS,
    (
        "edge",
        "max_socket_fragments",
    ): "edge/test_socket_limits.py::test_a_message_of_too_many_pieces",
    ("edge", "socket_idle_seconds"): "edge/test_socket_limits.py::test_an_idle_socket_is_closed",
    ("edge", "read_timeout_seconds"): "edge/test_limits.py::test_a_request_that_never_ends_is",
    ("edge", "send_timeout_seconds"): "edge/test_disconnect.py::test_a_reader_that_stops_reading",
    ("edge", "request_timeout_seconds"): "edge/test_error_table.py::test_the_deadline_of_the_edge",
    ("edge", "max_connections"): "edge/test_limits.py::test_connections_far_beyond_the_limit",
    ("edge", "max_connections_per_address"): "edge/test_limits.py::test_one_address_does_not",
    ("worker", "max_message_bytes"): "worker/test_server.py::test_message_size_limits_hold_at",
    ("worker", "max_metadata_bytes"): f"{ATTACKS}a_call_with_too_many_headers",
    ("worker", "max_connections"): f"{ATTACKS}connections_beyond_the_limit",
    ("worker", "handshake_seconds"): f"{ATTACKS}connections_beyond_the_limit",
    ("worker", "connection_idle_seconds"): f"{ATTACKS}a_connection_without_calls",
    ("worker", "max_calls"): f"{ATTACKS}calls_beyond_the_limit",
    ("worker", "max_streams"): "worker/test_request_limits.py::test_more_calls_than_a_connection",
    ("worker", "min_client_ping_seconds"): f"{ATTACKS}who_pings_too_often",
    ("worker", "send_timeout_seconds"): "worker/test_generate.py::test_a_reader_that_does_not_read",
    ("worker", "context_length"): REQUEST_LIMITS,
    ("worker", "max_waiting"): "worker/test_overload.py::test_slots_then_queue_then_refusal",
    ("worker", "max_waiting_tokens"): "worker/test_overload.py::test_the_token_budget",
    ("worker", "max_waiting_kv"): "worker/test_overload.py::test_the_budget_of_kv_blocks",
    ("worker", "max_messages"): REQUEST_LIMITS,
    ("worker", "max_choices"): REQUEST_LIMITS,
    ("worker", "max_tools"): REQUEST_LIMITS,
    ("worker", "max_tool_bytes"): REQUEST_LIMITS,
    ("worker", "max_template_arguments"): REQUEST_LIMITS,
    ("worker", "max_template_bytes"): REQUEST_LIMITS,
    ("worker", "max_stop_sequences"): REQUEST_LIMITS,
    ("worker", "max_stop_characters"): REQUEST_LIMITS,
    ("worker", "max_stop_token_ids"): REQUEST_LIMITS,
    ("worker", "max_logit_biases"): REQUEST_LIMITS,
    ("worker", "max_logprobs"): REQUEST_LIMITS,
    ("worker", "max_tokenize_bytes"): "worker/test_request_limits.py::test_a_prompt_to_tokenize",
    ("worker", "max_grammar_bytes"): REQUEST_LIMITS,
    ("worker", "max_grammar_texts"): REQUEST_LIMITS,
    (
        "worker",
        "grammar_seconds",
    ): "worker/test_constraints.py::test_what_takes_too_long_to_compile",
    ("worker", "grammar_token_ms"): "worker/test_constraints.py::test_what_takes_too_long_at_its",
    ("worker", "max_resume_seconds"): f"{KEPT}a_window_is_cut_to_the_workers",
    ("worker", "replay_messages"): "worker/test_resume.py::test_who_asks_for_what_is_gone",
    ("worker", "replay_bytes"): f"{KEPT}streams_and_bytes_are_bounded",
    ("worker", "replay_streams"): f"{KEPT}streams_and_bytes_are_bounded",
    ("worker", "replay_total_bytes"): f"{KEPT}streams_and_bytes_are_bounded",
}
# Of the same kind of name, but of what the process may use itself.
OUR_OWN = {
    ("edge", "max_message_bytes"),  # to and from workers, which are trusted
    ("edge", "connect_timeout_seconds"),
    ("worker", "max_running"),
    ("worker", "max_batch_tokens"),
    ("worker", "step_timeout_seconds"),
    ("worker", "keepalive_timeout_seconds"),
}


def table() -> dict[tuple[str, str], str]:
    """Setting -> default, as the README has them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("### Limits\n")[2].partition("\n#")[0]
    found: dict[tuple[str, str], str] = {}
    for line in section.splitlines():
        if not line.startswith("|") or "`--" not in line:
            continue
        _, settings, defaults, _ = (cell.strip() for cell in line.strip("|").split("|"))
        process = ""
        names = settings.split("; ")
        shown = defaults.split("; ")
        assert len(names) == len(shown), line
        for name, default in zip(names, shown, strict=True):
            match = re.fullmatch(r"(?:(edge|worker) )?`--([a-z-]+)`", name)
            assert match is not None, name
            process = match[1] or process
            found[process, match[2].replace("-", "_")] = default
    return found


def test_the_readme_lists_every_limit_and_no_other() -> None:
    assert table().keys() == TESTS.keys()
    limits = re.compile(r"max_\w+|\w*_timeout_seconds|replay_\w+")
    for process, settings in SETTINGS.items():
        named = {(process, name) for name in settings.model_fields if limits.fullmatch(name)}
        assert named <= TESTS.keys() | OUR_OWN


@pytest.mark.parametrize("limit", TESTS, ids="-".join)
def test_a_limit_has_the_default_that_is_told_and_a_test(limit: tuple[str, str]) -> None:
    process, name = limit
    default = SETTINGS[process].model_fields[name].default
    shown = table()[limit]
    if default is None:
        assert shown == "the model's"
    else:
        match = re.match(r"([\d,.]+) ?(\w*)", shown)
        assert match is not None, shown
        assert float(match[1].replace(",", "")) * UNITS.get(match[2], 1) == default
    file, _, test = TESTS[limit].partition("::")
    code = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert f"def {test}" in code
    assert re.search(rf"\b{name}\b", code), f"{file} does not set {name}"
