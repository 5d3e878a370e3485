"""What the grammar of one choice may cost while the choice is written."""

from __future__ import annotations

from typing import Final

# Tokens whose share may be spent at once: a grammar's first steps find out what the later ones profit from.
BURST_TOKENS: Final = 100


class Budget:
    """Processor time that flows in with every token and out with what the grammar takes.

    What was not used is kept, up to the share of BURST_TOKENS tokens, which is also what a choice begins with.
    """

    def __init__(self, seconds_per_token: float) -> None:
        self.seconds_per_token = seconds_per_token
        self._most = self._left = BURST_TOKENS * seconds_per_token

    @property
    def is_spent(self) -> bool:
        """Whether more was taken than there was."""
        return self._left < 0

    def earn(self) -> None:
        """One more token."""
        self._left = min(self._most, self._left + self.seconds_per_token)

    def spend(self, seconds: float) -> None:
        """Take out what a step took."""
        self._left -= seconds
