"""Probes: the answers of an event loop that turns, one that hangs and one that is closed."""

from __future__ import annotations

import asyncio
import threading

from inference_worker.probes import Probes


async def answers(probes: Probes) -> tuple[bool, bool]:
    return await asyncio.to_thread(lambda: (probes.is_alive(), probes.is_ready()))


async def test_a_loop_that_turns_is_alive_and_ready_while_it_serves() -> None:
    serving = [False]
    probes = Probes(asyncio.get_running_loop(), lambda: serving[0])
    assert await answers(probes) == (True, False)
    serving[0] = True
    assert await answers(probes) == (True, True)


async def test_a_loop_that_hangs_is_neither_alive_nor_ready() -> None:
    loop = asyncio.new_event_loop()
    hangs, end = threading.Event(), threading.Event()

    def hang() -> None:
        hangs.set()
        end.wait()

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    loop.call_soon_threadsafe(hang)
    assert await asyncio.to_thread(hangs.wait, 20)
    probes = Probes(loop, lambda: True, seconds=0.05)
    assert await answers(probes) == (False, False)
    end.set()
    loop.call_soon_threadsafe(loop.stop)
    await asyncio.to_thread(thread.join)
    loop.close()
    assert await answers(probes) == (False, False)
