"""The streams that this edge reads, by the names that they can be aborted by."""

from typing import Final, Protocol

from protos.sluice.v1 import generation_pb2 as pb

# What a worker says of an abort that has found its stream. The first that any of several says is the truth of them.
FOUND: Final = (pb.ABORT_OUTCOME_ABORTED, pb.ABORT_OUTCOME_ALREADY_FINISHED)


class RunningStream(Protocol):
    """One that has begun. Its names and whose it is do not change."""

    @property
    def request_id(self) -> str:
        """Of the request that began it."""

    @property
    def resume_id(self) -> str:
        """What it is kept by; empty where it is not kept."""

    @property
    def key_id(self) -> str:
        """Whose it is; empty where no keys are needed."""

    async def abort(self, request: pb.AbortRequest) -> pb.AbortOutcome.ValueType:
        """Ends it, wherever it is."""


class RunningStreams:
    """Knows what no worker can be asked for a moment: where a stream is that moves from one to another.

    As many as there are readers. Used from the event loop only.
    """

    def __init__(self) -> None:
        self._by_request_id: dict[str, RunningStream] = {}
        self._by_resume_id: dict[str, RunningStream] = {}

    def add(self, stream: RunningStream) -> None:
        """It has begun. Of two of one name, of which the second resumed the first, the second has it."""
        self._by_request_id[stream.request_id] = stream
        if stream.resume_id:
            self._by_resume_id[stream.resume_id] = stream

    def remove(self, stream: RunningStream) -> None:
        """Nobody reads it any more, if anybody did."""
        if self._by_request_id.get(stream.request_id) is stream:
            del self._by_request_id[stream.request_id]
        if self._by_resume_id.get(stream.resume_id) is stream:
            del self._by_resume_id[stream.resume_id]

    def find(self, request: pb.AbortRequest) -> RunningStream | None:
        """The one that is meant, if it runs here and is the caller's."""
        if request.resume_id:
            stream = self._by_resume_id.get(request.resume_id)
        else:
            stream = self._by_request_id.get(request.request_id)
        if stream is None or (request.HasField("key_id") and request.key_id != stream.key_id):
            return None
        return stream
