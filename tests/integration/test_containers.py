"""The images and compose files, as far as their text can tell: building them needs an engine, these checks do not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import yaml  # type: ignore[import-untyped]  # comes with transformers
from pydantic_settings import BaseSettings

from edge.settings import EdgeSettings
from inference_worker.settings import WorkerSettings

ROOT: Final = Path(__file__).resolve().parents[2]
SETTINGS: Final[dict[str, type[BaseSettings]]] = {"worker": WorkerSettings, "edge": EdgeSettings}
MODULES: Final = {"worker": "inference_worker", "edge": "edge"}
STOP_SECONDS: Final = 20  # from the end of the drain to the end of the process, at most

Instruction = tuple[str, str]
services = pytest.mark.parametrize("service", SETTINGS)


def stages(service: str) -> list[list[Instruction]]:
    """A Dockerfile's instructions by stage; the first list is what stands before the first FROM."""
    text = re.sub(
        r"^\s*#.*\n", "", (ROOT / f"Dockerfile.{service}").read_text(), flags=re.MULTILINE
    )
    result: list[list[Instruction]] = [[]]
    for line in text.replace("\\\n", "").splitlines():
        if line.strip():
            name, _, rest = line.partition(" ")
            if name == "FROM":
                result.append([])
            result[-1].append((name, rest.strip()))
    return result


def argument_of(stage: list[Instruction], name: str) -> str:
    """The last such instruction, which is the one that counts."""
    return [rest for found, rest in stage if found == name][-1]


def copied_from_context(stage: list[Instruction]) -> set[str]:
    copies = [rest.split() for name, rest in stage if name == "COPY" and "--from=" not in rest]
    return {source for words in copies for source in words[:-1]}


def compose(file: str) -> dict[str, Any]:
    """A compose file with the default of every ${VARIABLE:-default} put in."""
    text = (ROOT / file).read_text()
    document: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))
    return document


def container_environment(service: str, *files: str) -> dict[str, str | None]:
    """The variables of a container: those of the image, then those of the compose files."""
    environment: dict[str, str | None] = {}
    for word in argument_of(stages(service)[-1], "ENV").split():
        name, _, value = word.partition("=")
        environment[name] = value
    for file in files:
        environment |= compose(file)["services"].get(service, {}).get("environment", {})
    return environment


def container_settings(
    monkeypatch: pytest.MonkeyPatch, service: str, *files: str
) -> dict[str, Any]:
    prefix = f"SLUICE_{service.upper()}_"
    for name, value in container_environment(service, *files).items():
        if name.startswith("SLUICE_"):
            assert name.removeprefix(prefix).lower() in SETTINGS[service].model_fields, name
            monkeypatch.setenv(name, value or "")
    return SETTINGS[service]().model_dump()


def seconds(duration: str) -> float:
    number, unit = duration[:-1], duration[-1]
    return float(number) * {"s": 1, "m": 60}[unit]


@services
@pytest.mark.parametrize(
    "files", [("compose.yaml",), ("compose.yaml", "compose.gpu.yaml")], ids=len
)
def test_settings_of_the_containers_are_valid(
    monkeypatch: pytest.MonkeyPatch, service: str, files: tuple[str, ...]
) -> None:
    settings = container_settings(monkeypatch, service, *files)
    assert settings["host"] == "0.0.0.0"  # or no other container could reach it


@services
def test_secrets_are_where_the_settings_look_for_them(service: str) -> None:
    part = compose("compose.secure.yaml")["services"][service]
    fields = SETTINGS[service].model_fields
    prefix = f"SLUICE_{service.upper()}_"
    assert all(name.removeprefix(prefix).lower() in fields for name in part["environment"])
    files = {value for value in part["environment"].values() if value.startswith("/")}
    assert files == {f"/run/secrets/{name}" for name in part["secrets"]}
    assert set(part["secrets"]) <= compose("compose.secure.yaml")["secrets"].keys()


@services
def test_ports_agree(monkeypatch: pytest.MonkeyPatch, service: str) -> None:
    settings = container_settings(monkeypatch, service, "compose.yaml")
    (published,) = compose("compose.yaml")["services"][service]["ports"]
    assert published.rsplit(":", 1)[1] == str(settings["port"])
    asked = {"worker": "metrics_port", "edge": "port"}[service]  # by the health check
    exposed = argument_of(stages(service)[-1], "EXPOSE").split()
    assert exposed == list(dict.fromkeys((str(settings["port"]), str(settings[asked]))))
    health = argument_of(stages(service)[-1], "HEALTHCHECK")
    assert f"environ.get('SLUICE_{service.upper()}_{asked.upper()}')" in health
    assert f" or {settings[asked]};" in health


def test_edge_finds_the_worker_and_the_host_alone_reaches_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    edge = container_settings(monkeypatch, "edge", "compose.yaml")
    worker = container_settings(monkeypatch, "worker", "compose.yaml")
    assert edge["worker"] == f"worker:{worker['port']}"
    assert compose("compose.yaml")["services"]["worker"]["ports"][0].startswith("127.0.0.1:")
    assert compose("compose.yaml")["services"]["edge"]["depends_on"] == {
        "worker": {"condition": "service_healthy"}
    }


@services
def test_nobody_is_killed_while_draining(monkeypatch: pytest.MonkeyPatch, service: str) -> None:
    settings = container_settings(monkeypatch, service, "compose.yaml")
    needed = settings["drain_seconds"] + settings.get("unready_seconds", 0) + STOP_SECONDS
    grace = compose("compose.yaml")["services"][service]["stop_grace_period"]
    assert seconds(grace) >= needed


@services
def test_containers_may_do_nothing_that_they_need_not(service: str) -> None:
    merged = compose("compose.yaml")["services"][service] | compose("compose.gpu.yaml")[
        "services"
    ].get(service, {})
    merged |= compose("compose.secure.yaml")["services"][service]
    assert merged["read_only"] is True
    assert merged["cap_drop"] == ["ALL"]
    assert merged["security_opt"] == ["no-new-privileges:true"]
    assert not merged.keys() & {"privileged", "cap_add", "user", "pid", "ipc", "network_mode"}


@services
def test_image_runs_as_a_numbered_user_and_hears_signals(service: str) -> None:
    final = stages(service)[-1]
    user, _, group = argument_of(final, "USER").partition(":")
    assert int(user) >= 10_000, "a number, so that Kubernetes can tell that it is not root"
    assert int(group) >= 10_000
    assert final.index(("USER", f"{user}:{group}")) > max(
        place for place, (name, _) in enumerate(final) if name in ("RUN", "COPY")
    ), "root owns the files, so that a process cannot change its own code"
    # no shell in between, which would keep the signal to itself
    assert json.loads(argument_of(final, "CMD")) == ["python", "-m", MODULES[service]]
    assert "CMD [" in argument_of(final, "HEALTHCHECK")


def test_a_cuda_image_can_compile_what_launches_its_kernels() -> None:
    final = stages("worker")[-1]
    (place,) = (i for i, (name, rest) in enumerate(final) if name == "RUN" and "triton" in rest)
    assert {"gcc", "libc6-dev"} <= set(final[place][1].split())
    # it looks whether triton is there
    assert place > final.index(("COPY", "--from=dependencies /opt/venv /opt/venv"))


@services
def test_code_does_not_decide_which_dependencies_are_installed_again(service: str) -> None:
    *others, final = stages(service)
    (place,) = (
        i for i, stage in enumerate(others) if MODULES[service] in copied_from_context(stage)
    )
    before, code = others[:place], others[place]
    assert set().union(*map(copied_from_context, before)) == {"pyproject.toml", "constraints.txt"}
    assert copied_from_context(code) >= {"protos", MODULES[service]}
    assert not copied_from_context(code) & (set(MODULES.values()) - {MODULES[service]})
    copies = [rest for name, rest in final if name == "COPY"]
    source = {"worker": "native", "edge": "code"}[service]  # the worker's is compiled in part
    assert [copy.split()[0] for copy in copies] == ["--from=dependencies", f"--from={source}"]


@services
def test_builder_is_sent_what_it_copies(service: str) -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore
    sent = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    for source in set().union(*map(copied_from_context, stages(service))):
        assert source in sent
        assert (ROOT / source).exists()


@pytest.mark.parametrize(
    "file",
    [
        *("Dockerfile.worker", "Dockerfile.edge"),
        *("compose.yaml", "compose.gpu.yaml", "compose.secure.yaml"),
    ],
)
def test_no_registry_or_index_is_named(file: str) -> None:
    text = (ROOT / file).read_text()
    assert re.findall(r"https?://(?!localhost)\S+", text) == []
    assert not text.startswith("# syntax="), "that would fetch a builder from a registry"
    for base in re.findall(r"^FROM (\S+)", text, re.MULTILINE):
        assert base == "${BASE_IMAGE}"
    for default in re.findall(r"^ARG BASE_IMAGE=(\S+)", text, re.MULTILINE):
        assert "/" not in default


def test_image_brings_its_c_code_compiled() -> None:
    """The final stage has no compiler, so the folder must come from the stage that has one."""
    native = next(
        stage for stage in stages("worker") if ("FROM", "${BASE_IMAGE} AS native") in stage
    )
    assert "gcc" in argument_of(native[: native.index(("COPY", "--from=code /app /app"))], "RUN")
    module = "inference_worker.model.native.prebuilt"
    assert json.loads(argument_of(native, "RUN")) == ["python", "-m", module]
    copies = [rest for name, rest in stages("worker")[-1] if name == "COPY"]
    assert [rest for rest in copies if rest.endswith(" /app")] == ["--from=native /app /app"]


def test_libraries_are_compiled_where_there_is_no_torch() -> None:
    """As in the stage that does so, whose Python has nothing installed."""
    script = "import inference_worker.model.native.prebuilt, sys; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout.split()
    assert not {"torch", "numpy", "transformers", "grpc", "pydantic"} & set(modules)
