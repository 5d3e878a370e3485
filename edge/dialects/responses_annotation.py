"""What a stored response needs besides its events, kept by the worker beside them: the edge itself keeps nothing."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from edge.json_codec import decode, encode
from protos.sluice.v1 import generation_pb2 as pb

MAX_BYTES: Final = 1024 * 1024  # the contract's limit
_LENGTH: Final = struct.Struct(">I")


@dataclass(frozen=True)
class Annotation:
    """What the response repeats of its request, and the conversation that it answers, without the instructions."""

    echo: dict[str, Any]
    conversation: Sequence[pb.ChatMessage]

    def pack(self) -> bytes:
        """As bytes: the length of the JSON in 4 bytes, the JSON, and a Chat of the contract."""
        echo = encode(self.echo)
        chat = pb.Chat(messages=self.conversation).SerializeToString()
        return _LENGTH.pack(len(echo)) + echo + chat

    @classmethod
    def unpack(cls, data: bytes) -> "Annotation":
        """From what `pack` made."""
        (length,) = _LENGTH.unpack_from(data)
        end = _LENGTH.size + length
        return cls(decode(data[_LENGTH.size : end]), pb.Chat.FromString(data[end:]).messages)
