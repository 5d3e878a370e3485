"""`python -m edge.keys NAME`: makes an API key, and the line that lets it in."""

import argparse
import secrets
import sys
from collections.abc import Sequence

from edge.api_keys import KEY_PREFIX, ApiKey, BadKeys, digest_of, line_of, parse_keys

_SECRET_BYTES = 32


def main(arguments: Sequence[str] | None = None) -> int:
    """0 once the key is printed, 2 for a name or limit that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="edge.keys",
        description="Make an API key: the key for who calls, and the line for --api-keys-file, which holds its hash"
        " alone. The key is shown this once.",
    )
    parser.add_argument("name", help="who the key is for: 1 to 64 characters of [A-Za-z0-9._:-]")
    parser.add_argument("--weight", type=float, help="share of a busy worker, 0.001 to 1000 (1)")
    parser.add_argument("--max-concurrent", type=int, help="most requests at once")
    parser.add_argument("--tokens-per-minute", type=int, help="most tokens in a minute")
    given = parser.parse_args(arguments)
    secret = KEY_PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    line = line_of(
        ApiKey(
            given.name,
            (digest_of(secret),),
            given.weight,
            given.max_concurrent,
            given.tokens_per_minute,
        )
    )
    try:
        parse_keys(line)
    except BadKeys as error:
        print(f"edge.keys: {str(error).removeprefix('line 1: ')}", file=sys.stderr)
        return 2
    print(f"key:  {secret}\nline: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
