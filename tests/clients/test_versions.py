"""The README's table of clients tells the versions that the tests install."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
ROW = re.compile(r"^\| `([^`]+)` \| (Python|npm) \| ([0-9.]+) \| [^|]+ \|$", re.MULTILINE)


def pins(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines()
    return {name: version for name, _, version in (line.partition("==") for line in lines)}


def test_the_readme_tells_the_versions_that_are_tested() -> None:
    section = (
        (ROOT / "README.md").read_text().split("## Clients that are tested")[1].split("\n## ")[0]
    )
    told = {(name, registry): version for name, registry, version in ROW.findall(section)}
    assert len(told) == section.count("\n| `"), "a row that is not read"
    lock = json.loads((HERE / "node" / "package-lock.json").read_text())["packages"]
    python = pins(ROOT / "constraints.txt") | {
        "litellm": pins(HERE / "litellm" / "requirements.txt")["litellm"],
        "lm_eval": pins(HERE / "lm_eval" / "requirements.txt")["lm_eval"],
        "smg": pins(ROOT / "constraints.gateway.txt")["smg"],
    }
    assert told == {
        (name, registry): (
            python[name] if registry == "Python" else lock[f"node_modules/{name}"]["version"]
        )
        for name, registry in told
    }
    asked = set(lock[""]["dependencies"]) - {"react", "react-test-renderer"}
    assert {name for name, registry in told if registry == "npm"} >= asked


def test_the_lock_file_names_no_registry() -> None:
    lock = json.loads((HERE / "node" / "package-lock.json").read_text())
    assert all("resolved" not in package for package in lock["packages"].values())
