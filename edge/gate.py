"""Who may come in: finds the API key of a request, and refuses those without one as their dialect does."""

from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl

import structlog
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from edge.access_tokens import TOKEN_PREFIX, AccessTokens, BadSecret, random_secret, read_secret
from edge.api_keys import ApiKeys, BadKeys, Holder, read_keys
from edge.error_response import Refuse
from edge.errors import EdgeError, permission_denied, unauthenticated
from edge.json_codec import encode
from edge.request_log import record_of
from edge.settings import EdgeSettings
from protos.sluice.v1 import generation_pb2 as pb

# RFC 6750, section 2.3.
QUERY_PARAMETER: Final = "access_token"
_STATE_KEY: Final = "sluice_holder"
_log = structlog.get_logger("edge")


@dataclass(frozen=True)
class _Known:
    """What is believed; replaced as a whole."""

    keys: ApiKeys
    tokens: AccessTokens


class Gate:
    """The keys that open the edge; without any it is open to everybody."""

    def __init__(self, settings: EdgeSettings) -> None:
        """Raises: BadKeys, BadSecret."""
        self._settings = settings
        self._own_secret = random_secret()  # outlives a reload, and so do the tokens
        self._known = self._read() if self.has_keys else None

    @property
    def has_keys(self) -> bool:
        """Whether a key is needed at all."""
        return bool(self._settings.api_keys_file or self._settings.api_keys)

    def reload(self) -> None:
        """Reads the files again. What cannot be used changes nothing and is told in the log."""
        if not self.has_keys:
            return
        try:
            self._known = self._read()
        except (BadKeys, BadSecret) as error:
            _log.error("api keys not reloaded", reason=str(error))
        else:
            _log.info("api keys reloaded", keys=len(self._known.keys))

    def admit(self, scope: Scope) -> None:
        """Finds who asks, for `caller_of`, or raises a 401 or 403. Also for a WebSocket's scope."""
        if self._known is None:
            return
        credential = _credential(scope)
        if credential is None:
            raise unauthenticated("Give an API key: Authorization: Bearer KEY, or x-api-key: KEY.")
        holder = self._find(credential)
        if holder is None:
            raise unauthenticated("The API key is not known, or the token has expired.", True)
        if holder.key.is_disabled:
            raise permission_denied("The API key is disabled.", "api_key_disabled")
        _let_in(scope, holder)

    def holds(self, scope: Scope) -> bool:
        """Whether the secret that a connection was let in with, perhaps long ago, still opens its key.

        From then on `caller_of` tells the limits that the key has now.
        """
        if self._known is None:
            return True
        holder = _holder_of(scope)
        key = None if holder is None else self._known.keys.named(holder.key.name)
        if holder is None or key is None or key.is_disabled or holder.digest not in key.digests:
            return False
        _let_in(scope, Holder(key, holder.digest))
        return True

    async def token(self, request: Request) -> Response:
        """POST /v1/tokens: a token in place of the key that the request came with."""
        holder, known = _holder_of(request.scope), self._known
        if holder is None or known is None:
            raise EdgeError(
                404, "not_found_error", "No API key is needed here, so there are no tokens."
            )
        if (_credential(request.scope) or "").startswith(TOKEN_PREFIX):
            raise unauthenticated("A token is given for an API key, not for another token.")
        token = known.tokens.issue(holder)
        lifetime = known.tokens.lifetime_seconds
        return Response(
            encode({"access_token": token, "token_type": "Bearer", "expires_in": lifetime}),
            media_type="application/json",
            headers={"cache-control": "no-store"},
        )

    def _find(self, credential: str) -> Holder | None:
        known = self._known
        assert known is not None  # noqa: S101
        if credential.startswith(TOKEN_PREFIX):
            return known.tokens.find(credential, known.keys)
        return known.keys.find(credential)

    def _read(self) -> _Known:
        settings = self._settings
        path = settings.token_secret_file
        secret = read_secret(path) if path else self._own_secret
        return _Known(
            read_keys(settings.api_keys_file, settings.api_keys),
            AccessTokens(secret, settings.token_seconds),
        )


class Gated:
    """ASGI middleware of one route."""

    def __init__(self, app: ASGIApp, gate: Gate, refuse: Refuse) -> None:
        self._app = app
        self._gate = gate
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = record_of(scope)
        try:
            self._gate.admit(scope)
        except EdgeError as error:
            record.error(error)
            await self._refuse(error, record.request_id)(scope, receive, send)
            return
        holder = _holder_of(scope)
        if holder is not None:
            record.fields["key"] = holder.key.name
        await self._app(scope, receive, send)


def caller_of(scope: Scope) -> pb.Caller | None:
    """For whom a request is; None where no keys are needed."""
    holder = _holder_of(scope)
    return None if holder is None else holder.key.caller()


def _let_in(scope: Scope, holder: Holder) -> None:
    scope.setdefault("state", {})[_STATE_KEY] = holder


def _holder_of(scope: Scope) -> Holder | None:
    holder: Holder | None = scope.get("state", {}).get(_STATE_KEY)
    return holder


def _credential(scope: Scope) -> str | None:
    """The key or token that a request brings. One in the query is taken from GET alone, and must be a token."""
    headers = Headers(scope=scope)
    scheme, _, credential = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credential.strip():
        return credential.strip()
    if key := headers.get("x-api-key", "").strip():
        return key
    if scope.get("method", "GET") == "GET":
        query: bytes = scope["query_string"]
        for name, value in parse_qsl(query.decode("latin-1")):
            if name == QUERY_PARAMETER and value.startswith(TOKEN_PREFIX):
                return value
    return None
