"""The playground at `/`: static files for a browser, which talk to the native dialect like any other client."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

_FILES: Final = Path(__file__).with_name("static")

# Nothing comes from elsewhere, nothing runs that is not a file of ours, no text becomes markup, nobody frames the page.
CONTENT_SECURITY_POLICY: Final = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)
HEADERS: Final[Mapping[str, str]] = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # an etag decides: a new version of the edge is seen at once
}


def routes() -> list[BaseRoute]:
    """The page and its files."""
    files = _Files(directory=_FILES)

    async def page(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    return [
        Route("/", page, methods=["GET"], include_in_schema=False),
        Mount("/static", files),
    ]


class _Files(StaticFiles):
    """Static files under the page's policy."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response
