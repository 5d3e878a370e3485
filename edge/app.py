"""The ASGI application."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route, WebSocketRoute
from starlette.types import Lifespan

from edge import playground
from edge.drain import Drain
from edge.error_response import error_response
from edge.errors import EdgeError
from edge.gate import Gate, Gated
from edge.info_endpoints import InfoEndpoints, json_response
from edge.metrics import EdgeMetrics
from edge.openapi import document
from edge.operation import Operation
from edge.request_log import RequestLog, record_of
from edge.response_schema import AnyObject
from edge.route_tables import probes
from edge.routes import operations
from edge.settings import EdgeSettings
from edge.worker_pool import WorkerPool


class _AnyPath(PathConvertor):
    regex = "(?s:.*)"  # Starlette's own ends at a line feed


# a model's name in a path, whatever is in it, so that its dialect says that there is none
register_url_convertor("path", _AnyPath())


@dataclass(frozen=True)
class Apps:
    """What is served where."""

    public: Starlette
    # The probes alone, if they have a port of their own. Serve it only while `public` is.
    admin: Starlette | None


def create_apps(settings: EdgeSettings, drain: Drain, gate: Gate) -> Apps:
    """The routes, with the workers' channels open while the public application runs."""
    metrics = EdgeMetrics()
    workers = WorkerPool(settings, metrics)
    metrics.generations.set_function(drain.count)
    metrics.workers.set_function(workers.count)
    metrics.workers_ready.set_function(workers.count_serving)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:  # noqa: ARG001
        metrics.watch_loop(asyncio.get_running_loop())
        await workers.start()
        try:
            yield
        finally:
            await workers.close()

    table = operations(workers, drain, settings, gate)
    asked = probes.operations(InfoEndpoints(workers, drain), metrics, settings.open_metrics)
    has_admin = settings.admin_port is not None
    if not has_admin:
        table += asked
    table.append(_document_operation(table, gate))
    pages = playground.routes() if settings.playground else []
    public = _app([*_routes(table, gate), *pages], _middleware(settings, metrics), lifespan)
    if not has_admin:
        return Apps(public, None)
    return Apps(public, _app(_routes(asked, None), [Middleware(RequestLog, metrics)]))


def _app(
    routes: list[BaseRoute],
    middleware: list[Middleware],
    lifespan: Lifespan[Starlette] | None = None,
) -> Starlette:
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={EdgeError: _edge_error, HTTPException: _http_exception},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


def _routes(table: Sequence[Operation], gate: Gate | None) -> list[BaseRoute]:
    routes: list[BaseRoute] = []
    for operation in table:
        gated = []
        if gate is not None and not operation.is_open:
            gated = [Middleware(Gated, gate, operation.refuse)]
        routes.append(_route(operation, gated))
        if operation.socket is not None:
            routes.append(WebSocketRoute(operation.path, operation.socket.app, middleware=gated))
    return routes


def _route(operation: Operation, gated: Sequence[Middleware]) -> Route:
    route = Route(operation.path, operation.endpoint, methods=[operation.method], middleware=gated)
    if operation.events and route.methods is not None:
        route.methods.discard("HEAD")  # which Starlette adds; nobody would read what it generates
    return route


def _document_operation(table: list[Operation], gate: Gate) -> Operation:
    described: dict[str, object] = {}

    async def openapi(request: Request) -> Response:  # noqa: ARG001
        return json_response(described)

    operation = Operation("GET", "/openapi.json", openapi, "This document.", AnyObject, ())
    described.update(document([*table, operation], needs_key=gate.has_keys))
    return operation


def _middleware(settings: EdgeSettings, metrics: EdgeMetrics) -> list[Middleware]:
    middleware = [Middleware(RequestLog, metrics)]
    origins = settings.allowed_origins()
    if origins:
        # Outermost, so that a browser may read every answer, a 429 or 500 of the log's middleware too.
        middleware.insert(
            0,
            Middleware(
                CORSMiddleware,
                allow_origins=origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "request-id", "retry-after", "retry-after-ms"],
            ),
        )
    return middleware


async def _edge_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, EdgeError)  # noqa: S101
    record_of(request.scope).error(error)
    return error_response(error)


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    text = f"{error.detail}: {request.method} {request.url.path}"
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    if error.status_code == 405:
        headers["allow"] = ", ".join(sorted(_methods(request)))
    return error_response(EdgeError(error.status_code, kind, text, headers=headers))


def _methods(request: Request) -> set[str]:
    """Those that the path has; Starlette tells of its first route alone."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    # A model's name may have slashes, so a later route matches some paths of an earlier one.
    asked = next(route for route in routes if route.matches(request.scope)[0] != Match.NONE)
    same = (route.methods or () for route in routes if route.path == asked.path)
    return set().union(*same)
