"""Names of finish reasons."""

from protos.sluice.v1 import generation_pb2 as pb

_PREFIX = "FINISH_REASON_"


def finish_reason_name(reason: pb.FinishReason.ValueType) -> str:
    """The contract's name of a finish reason, in lower case: `stop_sequence`."""
    return pb.FinishReason.Name(reason).removeprefix(_PREFIX).lower()
