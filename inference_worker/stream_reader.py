"""One call that reads a kept stream."""

from __future__ import annotations

import asyncio

from inference_worker.errors import SluiceError, TakenOver


class StreamReader:
    """Who reads, how far it has come, and what it is to hear."""

    def __init__(self, number: int) -> None:
        self.number = number  # of the message that it reads next
        self.news = asyncio.Event()
        self.moved = asyncio.Event()
        self.left = asyncio.Event()
        self._is_replaced = False
        self._refusal: SluiceError | None = None

    def move(self, number: int) -> None:
        """It has read what comes before this."""
        self.number = number
        self.moved.set()

    def leave(self) -> None:
        """It reads no more."""
        self.left.set()
        self.moved.set()

    def replace(self) -> None:
        """Another call has taken the stream over."""
        self._is_replaced = True
        self.news.set()
        self.moved.set()

    def refuse(self, error: SluiceError) -> None:
        """There is nothing to read for now."""
        self._refusal = error
        self.news.set()

    def check(self) -> None:
        """Raises: TakenOver, or what it was refused with."""
        if self._is_replaced:
            raise TakenOver
        if self._refusal is not None:
            raise self._refusal
