"""What the gateway of the vLLM world needs, in a folder beside the environment.

Its stubs load on a newer protobuf than the pinned tools of this environment allow, so `make test` installs them, that
protobuf and the gateway into `.venv/gateway`; only child processes see the folder.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

FOLDER = Path(sys.prefix) / "gateway"
_PROTOS = FOLDER / "smg_grpc_proto" / "proto"

needs_gateway = pytest.mark.skipif(
    not (_PROTOS.is_dir() and (FOLDER / "smg").is_dir()),
    reason=f"smg and smg-grpc-proto are not installed in {FOLDER}; `make test` tries to",
)


def gateway_variables() -> dict[str, str]:
    """Environment variables of a process that sees the folder, before all else."""
    inherited = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(FOLDER), *([inherited] if inherited else [])])}


def vllm_contract() -> tuple[Any, Any]:
    """Messages and stubs of vllm.grpc.engine, made from the published files for this process's own protobuf."""
    if str(_PROTOS) not in sys.path:
        sys.path.append(str(_PROTOS))
    messages, services = grpc.protos_and_services("vllm_engine.proto")
    return messages, services
