"""Flags, environment and --help of the worker."""

from __future__ import annotations

import subprocess
import sys

import pytest

from inference_worker.command_line import read_settings
from inference_worker.settings import EMBEDDED_MODEL_NAME, WorkerSettings


@pytest.fixture(autouse=True)
def _no_settings_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WorkerSettings.model_fields:
        monkeypatch.delenv(f"SLUICE_WORKER_{name.upper()}", raising=False)


def read(*arguments: str) -> WorkerSettings:
    return read_settings(WorkerSettings, "inference_worker", arguments)


def test_help_lists_every_setting_with_default_unit_and_variable(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit_:
        read("--help")
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in WorkerSettings.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        assert extra["unit"], f"{name} has no unit"
        assert f"--{name.replace('_', '-')} " in text
        assert f"env: SLUICE_WORKER_{name.upper()})" in text
    assert "--drain-seconds SECONDS" in text
    assert "(default: 30 seconds; env: SLUICE_WORKER_DRAIN_SECONDS)" in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--max-running", "0"], "--max-running"),
        (["--max-running", "many"], "--max-running"),
        (["--port", "70000"], "--port"),
        (["--heartbeat-seconds", "nan"], "--heartbeat-seconds"),
        (["--drain-seconds", "inf"], "--drain-seconds"),
        (["--kv-cache-fraction", "1.5"], "--kv-cache-fraction"),
        (["--dtype", "int3"], "--dtype"),
        (["--device", "toaster"], "--device"),
        (["--prefix-cache", "perhaps"], "--prefix-cache"),
        (["--max-running", "600"], "--max-batch-tokens"),
        (["--port"], "--port"),
        (["--no-such-setting", "1"], "--no-such-setting"),
        (["--max-run", "1"], "--max-run"),  # no abbreviations: they break when a setting is added
        (["stray"], "stray"),
    ],
)
def test_a_bad_flag_is_one_line_that_names_it(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        read(*arguments)
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert named in output.err


def test_a_bad_variable_is_one_line_that_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLUICE_WORKER_MAX_WAITING", "-1")
    with pytest.raises(SystemExit) as exit_:
        read()
    assert exit_.value.code == 2
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    assert "SLUICE_WORKER_MAX_WAITING" in output


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("SLUICE_WORKER_MAX_RUNING", "did you mean SLUICE_WORKER_MAX_RUNNING?"),
        ("sluice_worker_zzz", "no such setting (--help lists the settings)"),
    ],
)
def test_a_misspelt_variable_is_one_line_that_names_it(
    variable: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(SystemExit) as exit_:
        read()
    assert exit_.value.code == 2
    output = capsys.readouterr().err
    assert output.startswith(f"inference_worker: {variable}: ")
    assert output.count("\n") == 1
    assert words in output


def test_what_kubernetes_says_of_a_service_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_WORKER_PORT", "tcp://10.96.0.8:50051")
    monkeypatch.setenv("SLUICE_WORKER_PORT_50051_TCP_PROTO", "tcp")
    monkeypatch.setenv("SLUICE_WORKER_SERVICE_PORT", "50051")
    assert read().port == 50051
    assert read("--port", "1").port == 1


def test_a_flag_wins_over_its_variable_and_that_over_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLUICE_WORKER_MAX_RUNNING", "5")
    monkeypatch.setenv("SLUICE_WORKER_MAX_WAITING", "6")
    settings = read("--max-running", "7")
    assert (settings.max_running, settings.max_waiting, settings.max_choices) == (7, 6, 16)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (True, False)),
        (["--log-prompts"], (True, True)),
        (["--prefix-cache=off"], (False, False)),
    ],
)
def test_switches_stand_alone_or_say_which_way(
    arguments: list[str], expected: tuple[bool, bool]
) -> None:
    settings = read(*arguments)
    assert (settings.prefix_cache, settings.log_prompts) == expected


def test_aliases_are_separated_by_commas() -> None:
    assert read("--model-aliases", "a, b,").model_aliases == ("a", "b")
    assert read("--model-aliases", "").model_aliases == ()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], EMBEDDED_MODEL_NAME),
        (["--model", "someone/some-model"], "some-model"),
        (["--model", "/models/other/"], "other"),
        (["--model", "someone/some-model", "--model-name", "mine"], "mine"),
    ],
)
def test_the_served_name(arguments: list[str], name: str) -> None:
    assert read(*arguments).served_name == name


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read().port = 1  # type: ignore[misc]


def test_the_program_refuses_before_it_imports_anything_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "inference_worker", "--port", "x"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2
    assert len(lines) == 1
    assert "--port" in lines[0]
    assert "torch" not in done.stderr
    assert "grpc" not in done.stderr
