"""What a scrape says, as numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

_README = Path(__file__).parent.parent / "README.md"


class Scrape:
    """The samples of one answer of /metrics."""

    def __init__(self, text: str) -> None:
        self.families = list(text_string_to_metric_families(text))
        self._values = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: object) -> float:
        """The value of a sample; 0 where nothing was counted yet."""
        key = (name, frozenset((label, str(value)) for label, value in labels.items()))
        return self._values.get(key, 0.0)

    def total(self, name: str) -> float:
        """The sum over all labels."""
        return sum(value for (sample, _), value in self._values.items() if sample == name)

    def labels(self, name: str, label: str) -> set[str]:
        """The values of a label."""
        return {dict(labels)[label] for sample, labels in self._values if sample == name}

    def names(self) -> set[str]:
        """What the README has to list: counters with their suffix, histograms without."""
        return {
            f"{family.name}_total" if family.type == "counter" else family.name
            for family in self.families
            if family.name.startswith("sluice_")
        }


def documented_names(process: str) -> set[str]:
    """The names in README's table of a process, and those that both have."""
    section = _README.read_text().split("\n## Metrics\n")[1].split("\n## ")[0]
    shared, *tables = re.split(r"^\| (?=worker|edge)", section, flags=re.MULTILINE)
    table = next(text for text in tables if text.startswith(f"{process} |"))
    first_cells = "\n".join(_first_cells(table))
    return set(re.findall(r"sluice_\w+", shared + first_cells))


def _first_cells(table: str) -> Iterator[str]:
    for line in table.splitlines():
        if line.startswith("| `"):
            yield line.split(" | ")[0]
