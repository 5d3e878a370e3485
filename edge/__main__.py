"""`python -m edge`: settings, serve, exit code."""

import sys

from edge.early_signals import end_on_signal


def main() -> int:
    """0 after an orderly stop, 1 when it cannot listen, 2 for keys that cannot be used.

    Raises SystemExit(2) for a setting that cannot be used.
    """
    # Imported only now, when a signal no longer ends in a traceback.
    import uvloop

    from edge.access_tokens import BadSecret
    from edge.api_keys import BadKeys
    from edge.command_line import read_settings
    from edge.gate import Gate
    from edge.logs import configure_logging
    from edge.server import AddressUnusable, allow_connections, listen, serve

    settings = read_settings(sys.argv[1:])
    configure_logging(settings.log_level)
    try:
        gate = Gate(settings)
    except (BadKeys, BadSecret) as error:
        print(f"edge: API keys: {error}", file=sys.stderr)
        return 2
    try:
        listeners = listen(settings)
    except AddressUnusable as error:
        print(f"edge: {error}", file=sys.stderr)
        return 1
    allow_connections(settings.max_connections)
    uvloop.run(serve(settings, listeners, gate))
    return 0


if __name__ == "__main__":
    end_on_signal()
    sys.exit(main())
