"""JSON in and out: bounded depth in, no raw line separators out."""

import re
from typing import Any

import orjson

from edge.errors import EdgeError, invalid_request

_BRACKETS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|([\[{])|[\]}]', re.DOTALL)


def encode(value: Any) -> bytes:
    """Compact JSON without raw U+0085, U+2028 and U+2029.

    Line readers that follow Unicode (Python's `str.splitlines` among them) would cut an event at these three. Other
    such characters are control characters, which JSON escapes anyway.
    """
    data = orjson.dumps(value)
    if b"\xe2\x80" in data:
        data = data.replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029")
    if b"\xc2\x85" in data:
        data = data.replace(b"\xc2\x85", b"\\u0085")
    return data


def decode_object(data: bytes, max_depth: int) -> dict[str, Any]:
    """The JSON object in `data`. Raises a 400 for anything else, and for nesting beyond `max_depth`."""
    if _is_deeper(data, max_depth):
        raise invalid_request(f"The request body is nested deeper than {max_depth} levels.")
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise _not_json(error) from None
    if not isinstance(value, dict):
        raise invalid_request("The request body must be a JSON object.")
    return value


def _not_json(error: orjson.JSONDecodeError) -> EdgeError:
    return invalid_request(f"The request body is not valid JSON: {error}.")


def _is_deeper(data: bytes, limit: int) -> bool:
    if data.count(b"[") + data.count(b"{") <= limit:
        return False
    depth = 0
    for match in _BRACKETS.finditer(data):
        if match[1]:
            depth += 1
            if depth > limit:
                return True
        elif match[0][0] != 0x22:
            depth -= 1
    return False
