"""What a signal does before the edge can drain."""

import os
import signal

from edge.terminal import Terminal


def end_on_signal() -> None:
    """Until the event loop handles signals, one ends the process at once and quietly: there is nothing to finish.

    Without this Ctrl-C during the imports shows a traceback, and SIGTERM does nothing at all in a container, whose
    first process has no default action.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as `nohup` has it
        terminal = Terminal()
        # Somebody who asks for files to be read again is early: they are yet to be read.
        signal.signal(signal.SIGHUP, lambda *_: os._exit(0) if terminal.is_gone else None)
