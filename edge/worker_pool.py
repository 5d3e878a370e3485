"""The workers: which of them takes a request, and calls that any or all of them answer."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection
from typing import TypeVar

import structlog

from edge.errors import EdgeError, is_lost, unavailable
from edge.left_behind import LeftBehind
from edge.metrics import EdgeMetrics
from edge.running_streams import FOUND, RunningStreams
from edge.settings import EdgeSettings
from edge.worker_client import WorkerClient
from edge.worker_targets import is_name, resolve, split_targets
from protos.sluice.v1 import generation_pb2 as pb

T = TypeVar("T")

# A name is looked up so often while a worker of it does not serve: its successor may have another address.
_EAGER_RESOLVE_SECONDS = 1.0
_log = structlog.get_logger("edge.worker")


class WorkerPool:
    """One client for each worker. Start it within the event loop that uses it.

    All workers serve the same model: any of them answers for it.
    """

    def __init__(self, settings: EdgeSettings, metrics: EdgeMetrics) -> None:
        self.settings = settings
        self.metrics = metrics
        targets = split_targets(settings.worker)
        self._names = [target for target in targets if is_name(target)]
        self._fixed = [target for target in targets if not is_name(target)]
        self._clients: dict[str, WorkerClient] = {}
        # Their addresses are no longer the name's: they end what they have and get nothing new. With the time of that.
        self._leaving: dict[str, tuple[WorkerClient, float]] = {}
        self._addresses: dict[str, frozenset[str]] = {name: frozenset() for name in self._names}
        self._unresolved = set(self._names)
        self._turn = 0
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.left_behind = LeftBehind(self.changed)
        self.running = RunningStreams()

    async def start(self) -> None:
        """Opens the channels and begins to watch names and workers."""
        for target in self._fixed:
            self._add(target)
        for name in self._names:
            task = asyncio.create_task(self._resolve_forever(name), name=f"resolve {name}")
            self._tasks.append(task)

    async def close(self) -> None:
        """Ends every call and the channels."""
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self.left_behind.close()
        await asyncio.gather(*(client.close() for client in self._all()))

    def count(self) -> int:
        """Workers that are known."""
        return len(self._clients)

    def count_serving(self) -> int:
        """Workers that take work."""
        return sum(client.is_serving for client in self._clients.values())

    @property
    def is_serving(self) -> bool:
        """Whether any worker takes work."""
        return any(client.is_serving for client in self._clients.values())

    @property
    def reason(self) -> str:
        """Why none does."""
        if self.is_serving:
            return ""
        reasons = [client.reason for client in self._clients.values()]
        if not reasons:
            return "the workers' name has no address"
        if len(reasons) == 1:
            return reasons[0]
        return f"none of {len(reasons)} workers serves, and of the first, {reasons[0]}"

    @property
    def has_others(self) -> bool:
        """Whether there is, or may come to be, more than one worker."""
        return len(self._clients) > 1 or bool(self._names)

    def pick(self, excluded: Collection[WorkerClient] = ()) -> WorkerClient | None:
        """The serving worker with the fewest outstanding generations of this edge; equal ones take turns.

        One that is full is last. None where no worker serves.
        """
        ranks = {
            client: (client.refusals.is_full, client.outstanding)
            for client in self._clients.values()
            if client.is_serving and client not in excluded
        }
        if not ranks:
            return None
        best = min(ranks.values())
        equal = [client for client, rank in ranks.items() if rank == best]
        self._turn += 1
        return equal[self._turn % len(equal)]

    async def serving(self) -> WorkerClient:
        """As `pick`, but waits a little while a worker's health is not known, or another one may yet come to serve.

        Raises a 503 when none serves.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.connect_timeout_seconds):
                while not self.is_serving and (self._is_unknown or self.has_others):
                    await self.changed()
        client = self.pick()
        if client is None:
            raise unavailable(f"No worker is ready: {self.reason}.")
        return client

    async def changed(self) -> None:
        """Returns at the next change of any worker's health or of their number."""
        await self._news.wait()

    async def reachable(self) -> list[WorkerClient]:
        """All workers that answer, also those that drain, once each is known to or not to. Raises a 503 for none."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.connect_timeout_seconds):
                while self._is_unknown:
                    await self.changed()
        clients = self._reachable()
        if not clients:
            raise unavailable(f"No worker is ready: {self.reason}.")
        return clients

    async def abort(
        self, request: pb.AbortRequest, caller: pb.Caller | None = None
    ) -> pb.AbortOutcome.ValueType:
        """Ends a generation that came over any connection, on whichever worker has it; with a caller, one of theirs.

        Raises a 503 where a worker that may have it could not be asked.
        """
        if caller is not None:
            request.key_id = caller.key_id
        stream = self.running.find(request)
        if stream is not None:
            return await stream.abort(request)
        if not self._reachable():
            await self.serving()  # waits for the first, or says why there is none
        answers = (await self.ask_to_abort(request)).values()
        for outcome in FOUND:
            if outcome in answers:
                return outcome
        # One that is cut off from here may have it, or another edge may move it from one that is lost.
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return pb.ABORT_OUTCOME_UNKNOWN

    async def ask_to_abort(
        self, request: pb.AbortRequest
    ) -> dict[WorkerClient, pb.AbortOutcome.ValueType | BaseException]:
        """What each worker that answers at all says, or how it fails to. All are asked at once."""
        clients = self._reachable()
        answers = await asyncio.gather(
            *(client.abort(request) for client in clients), return_exceptions=True
        )
        return dict(zip(clients, answers, strict=True))

    async def get_model(self, model: str | None = None) -> pb.GetModelResponse:
        """Describes the served model."""
        return await self._ask_any(lambda client: client.get_model(model))

    async def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """Turns a prompt into token ids."""
        return await self._ask_any(lambda client: client.tokenize(request))

    async def _ask_any(self, ask: Callable[[WorkerClient], Awaitable[T]]) -> T:
        client = await self.serving()
        asked = [client]
        while True:
            try:
                return await ask(client)
            except EdgeError as error:
                other = self.pick(asked) if is_lost(error) else None
                if other is None:
                    raise
                asked.append(client := other)

    @property
    def _is_unknown(self) -> bool:
        """Whether a worker may serve of which nothing has been heard."""
        clients = self._clients.values()
        return bool(self._unresolved) or any(not client.is_known for client in clients)

    def _reachable(self) -> list[WorkerClient]:
        return [client for client in self._all() if client.is_reachable]

    def _all(self) -> list[WorkerClient]:
        return [*self._clients.values(), *(client for client, _ in self._leaving.values())]

    def _add(self, target: str, name: str | None = None) -> None:
        if target in self._leaving:
            client, _ = self._leaving.pop(target)
        else:
            authority = None if name is None else name.removeprefix("dns:").removeprefix("///")
            client = WorkerClient(target, self.settings, self._changed, authority)
            client.start()
        self._clients[target] = client

    def _changed(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _resolve_forever(self, name: str) -> None:
        while True:
            try:
                async with asyncio.timeout(self.settings.connect_timeout_seconds):
                    self._resolved(name, await resolve(name))
            except (OSError, UnicodeError) as error:  # TimeoutError is one; "a..b" is no name
                if name in self._unresolved:
                    _log.warning("worker name", name=name, error=str(error) or "no answer in time")
            self._unresolved.discard(name)
            self._changed()
            await self._close_idle()
            await asyncio.sleep(self._resolve_seconds(name))

    def _resolve_seconds(self, name: str) -> float:
        clients = [self._clients[target] for target in self._addresses[name]]
        is_whole = bool(clients) and all(client.is_serving for client in clients)
        usual = self.settings.resolve_seconds
        return usual if is_whole else min(usual, _EAGER_RESOLVE_SECONDS)

    def _resolved(self, name: str, targets: frozenset[str]) -> None:
        """Takes the addresses a name has now. None at all is taken for a fault of the lookup: what is known stays."""
        known = self._addresses[name]
        if not targets or targets == known:
            return
        _log.info("worker name", name=name, targets=sorted(targets))
        self._addresses[name] = targets
        others = frozenset(self._fixed).union(*self._addresses.values())
        for target in sorted(targets - self._clients.keys()):
            self._add(target, name)
        for target in known - others:
            self._leaving[target] = self._clients.pop(target), time.monotonic()

    async def _close_idle(self) -> None:
        # Calls that only ask something are not counted, and take no longer.
        before = time.monotonic() - self.settings.connect_timeout_seconds
        for target, (client, since) in list(self._leaving.items()):
            if not client.outstanding and since < before:
                del self._leaving[target]
                await client.close()
