"""The native dialect as frames of bytes, for `Accept: application/octet-stream`.

A frame is struct.pack(">BI", tag, length) and so many bytes of JSON, which is what the event of that name holds: HEADER
once, ITEM any number of times, FOOTER once for each of the header's n choices. A stream is whole when they have all
come. FAILED is the end of one that is not. Header, item and footer are tagged as in Baseten's chains (truss-chains,
streaming.py); a reader that knows no more fails at FAILED, as it should.
"""

import struct
from dataclasses import replace
from functools import partial
from typing import Any, Final, Literal

from edge.dialects.dialect import ParsedRequest, stream_headers
from edge.dialects.native import NativeEncoder
from edge.errors import invalid_request
from edge.json_codec import encode

MEDIA_TYPE: Final = "application/octet-stream"
_TAGS: Final = {"started": 2, "delta": 3, "finished": 4, "failed": 5}
_FRAME: Final = struct.Struct(">BI")


class FrameEncoder(NativeEncoder):
    """Messages to frames."""

    headers = stream_headers(MEDIA_TYPE)
    ping = b""

    def _event(
        self,
        kind: Literal["started", "delta", "finished", "failed"],
        sequence_number: int,  # noqa: ARG002
        data: dict[str, Any],
        is_last: bool,  # noqa: ARG002
    ) -> bytes:
        payload = encode(data)
        return _FRAME.pack(_TAGS[kind], len(payload)) + payload


def framed(parsed: ParsedRequest) -> ParsedRequest:
    """The same answer as frames. Raises a 400 where it is to be resumable: frames have no ids."""
    if any(request.HasField("resume_window") for request in parsed.requests):
        raise invalid_request("Frames cannot be resumed; ask for events.", "resume_window")
    return replace(parsed, encoder=partial(FrameEncoder, parsed.generation_id))


def are_wanted(accept: str) -> bool:
    """Whether an Accept header asks for frames; one that takes events too gets events."""
    wanted = {_media_type(entry) for entry in accept.split(",")}
    return MEDIA_TYPE in wanted and "text/event-stream" not in wanted


def _media_type(entry: str) -> str:
    """The type of an entry, or nothing if its quality is zero (RFC 9110, section 12.4.2)."""
    media_type, *parameters = (part.strip().lower() for part in entry.split(";"))
    is_refused = any(
        name.strip() == "q" and not value.strip("0. ")
        for name, _, value in (parameter.partition("=") for parameter in parameters)
    )
    return "" if is_refused else media_type
