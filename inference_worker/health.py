"""grpc.health.v1 for the worker.

grpcio-health-checking has a servicer, but when one of several watchers of a service leaves, it forgets the others
and they never hear of a drain; and its watchers cannot be ended when the server stops.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """One state for the whole process, under several service names."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._status = health_pb2.HealthCheckResponse.NOT_SERVING
        self._is_closed = False
        self._watchers: set[asyncio.Event] = set()

    @property
    def is_serving(self) -> bool:
        return bool(self._status == health_pb2.HealthCheckResponse.SERVING)

    def set_serving(self, is_serving: bool) -> None:
        """Change the state and tell the watchers."""
        response = health_pb2.HealthCheckResponse
        self._status = response.SERVING if is_serving else response.NOT_SERVING
        self._wake()

    def close(self) -> None:
        """End the watchers' streams, so that they do not hold the server up."""
        self._is_closed = True
        self._wake()

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """Tell the state. An unknown service is NOT_FOUND."""
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return health_pb2.HealthCheckResponse(status=self._status)

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> None:
        """Tell the state now and whenever it changes. An unknown service is told as SERVICE_UNKNOWN."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        told = None
        try:
            while True:
                status = self._status_of(request.service)
                if status != told:
                    told = status
                    await context.write(health_pb2.HealthCheckResponse(status=status))
                if self._is_closed:  # only now: the last change is told, too
                    return
                await changed.wait()
                changed.clear()
        finally:
            self._watchers.discard(changed)

    def _status_of(self, service: str) -> int:
        if service in self._names:
            return int(self._status)
        return int(health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)

    def _wake(self) -> None:
        for watcher in self._watchers:
            watcher.set()
