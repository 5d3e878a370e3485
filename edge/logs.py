"""One JSON object a line on standard output, for the edge's own lines and its libraries'."""

import contextlib
import logging
import sys

import orjson
import structlog


def configure_logging(level: str) -> None:
    """Call once, at the start."""
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(
                    serializer=lambda line, **options: orjson.dumps(line, **options).decode(),
                    default=str,
                ),
            ],
            foreign_pre_chain=shared,
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(number)
    for name in ("uvicorn", "uvicorn.error", "asyncio", "grpc"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Our own lines do not go through `logging`, which would double what a line costs: under overload that counts.
    structlog.configure(
        processors=[
            *shared,
            structlog.processors.JSONRenderer(serializer=orjson.dumps, default=str),
        ],
        logger_factory=_LineWriter,
        wrapper_class=structlog.make_filtering_bound_logger(number),
        cache_logger_on_first_use=True,
    )


class _LineWriter:
    """Writes lines to standard output. That it is gone fails no request that a line is about."""

    def __init__(self, name: str) -> None:
        self.name = name

    def write(self, line: bytes) -> None:
        with contextlib.suppress(OSError, ValueError):  # a broken pipe, a closed file
            sys.stdout.buffer.write(line + b"\n")
            sys.stdout.buffer.flush()

    debug = info = warning = error = critical = write
