"""Reads a typed stream, with pydantic alone: python examples/typed_stream.py http://localhost:8000 "Once upon"."""

import json
import struct
import sys
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from typing import BinaryIO

from pydantic import BaseModel


class Started(BaseModel):  # the header
    request_id: str
    model: str
    n: int


class Delta(BaseModel):  # an item
    choice_index: int
    text: str


class Finished(BaseModel):  # the footer of a choice; the last one has the usage
    choice_index: int
    finish_reason: str
    usage: dict[str, int] | None = None


TYPES: dict[int, type[Started | Delta | Finished]] = {2: Started, 3: Delta, 4: Finished}


def read_stream(source: BinaryIO) -> Iterator[Started | Delta | Finished]:
    """Raises, unless the stream is whole: EOFError if it was cut, RuntimeError with the server's words if it failed."""
    try:
        unfinished = 1
        while unfinished:
            tag, size = struct.unpack(">BI", source.read(5))
            if len(payload := source.read(size)) < size:
                raise EOFError("the stream was cut")
            if tag not in TYPES:
                raise RuntimeError(json.loads(payload)["error"]["message"])
            frame = TYPES[tag].model_validate_json(payload)
            begun = frame.n - 1 if isinstance(frame, Started) else 0
            unfinished += begun - isinstance(frame, Finished)
            yield frame
    except (struct.error, HTTPException, OSError) as error:
        raise EOFError("the stream was cut") from error


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/typed_stream.py URL PROMPT")
    headers = {"content-type": "application/json", "accept": "application/octet-stream"}
    body = json.dumps({"prompt": sys.argv[2]}).encode()
    request = urllib.request.Request(f"{sys.argv[1]}/v1/streams", body, headers)  # noqa: S310
    with urllib.request.urlopen(request) as response:  # noqa: S310
        for each in read_stream(response):
            print(each.text if isinstance(each, Delta) else each, flush=True)
