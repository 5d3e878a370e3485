"""A thing that the default model knows by heart: wordings of a question, and their answer."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Followup:
    """Wordings of a question that only makes sense after another one, and its answer."""

    wordings: str
    answer: str

    @property
    def questions(self) -> tuple[str, ...]:
        """The single wordings."""
        return tuple(self.wordings.split(" | "))


@dataclass(frozen=True, slots=True)
class Topic:
    """Wordings that share one answer, separated by bars, and what may be asked next."""

    wordings: str
    answer: str
    followups: tuple[Followup, ...] = ()
    weight: float = 1.0

    @property
    def questions(self) -> tuple[str, ...]:
        """The single wordings."""
        return tuple(self.wordings.split(" | "))
