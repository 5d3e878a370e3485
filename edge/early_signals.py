"""What a signal does before the edge can drain."""

import os
import signal


def end_on_signal() -> None:
    """Until the event loop handles signals, one ends the process at once and quietly: there is nothing to finish.

    Without this Ctrl-C during the imports shows a traceback, and SIGTERM does nothing at all in a container, whose
    first process has no default action.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
