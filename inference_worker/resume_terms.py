"""What a request asks of the keeping of its stream."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from inference_worker.errors import InvalidField
from inference_worker.field_rules import check_count, check_range, read_duration
from protos.sluice.v1 import generation_pb2 as pb

_RESUME_ID: Final = re.compile(r"rs_[0-9a-f]{48}")
_MAX_WINDOW_SECONDS: Final = 86_400  # longer ones are a mistake in the unit
# The contract's, which its callers count on: a name, and what it stands for. How much memory may go for annotations is
# --replay-bytes' and --replay-total-bytes' to say.
_MAX_TAG_CHARS: Final = 256
_MAX_ANNOTATION_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ResumeTerms:
    """What a request asked for besides its stream."""

    window: float  # seconds
    key_id: str  # empty where there are no keys
    tag: str | None
    annotation: bytes
    sends_token_ids: bool = (
        True  # to whoever reads; else only a caller that may continue it gets them
    )
    is_continuable: bool = False  # whether the one that began it may continue it
    parked_bytes: int = 0  # that its request takes, if it is kept to be parked
    # Of a stream that another worker began:
    resume_id: str | None = None  # its name there
    header_number: int | None = None  # of the header here; there it was another message's

    @property
    def num_bytes(self) -> int:
        """What is kept besides the messages."""
        return len(self.annotation) + self.parked_bytes

    def shown(
        self, message: pb.GenerateResponse, *, is_resumed: bool, has_token_ids: bool
    ) -> pb.GenerateResponse:
        """A kept message as a reader gets it; changed in place."""
        if message.HasField("delta"):
            if not has_token_ids:
                message.delta.ClearField("token_ids")
        elif is_resumed and message.HasField("started") and self.annotation:
            message.started.annotation = self.annotation
        return message


def read_terms(message: pb.GenerateRequest) -> ResumeTerms | None:
    """What a request asks to be kept, or None if nothing. Raises: InvalidField."""
    if not message.HasField("resume_window"):
        for name in ("resume_tag", "annotation"):
            if message.HasField(name):
                raise InvalidField(name, "only with resume_window")
        if message.while_unread:
            raise InvalidField("while_unread", "only with resume_window")
        if message.continuation.HasField("resume_id"):
            raise InvalidField("continuation.resume_id", "only with resume_window")
        return None
    seconds = read_duration("resume_window", message.resume_window)
    check_range("resume_window", seconds, 0, _MAX_WINDOW_SECONDS, above_low=True)
    if message.HasField("resume_tag") and not 1 <= len(message.resume_tag) <= _MAX_TAG_CHARS:
        raise InvalidField("resume_tag", f"must be 1 to {_MAX_TAG_CHARS} characters")
    if message.while_unread not in pb.WhileUnread.values():
        raise InvalidField("while_unread", f"there is no {message.while_unread}")
    check_count("annotation", len(message.annotation), _MAX_ANNOTATION_BYTES, "bytes")
    continuation = message.continuation
    resume_id = continuation.resume_id if continuation.HasField("resume_id") else None
    if resume_id is not None and not _RESUME_ID.fullmatch(resume_id):
        raise InvalidField("continuation.resume_id", "must be what `started` told")
    return ResumeTerms(
        window=seconds,
        key_id=message.caller.key_id,
        tag=message.resume_tag if message.HasField("resume_tag") else None,
        annotation=message.annotation,
        sends_token_ids=message.output.token_ids,
        is_continuable=message.is_continuable,
        parked_bytes=message.ByteSize() if message.while_unread == pb.WHILE_UNREAD_PARK else 0,
        resume_id=resume_id,
        header_number=(
            continuation.sequence_number if continuation.HasField("sequence_number") else None
        ),
    )
