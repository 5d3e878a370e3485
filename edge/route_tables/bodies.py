"""How a route reads what a dialect parses."""

from collections.abc import Callable
from typing import Any

from starlette.requests import Request

from edge.dialects.dialect import ParsedRequest, PromptLimits
from edge.generate_endpoint import Parse
from edge.operation import BodyParse
from edge.request_body import read_object


def from_body(parse: BodyParse) -> Parse:
    """For routes whose request is the body alone."""

    async def read_and_parse(request: Request, limits: PromptLimits) -> ParsedRequest:
        return parse(await read_object(request, limits), limits)

    return read_and_parse


def from_path_and_body(
    parse: Callable[[dict[str, Any], PromptLimits, dict[str, str]], ParsedRequest],
) -> Parse:
    """For routes whose path says something too."""

    async def read_and_parse(request: Request, limits: PromptLimits) -> ParsedRequest:
        return parse(await read_object(request, limits), limits, request.path_params)

    return read_and_parse
