"""`python -m edge`: settings, serve, exit code."""

import sys

from edge.early_signals import end_on_signal


def main() -> int:
    """0 after an orderly stop, 1 when it cannot listen. Raises SystemExit(2) for a setting that cannot be used."""
    # Imported only now, when a signal no longer ends in a traceback.
    import uvloop

    from edge.command_line import read_settings
    from edge.logs import configure_logging
    from edge.server import allow_connections, listen, serve

    settings = read_settings(sys.argv[1:])
    configure_logging(settings.log_level)
    try:
        listener = listen(settings)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        print(f"edge: cannot listen on {settings.host}:{settings.port}: {reason}", file=sys.stderr)
        return 1
    allow_connections(settings.max_connections)
    uvloop.run(serve(settings, listener))
    return 0


if __name__ == "__main__":
    end_on_signal()
    sys.exit(main())
