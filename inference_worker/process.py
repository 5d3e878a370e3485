"""One worker process from its settings to its exit code: load, serve, drain."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Final, NoReturn

from inference_worker.metrics import WorkerMetrics
from inference_worker.metrics_server import MetricsServer
from inference_worker.probes import Probes
from inference_worker.request_log import configure_logging, flush_log, get_logger
from inference_worker.served_model import Served
from inference_worker.server import AddressUnusable, Server
from inference_worker.settings import WorkerSettings
from inference_worker.step_watchdog import EngineHangs
from inference_worker.terminal import Terminal
from inference_worker.worker import Worker

PROGRAM: Final = "inference_worker"
_EXIT_FAILURE: Final = 1
_ENGINE_STOP_SECONDS: Final = 10.0
_LOG_SECONDS: Final = 1.0  # for the last lines, if somebody reads them
# How long Python lets one thread hold the interpreter while another wants it. The engine's thread wants it all the
# time; with the default of 5 ms every token waits that long for the event loop's turn.
_SWITCH_SECONDS: Final = 0.0005

LoadModel = Callable[[WorkerSettings], Served]


def run(settings: WorkerSettings, load_model: LoadModel) -> NoReturn:
    """Serve until a signal or a crash, and end the process."""
    configure_logging(settings.log_level)
    sys.setswitchinterval(_SWITCH_SECONDS)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        code = runner.run(_Process(settings, load_model).run())
    # Python would wait for a tokenizer that is busy with a prompt whose caller is long gone.
    _exit_now(code)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not made for Windows
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


class _Process:
    """The states of a worker process: loading, ready, draining."""

    def __init__(self, settings: WorkerSettings, load_model: LoadModel) -> None:
        self._settings = settings
        self._load_model = load_model
        self._stopping = asyncio.Event()  # a signal came, or the engine crashed
        self._is_ready = False
        self._crashed = asyncio.Event()
        self._metrics = WorkerMetrics()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        server = Server(self._settings)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup, server, Terminal())
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            server.bind()
            metrics_port = self._serve_metrics(Probes(loop, lambda: server.is_serving))
        except AddressUnusable as error:
            print(f"{PROGRAM}: {error}", file=sys.stderr)
            return _EXIT_FAILURE
        served = await self._load()
        if served is None:
            return _EXIT_FAILURE
        self._metrics.watch_loop(loop)
        worker = Worker(served, self._settings, self._on_crash, self._metrics)
        worker.start()
        await server.start(worker)
        self._is_ready = True
        # What is there now stays: a full collection that looks through all of torch takes some 200 ms.
        gc.collect()
        gc.freeze()
        with worker.watch_engine(lambda error, stack: self._on_hang(worker, error, stack)):
            self._tell_ready(server, served, worker, metrics_port)
            await self._stopping.wait()
            return await self._stop(server, worker)

    def _serve_metrics(self, probes: Probes) -> int | None:
        """From now on, on this port: how the loading goes is worth knowing too. Raises: AddressUnusable."""
        host, port = self._settings.metrics_host, self._settings.metrics_port
        if port is None:
            return None
        metrics_server = MetricsServer(self._metrics.registry, probes)
        try:
            metrics_server.bind(host, port)
        except OSError as error:
            raise AddressUnusable(
                f"cannot listen on {host} port {port} for metrics: {error.strerror}"
            ) from error
        return metrics_server.port

    async def _load(self) -> Served | None:
        """Load on a thread, so that signals are heard meanwhile."""
        log = get_logger()
        began = time.monotonic()
        subject = self._settings.engine or self._settings.model
        log.info("loading", model=self._settings.model, name=self._settings.served_name)
        try:
            served = await _run_on_daemon_thread(lambda: self._load_model(self._settings))
        except Exception as error:
            log.error("loading failed", model=self._settings.model, exc_info=error)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"{PROGRAM}: cannot load {subject}: {reason}", file=sys.stderr)
            return None
        log.info("loaded", model=served.info.name, seconds=round(time.monotonic() - began, 3))
        return served

    def _tell_ready(
        self, server: Server, served: Served, worker: Worker, metrics_port: int | None
    ) -> None:
        get_logger().info(
            "ready",
            address=server.address,
            metrics_port=metrics_port,
            model=served.info.name,
            aliases=self._settings.model_aliases,
            context_length=worker.context_length,
            kv_cache=served.info.kv_cache,
            device=served.info.device,
            dtype=served.info.dtype,
            pid=os.getpid(),
        )

    async def _stop(self, server: Server, worker: Worker) -> int:
        server.set_not_serving()
        if self._settings.unready_seconds and not self._crashed.is_set():
            get_logger().info("not ready", seconds=self._settings.unready_seconds)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._crashed.wait(), self._settings.unready_seconds)
        worker.stop_admitting()
        if self._crashed.is_set():
            await server.stop()  # the streams have failed; nothing can be finished
            return _EXIT_FAILURE
        get_logger().info("draining", seconds=self._settings.drain_seconds)
        await worker.drain(self._settings.drain_seconds)
        await server.stop()
        try:
            async with asyncio.timeout(_ENGINE_STOP_SECONDS):
                await worker.close()
        except TimeoutError:  # a step that never ends; waiting for its thread would hang the exit
            get_logger().error("the engine does not stop")
            _exit_now(_EXIT_FAILURE)
        return self._exit_code()

    def _exit_code(self) -> int:
        if self._crashed.is_set():  # while draining
            return _EXIT_FAILURE
        get_logger().info("stopped")
        return 0

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stopping.is_set():
            get_logger().warning("second signal: exiting at once", signal=number.name)
            _exit_now(128 + number)
        get_logger().info("signal", signal=number.name)
        if not self._is_ready:  # still loading: there is nothing to finish
            _exit_now(0)
        self._stopping.set()

    def _on_hangup(self, server: Server, terminal: Terminal) -> None:
        if not terminal.is_gone:
            server.reload_certificates()
        elif (
            not self._stopping.is_set()
        ):  # the system may tell it twice: no second signal to exit at once for
            self._on_signal(signal.SIGHUP)

    def _on_crash(self, error: BaseException) -> None:
        get_logger().critical("the engine crashed", exc_info=error)
        self._give_up()

    def _on_hang(self, worker: Worker, error: EngineHangs, stack: str) -> None:
        get_logger().critical("the engine hangs", reason=str(error), stack=stack)
        worker.give_up()
        self._give_up()

    def _give_up(self) -> None:
        self._crashed.set()
        self._stopping.set()


def _exit_now(code: int) -> NoReturn:
    """End without waiting for any thread but the log's, and for that not long."""
    flush_log(_LOG_SECONDS)  # stdout itself could block
    sys.stderr.flush()
    os._exit(code)


async def _run_on_daemon_thread(work: Callable[[], Served]) -> Served:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Served] = loop.create_future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            loop.call_soon_threadsafe(done.set_exception, error)
        else:
            loop.call_soon_threadsafe(done.set_result, result)

    threading.Thread(target=run, name="loader", daemon=True).start()
    return await done
