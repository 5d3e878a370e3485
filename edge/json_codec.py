"""JSON in and out: bounded depth and number of values in, no raw line separators out."""

import re
from typing import Any

import orjson

from edge.errors import EdgeError, invalid_request

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_TO_ROUND = bytes.maketrans(b"[{]}", b"(())")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))


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


def decode(data: bytes) -> Any:
    """Any JSON value of our own worker's. Raises: ValueError."""
    return orjson.loads(data)


def decode_object(data: bytes, max_depth: int, max_values: int | None = None) -> dict[str, Any]:
    """The JSON object in `data`.

    Raises a 400 for anything else, for nesting beyond `max_depth`, and for more than `max_values` (None: any number)
    objects, arrays and strings, names of fields included. Numbers may be as many as there is room for: prompts are
    made of them, and they cost little.
    """
    if max_values is not None and _has_more(data, max_values):
        raise invalid_request(
            f"The request body has more than {max_values} objects, arrays and strings."
        )
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


def _has_more(data: bytes, limit: int) -> bool:
    quotes = data.count(b'"')
    if data.count(b"[") + data.count(b"{") + (quotes + 1) // 2 <= limit:
        return False
    # At least so many of the quotes begin or end a string.
    if (quotes - data.count(b'\\"')) // 2 > limit:
        return True
    rest, strings = _STRING.subn(b"", data)
    return strings + rest.count(b"[") + rest.count(b"{") > limit


def _is_deeper(data: bytes, limit: int) -> bool:
    if data.count(b"[") + data.count(b"{") <= limit:
        return False
    brackets = _STRING.sub(b"", data).translate(_TO_ROUND, _NO_BRACKETS)
    # Each turn takes the innermost pairs away, one level of every nest: far fewer steps than brackets.
    for _ in range(limit):
        brackets = brackets.replace(b"()", b"")
    # What is left is too deep, unless its pairs do not match: then it is no JSON, as the parser will say.
    return brackets.count(b"(") > limit or b"()" in brackets
