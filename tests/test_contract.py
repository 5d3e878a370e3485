"""The committed stubs are what the contract says, and every field of the contract is documented."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorSet

ROOT = Path(__file__).parent.parent
PROTO = "protos/sluice/v1/generation.proto"
STUBS = [f"generation_pb2{suffix}" for suffix in (".py", ".pyi", "_grpc.py", "_grpc.pyi")]


def protoc(*arguments: str) -> None:
    binaries = Path(sys.executable).parent  # the plugins stand beside the interpreter
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *arguments, PROTO]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def test_regenerated_stubs_equal_the_committed_ones(tmp_path: Path) -> None:
    protoc(
        f"--python_out={tmp_path}",
        f"--grpc_python_out={tmp_path}",
        f"--mypy_out=quiet:{tmp_path}",
        f"--mypy_grpc_out=quiet:{tmp_path}",
    )
    for name in STUBS:
        committed = (ROOT / PROTO).with_name(name).read_text()
        assert (tmp_path / PROTO).with_name(name).read_text() == committed, (
            f"run `make protos`: {name}"
        )


def test_every_part_of_the_contract_is_documented(tmp_path: Path) -> None:
    descriptors = tmp_path / "descriptors"
    protoc(f"--descriptor_set_out={descriptors}", "--include_source_info")
    (file,) = FileDescriptorSet.FromString(descriptors.read_bytes()).file
    documented = {
        tuple(location.path)
        for location in file.source_code_info.location
        if location.leading_comments.strip()
    }
    parts: dict[str, tuple[int, ...]] = {}  # paths as descriptor.proto numbers its fields
    for i, message in enumerate(file.message_type):
        parts[message.name] = (4, i)
        for j, field in enumerate(message.field):
            parts[f"{message.name}.{field.name}"] = (4, i, 2, j)
    for i, enum in enumerate(file.enum_type):
        parts[enum.name] = (5, i)
        for j, value in enumerate(enum.value):
            parts[value.name] = (5, i, 2, j)
    for i, method in enumerate(file.service[0].method):
        parts[method.name] = (6, 0, 2, i)
    assert {name for name, path in parts.items() if path not in documented} == set()
