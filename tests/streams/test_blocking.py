"""Blocking calls beside an event loop: results and errors come back, and a hung call keeps nothing alive."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from gpuledger.streams.blocking import BlockingThread


def test_calls_run_in_order_in_one_other_thread() -> None:
    async def calls() -> list[tuple[int, str]]:
        thread = BlockingThread("blocking-test")
        try:
            return list(
                await asyncio.gather(*(thread.call(lambda n=n: (n, threading.current_thread().name)) for n in range(5)))
            )
        finally:
            thread.close()

    assert asyncio.run(calls()) == [(n, "blocking-test") for n in range(5)]


@pytest.mark.parametrize("error, raised", [(ValueError("no"), ValueError), (StopIteration(), RuntimeError)])
def test_errors_come_back_to_the_caller(error: Exception, raised: type[Exception]) -> None:
    def fail() -> None:
        raise error

    async def call(function: Callable[[], None]) -> None:
        await asyncio.wait_for(BlockingThread("blocking-test").call(function), timeout=10)

    with pytest.raises(raised):
        asyncio.run(call(fail))


def test_a_hung_call_does_not_keep_the_process() -> None:
    program = """
import asyncio, threading
from gpuledger.streams.blocking import BlockingThread

async def main():
    try:
        await asyncio.wait_for(BlockingThread("hung").call(threading.Event().wait), timeout=0.1)
    except TimeoutError:
        print("gave up")

asyncio.run(main())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stdout) == (0, "gave up\n"), result.stderr
