"""`python -m inference_worker`: serves a checkpoint. --help lists the settings."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from inference_worker.command_line import read_settings
from inference_worker.early_signals import end_on_signal
from inference_worker.settings import WorkerSettings

if TYPE_CHECKING:
    from inference_worker.served_model import Served


def main() -> NoReturn:
    settings = read_settings(WorkerSettings, "inference_worker", sys.argv[1:])
    end_on_signal()
    # Imported only now: --help and a bad setting need neither grpc nor a tokenizer.
    with _importing():
        from inference_worker.process import run

    run(settings, _load)


@contextmanager
def _importing() -> Iterator[None]:
    """What is imported stays. To look through all of it for garbage, again and again, takes a seventh of the start."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _load(settings: WorkerSettings) -> Served:
    if settings.engine is not None:
        from inference_worker.own_engine.loader import load_own_engine

        return load_own_engine(settings, settings.engine)
    # torch comes in here and nowhere else
    with _importing():
        from inference_worker.model.loader import load_model

    return load_model(settings)


if __name__ == "__main__":
    main()
