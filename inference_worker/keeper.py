"""What a kept stream needs of whoever keeps all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from inference_worker.kept_stream import KeptStream


class Keeper(Protocol):
    """Who keeps streams, and is told what becomes of them."""

    def note_begin(self, stream: KeptStream) -> None:
        """It was admitted."""
        ...

    def has_room(self) -> bool:
        """Whether a message more may be kept."""
        ...

    def note_end(self, stream: KeptStream) -> None:
        """All of its messages are there."""
        ...

    def note_forgotten(self, stream: KeptStream) -> None:
        """Nothing of it is to be kept any longer."""
        ...
