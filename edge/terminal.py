"""Tells a terminal's end from a SIGHUP that somebody sends: the signal is the same."""

import os
import signal


class Terminal:
    """The one that the process was started in, if any. To be made before SIGHUP is handled."""

    def __init__(self) -> None:
        # `nohup` has it ignored: the process is to outlive its terminal.
        is_to_outlive = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self._is_ours = not is_to_outlive and _is_there()

    @property
    def is_gone(self) -> bool:
        """Whether there was one, which has been closed since."""
        return self._is_ours and not _is_there()


def _is_there() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
