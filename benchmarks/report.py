"""A benchmark's result as Markdown: when, where, what; printed, and kept in a section of a file."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_LIBRARIES: Final = (
    "grpcio",
    "protobuf",
    "starlette",
    "uvicorn",
    "uvloop",
    "httptools",
    "orjson",
    "torch",
    "transformers",
)


@dataclass(frozen=True)
class Report:
    """One section. `load` is the load average before the run: others at work make every figure worse."""

    name: str
    paragraphs: tuple[str, ...]
    load: float

    def __str__(self) -> str:
        today = datetime.datetime.now(datetime.UTC).date()
        facts = (
            f"{today}, {_machine()}. Load average before the run: {self.load:.2f}; "
            f"niceness of the measured processes: {os.getpriority(os.PRIO_PROCESS, 0)}."
        )
        return "\n\n".join([f"## {self.name}", facts, *self.paragraphs])

    def keep(self, path: Path) -> None:
        """Put the section into a file, in place of its former version."""
        marker = f"<!-- {self.name.lower()} -->"
        text = path.read_text() if path.exists() else ""
        section = f"{marker}\n{self}\n{marker}"
        pattern = re.compile(f"{re.escape(marker)}.*?{re.escape(marker)}", re.DOTALL)
        if pattern.search(text):
            text = pattern.sub(lambda _: section, text)
        else:
            text = f"{text.rstrip()}\n\n{section}\n".lstrip()
        path.write_text(text)


def _machine() -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES)
    return (
        f"{_processor()}, {os.cpu_count()} cores, {platform.system()}, "
        f"{platform.python_implementation()} {platform.python_version()}, {versions}"
    )


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.MULTILINE)
        if match:
            return match[1]
    return platform.processor() or platform.machine()
