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

    def has_room(self, stream: KeptStream) -> bool:
        """Whether a message more of it may be kept."""
        ...

    def note_parked(self, stream: KeptStream) -> None:
        """It was parked, or no longer is."""
        ...

    def note_end(self, stream: KeptStream) -> None:
        """All of its messages are there."""
        ...

    def note_forgotten(self, stream: KeptStream) -> None:
        """Nothing of it is to be kept any longer."""
        ...
