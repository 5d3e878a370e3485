"""A thousand clients that vanish at random moments, each in its manner, leave nothing in either process."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import httpx
import pytest

from tests.integration.stack import PATIENCE, Stack, running_stack
from tests.integration.vanishing_client import connect
from tests.metrics_text import Scrape

Pair: TypeAlias = tuple[float, float]

CLIENT = str(Path(__file__).with_name("vanishing_client.py"))
WORKER = {"step_milliseconds": 2, "max_running": 16, "max_waiting": 2000, "metrics_port": 0}
EDGE = {"host": "0.0.0.0", "send_timeout_seconds": 1}
ROUNDS = 20  # of 125 clients each
WARM_UP_ROUNDS = (
    10  # the edge's heap grows by 10 MB in these, and then no more, however many there are
)
# Of a process, between the least that it holds after one of the next five rounds, and after one of the last five. The
# least, since how far a heap is stretched depends on how many came at once; what is lost is never given back.
MOST_GROWTH_BYTES = 3 * 2**20  # 5 KiB a client
# That a process opens once, under its first load, and keeps.
SPARE_FILES = 4
NAMESPACE, OUTSIDE, INSIDE = "sluice-test", "10.203.0.1", "10.203.0.2"


def fin(connection: socket.socket) -> None:
    connection.close()


def rst(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    connection.close()


def half_close(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)
    time.sleep(0.05)
    connection.close()


def pipeline(connection: socket.socket) -> None:
    connection.sendall(b"GET /health HTTP/1.1\r\nhost: edge\r\n\r\n")
    connection.close()


MANNERS: tuple[Callable[[socket.socket], None], ...] = (fin, rst, half_close, pipeline)


def vanish(port: int, seed: int) -> None:
    """One client, from its request to its end."""
    chance = random.Random(seed)
    connection = connect("127.0.0.1", port)
    time.sleep(chance.uniform(0, 0.2))
    with contextlib.suppress(OSError):  # the edge may have dropped it
        chance.choice(MANNERS)(connection)


@contextlib.contextmanager
def client_process(
    port: int, count: int, host: str = "127.0.0.1", *prefix: str
) -> Iterator[subprocess.Popen[str]]:
    """A process with so many streams; at the end it is killed."""
    command = [*prefix, sys.executable, CLIENT, host, str(port), str(count)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def vanish_in_numbers(port: int, seed: int) -> None:
    """113 that leave by themselves and 12 whose process is killed, in any order."""
    with ThreadPoolExecutor(48) as pool:
        leaving = [pool.submit(vanish, port, seed * 1000 + number) for number in range(113)]
        with client_process(port, 12):
            time.sleep(random.Random(seed).uniform(0, 0.2))
        for one in leaving:
            one.result()


class Measured:
    """Both processes, and what they say of themselves."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        port = next(line for line in stack.worker.lines if line["event"] == "ready")["metrics_port"]
        self._urls = (f"http://127.0.0.1:{port}/metrics", f"{stack.url}/metrics")

    def scrape(self) -> tuple[Scrape, Scrape]:
        worker, edge = (
            Scrape(urllib.request.urlopen(url, timeout=PATIENCE).read().decode())  # noqa: S310
            for url in self._urls
        )
        return worker, edge

    def held(self, spare_files: int = 0) -> tuple[Pair, Pair]:
        """Tasks and descriptors of worker and edge now."""
        worker, edge = self.scrape()
        tasks = worker("sluice_tasks"), edge("sluice_tasks")
        files = (
            worker("process_open_fds") + spare_files,
            edge("process_open_fds") + spare_files,
        )
        return tasks, files

    def wait_empty(self, most_tasks: Pair, most_files: Pair) -> None:
        """Wait until nothing is inside, and no more tasks and descriptors are there than at the beginning."""
        self._stack.wait_idle()
        deadline = time.monotonic() + PATIENCE
        while True:
            seen = worker, edge = self.scrape()
            inside = (
                worker("sluice_running_sequences"),
                worker("sluice_waiting_sequences"),
                worker("sluice_requests"),
                worker("sluice_waiting_tokens"),
                worker("sluice_kv_blocks_used"),
                edge("sluice_edge_generations"),
            )
            tasks = tuple(one("sluice_tasks") for one in seen)
            files = tuple(one("process_open_fds") for one in seen)
            if not any(inside) and all(
                now <= most
                for now, most in zip((*tasks, *files), (*most_tasks, *most_files), strict=True)
            ):
                return
            state = f"inside {inside}, tasks {tasks} {most_tasks}, files {files} {most_files}"
            assert time.monotonic() < deadline, state
            time.sleep(0.05)


def complete(stack: Stack) -> None:
    """A request that nobody leaves."""
    body = {"prompt": "go", "max_tokens": 4, "model": "default"}
    answer = httpx.post(f"{stack.url}/v1/completions", json=body, timeout=PATIENCE)
    assert answer.json()["usage"]["completion_tokens"] == 4


def test_a_thousand_clients_vanish_and_nothing_is_left() -> None:
    with running_stack(WORKER, EDGE, worker_module="inference_worker.scripted_model") as stack:
        measured = Measured(stack)
        complete(stack)
        tasks, files = measured.held(spare_files=SPARE_FILES)
        memory = []
        for number in range(ROUNDS):
            vanish_in_numbers(stack.edge_port, seed=number)
            measured.wait_empty(tasks, files)
            if number < WARM_UP_ROUNDS:
                _, files = measured.held()  # the others must not leave one more than this
            memory.append([one("process_resident_memory_bytes") for one in measured.scrape()])
        complete(stack)

        worker, edge = measured.scrape()
        for sizes in zip(*memory[WARM_UP_ROUNDS:], strict=True):
            half = len(sizes) // 2
            assert min(sizes[half:]) - min(sizes[:half]) < MOST_GROWTH_BYTES, memory
        left = edge.total("sluice_cancel_seconds_count") + edge("sluice_edge_slow_readers_total")
        assert left > 500  # others were gone before their request was read
        cancels = worker.total("sluice_cancel_seconds_count")
        assert cancels > 100
        # each of them found at most one step under way
        assert worker("sluice_tokens_after_cancel_total") <= cancels


def test_clients_that_are_stopped_are_noticed() -> None:
    with running_stack(WORKER, EDGE, worker_module="inference_worker.scripted_model") as stack:
        measured = Measured(stack)
        complete(stack)
        tasks, files = measured.held(spare_files=SPARE_FILES)
        with client_process(stack.edge_port, 24) as client:
            client.send_signal(signal.SIGSTOP)
            measured.wait_empty(tasks, files)
        assert measured.scrape()[1]("sluice_edge_slow_readers_total") > 0
        complete(stack)


def test_clients_that_are_cut_off_are_noticed() -> None:
    with (
        namespace(),
        running_stack(WORKER, EDGE, worker_module="inference_worker.scripted_model") as stack,
    ):
        measured = Measured(stack)
        complete(stack)
        tasks, files = measured.held(spare_files=SPARE_FILES)
        command = ("ip", "netns", "exec", NAMESPACE)
        with client_process(stack.edge_port, 24, OUTSIDE, *command):
            # no word leaves or reaches the namespace any more
            run(*command, "ip", "link", "set", "sluice-in", "down")
            measured.wait_empty(tasks, files)
        complete(stack)


@contextlib.contextmanager
def namespace() -> Iterator[None]:
    """A network of its own with a cable to ours. Skips the test where the machine does not allow it."""
    if shutil.which("ip") is None:
        pytest.skip("no `ip` here: not tested is a network that drops packets")
    try:
        run("ip", "netns", "add", NAMESPACE)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"not tested is a network that drops packets: {error.stderr.strip()}")
    try:
        inside = ("ip", "-netns", NAMESPACE)
        try:
            run("ip", "link", "add", "sluice-out", "type", "veth", "peer", "name", "sluice-in")
            run("ip", "link", "set", "sluice-in", "netns", NAMESPACE)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"not tested is a network that drops packets: {error.stderr.strip()}")
        run("ip", "addr", "add", f"{OUTSIDE}/30", "dev", "sluice-out")
        run("ip", "link", "set", "sluice-out", "up")
        run(*inside, "addr", "add", f"{INSIDE}/30", "dev", "sluice-in")
        run(*inside, "link", "set", "sluice-in", "up")
        yield
    finally:
        # The cable by itself, since a namespace may live on for a moment, and the next one's has the same name.
        subprocess.run(["ip", "link", "delete", "sluice-out"], check=False, capture_output=True)
        run("ip", "netns", "delete", NAMESPACE)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
