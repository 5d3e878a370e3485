"""Who may import whom, checked in fresh interpreters and against every import statement."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent

# package -> roots that no module of it may import, wherever the statement stands
FORBIDDEN = {
    "edge": {"torch", "transformers", "tokenizers", "numpy", "inference_worker"},
    "inference_worker": {"starlette", "uvicorn", "edge"},
    "inference_worker/engine": {"grpc", "protos", "torch", "transformers", "starlette", "edge"},
    "protos": {"torch", "transformers", "starlette", "edge", "inference_worker"},
}


def imported_roots(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_statement_imports_what_the_package_must_not_know(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = {
        f"{path.relative_to(ROOT)} imports {root}"
        for path in files
        for root in imported_roots(path)
        if root in FORBIDDEN[package]
    }
    assert found == set()


def loaded_by(*modules: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after importing these."""
    program = (
        f"import importlib, json, sys; [importlib.import_module(m) for m in {modules!r}];"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(json.loads(result.stdout))


def modules_of(package: str) -> list[str]:
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.name != "__main__.py"
    ]


def test_the_whole_edge_loads_without_torch() -> None:
    loaded = loaded_by(*modules_of("edge"), "edge.__main__")
    assert "starlette" in loaded
    assert loaded & {"torch", "transformers", "tokenizers", "numpy", "inference_worker"} == set()


def test_the_engine_loads_without_torch_or_grpc() -> None:
    loaded = loaded_by(*modules_of("inference_worker/engine"))
    assert "inference_worker" in loaded
    assert loaded & {"torch", "transformers", "grpc", "google", "starlette"} == set()


def test_what_an_own_engine_implements_loads_without_torch_or_grpc() -> None:
    loaded = loaded_by("inference_worker.own_engine.protocol")
    assert loaded & {"torch", "transformers", "grpc", "google", "starlette", "pydantic"} == set()


def test_the_contract_loads_neither_side() -> None:
    loaded = loaded_by("protos.sluice.v1.generation_pb2_grpc", "edge", "inference_worker")
    assert "grpc" in loaded
    assert loaded & {"torch", "starlette", "uvicorn", "transformers", "pydantic"} == set()


def requirements(extra: str) -> set[str]:
    """Names that an extra adds; with "" those of the base install."""
    declared = [Requirement(text) for text in importlib.metadata.requires("sluice") or []]
    return {
        requirement.name
        for requirement in declared
        if requirement.marker is None or (extra and requirement.marker.evaluate({"extra": extra}))
    }


def test_the_base_install_and_the_edge_ask_for_no_torch() -> None:
    assert requirements("") == {"grpcio", "protobuf"}
    assert requirements("edge") & {"torch", "transformers", "numpy"} == set()
    assert "starlette" in requirements("edge")
    assert "torch" in requirements("worker")
    assert "starlette" not in requirements("worker")
