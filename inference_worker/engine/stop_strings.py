"""Finds stop sequences in text that arrives piece by piece, and holds back what could still become one."""

from __future__ import annotations

from collections.abc import Sequence


class StopString:
    """One stop sequence as a Knuth-Morris-Pratt automaton (SIAM J. Comput. 6, 1977): constant work a character."""

    __slots__ = ("_fallback", "text")

    def __init__(self, text: str) -> None:
        """`text` must not be empty."""
        self.text = text
        # _fallback[k]: length of the longest proper prefix of text that is also a suffix of text[:k]
        self._fallback = [0] * (len(text) + 1)
        state = 0
        for i in range(1, len(text)):
            state = self.advance(state, text[i])
            self._fallback[i + 1] = state

    def advance(self, state: int, character: str) -> int:
        """The state after one more character: how long a prefix of the stop sequence the text now ends with."""
        while state and (state == len(self.text) or self.text[state] != character):
            state = self._fallback[state]
        return state + 1 if self.text[state] == character else 0


class StopStrings:
    """The stop sequences of one choice.

    The first one to be complete ends the text; of several that end at the same character, the longest. So the outcome
    does not depend on how the text is cut into pieces.
    """

    def __init__(self, automata: Sequence[StopString]) -> None:
        self._automata = automata
        self._states = [0] * len(automata)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that is certain now. Once `matched` is set, what was returned is all there is."""
        if not self._automata:
            return text
        text = self._held + text
        for i in range(len(self._held), len(text)):
            if (stop := self._advance(text[i])) is not None:
                self.matched, self._held = stop, ""
                return text[: i + 1 - len(stop)]
        certain = len(text) - max(self._states)
        self._held = text[certain:]
        return text[:certain]

    def replay(self, text: str) -> str:
        """The same as `push` for the beginning of a long text, in little time."""
        longest = max((len(automaton.text) for automaton in self._automata), default=0)
        if any(automaton.text in text for automaton in self._automata):
            return self.push(text)
        # no state reaches back further than the longest stop sequence
        cut = max(0, len(text) - longest)
        return text[:cut] + self.push(text[cut:])

    def flush(self) -> str:
        """What was held back, when nothing follows any more."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        matched: str | None = None
        for i, automaton in enumerate(self._automata):
            state = self._states[i] = automaton.advance(self._states[i], character)
            complete = state == len(automaton.text)
            if complete and (matched is None or len(automaton.text) > len(matched)):
                matched = automaton.text
        return matched
