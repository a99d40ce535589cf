"""Running: the only ``trio.run()``, and what a signal does to it.

SIGINT, SIGTERM and SIGHUP (the terminal went away) cancel the work once; it cleans up behind itself
and the command ends with 130, 143 or 129. A second signal ends the process at once.
"""

import ctypes
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import trio

from cbtfs import errors
from cbtfs.signals import ONE_SIGNAL

_T = TypeVar("_T")

ARENAS = 2
"""Areas from which all threads get their memory. By default there are eight for each processor, and
what is freed in one stays there: a sync of 200 disks took 251 MB with them and takes 192 MB so."""

_M_ARENA_MAX = -8  # malloc.h, mallopt(3)


def run(work: Callable[[], Awaitable[_T]], *, then: str = errors.AGAIN) -> _T:
    """Return what ``work`` returns; ``then`` says what to do after an interruption.

    Raises:
        Interrupted: a signal came first; the cleaning up is done.
    """
    _share_memory()
    return trio.run(_supervised, work, then)


def _share_memory() -> None:
    """Bound the areas of malloc, where the C library has such, for threads made from now on."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, ARENAS)


async def _supervised(work: Callable[[], Awaitable[_T]], then: str) -> _T:
    results: list[_T] = []
    signals: list[int] = []
    scope = trio.CancelScope()
    with trio.open_signal_receiver(*_signals()) as received:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_watch, received, scope, signals)
            with scope:
                results.append(await work())
            nursery.cancel_scope.cancel()
    if results:
        return results[0]
    raise errors.Interrupted(signals[0], then=then)


async def _watch(received: AsyncIterator[int], scope: trio.CancelScope, signals: list[int]) -> None:
    first = 0.0
    async for signum in received:
        now = trio.current_time()
        if not signals:
            signals.append(signum)
            first = now
            scope.cancel()
        elif signum != signals[0] or now - first > ONE_SIGNAL:
            os._exit(128 + signum)  # whoever asks twice does not want to wait for the cleaning up


def _signals() -> list[int]:
    """Return what ends a command; under nohup(1) the end of the terminal does not."""
    asked: list[int] = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        asked.append(signal.SIGHUP)
    return asked
