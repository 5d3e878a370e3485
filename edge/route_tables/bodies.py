"""How a route reads what a dialect parses."""

from collections.abc import Callable
from typing import Any

from starlette.requests import Request

from edge.dialects.dialect import ParsedRequest, PromptLimits
from edge.generate_endpoint import Parse
from edge.operation import BodyParse
from edge.request_body import read_parsed


def from_body(parse: BodyParse) -> Parse:
    """For routes whose request is the body alone."""

    async def read_and_parse(request: Request, limits: PromptLimits) -> ParsedRequest:
        return await read_parsed(request, limits, lambda body: parse(body, limits))

    return read_and_parse


def from_path_and_body(
    parse: Callable[[dict[str, Any], PromptLimits, dict[str, str]], ParsedRequest],
) -> Parse:
    """For routes whose path says something too."""

    async def read_and_parse(request: Request, limits: PromptLimits) -> ParsedRequest:
        path = request.path_params
        return await read_parsed(request, limits, lambda body: parse(body, limits, path))

    return read_and_parse
