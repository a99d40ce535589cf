r"""Places: the NBD connections to each host, counted over all processes of this machine.

A host's xapi-nbd serves 16 connections, so those of a mount and of two syncs have to be counted
together. A place is a number below the limit of its process, bound as the name of a socket::

    \0cbtfs/place/HOST/11     a sync with a limit of 12
    \0cbtfs/place/HOST/10     the same
    \0cbtfs/place/HOST/3      a mount with a limit of 4

The kernel gives a name to one socket at a time, and takes it back when its process ends, however
that ends. These names are abstract (unix(7)): no file is left, and all users see the same ones. A
container with a network of its own does not, and counts for itself.

Rules of this file:

1. Numbers are taken from the highest down: whoever has a smaller limit finds its low ones free.
2. Within a process, who has waited longest is first. Between processes luck decides: each looks
   as often as any other, at random intervals, however many of its tasks wait.
3. No child gets the descriptor: it would keep the place.
"""

import errno
import logging
import math
import random
import re
import socket
from collections import Counter
from collections.abc import AsyncGenerator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import trio

from . import errors

logger = logging.getLogger(__name__)

PAUSE = 0.1
"""Seconds between two looks on average; opening a connection takes a real host seconds."""

PATIENCE = 30.0
"""Seconds of waiting for others after which somebody is told."""

_SOCKETS = Path("/proc/net/unix")
_PREFIX = "cbtfs/place/"
_PLAIN = re.compile(r"[0-9A-Za-z.:-]{1,64}")


@dataclass(frozen=True, slots=True)
class Place:
    """A place at ``host``; ``waited`` tells whether it took time to get."""

    host: str
    waited: bool = False


@dataclass(slots=True, eq=False)
class _Waiting:
    """Who waits for a place at one of ``hosts``, best first; ``begun`` is on trio's clock."""

    hosts: list[str]
    names: Mapping[str, str]
    begun: float
    host: str = ""
    number: socket.socket | None = None
    waited: bool = False
    woken: trio.Event = field(default_factory=trio.Event)


class Places:
    """The places of this process; others of the machine are seen through the kernel only.

    ``_queue`` and ``_held`` change between checkpoints only. The first in the queue looks for all.

    Args:
        limit: places at each host that this process uses, and counts with all others.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._queue: list[_Waiting] = []
        self._held: Counter[str] = Counter()
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        return f"<Places {dict(+self._held)} of {self._limit}, {len(self._queue)} waiting>"

    @asynccontextmanager
    async def held(
        self, hosts: Mapping[str, str], *, last: Collection[str] = ()
    ) -> AsyncGenerator[Place]:
        """Hold a place at one of ``hosts``, the one with the fewest taken; wait if none is free.

        Args:
            hosts: what each is told apart by, and what people call it.
            last: those of them to take only if no other has a place.

        Raises:
            PoolError: the kernel has no names for places.
        """
        waiting = await self._take(hosts, last)
        try:
            yield Place(waiting.host, waited=waiting.waited)
        finally:
            self._leave(waiting)

    async def _take(self, hosts: Mapping[str, str], last: Collection[str]) -> _Waiting:
        taken = _taken()
        best = sorted(hosts, key=lambda host: (host in last, taken[_known(host)], random.random()))
        waiting = _Waiting(best, hosts, trio.current_time())
        # for what others wait for here, other processes may be waiting too: it is not passed on
        self._give(waiting, {host for earlier in self._queue for host in earlier.hosts})
        self._queue.append(waiting)
        try:
            while waiting.number is None:
                await self._wait(waiting)
        except BaseException:
            self._leave(waiting)
            raise
        finally:
            self._queue.remove(waiting)
            if self._queue:  # somebody has to look for those who are left
                self._queue[0].woken.set()
            else:
                self._warned.clear()
        return waiting

    async def _wait(self, waiting: _Waiting) -> None:
        first = self._queue[0] is waiting
        waiting.waited = True
        waiting.woken = trio.Event()
        with trio.move_on_after(random.uniform(0, 2 * PAUSE) if first else math.inf):
            await waiting.woken.wait()
        if first:
            self._serve()

    def _serve(self) -> None:
        """Give those who wait what is free."""
        full: set[str] = set()
        for waiting in self._queue:
            self._give(waiting, full)
            if waiting.number is None:
                self._tell(waiting)

    def _give(self, waiting: _Waiting, full: set[str]) -> None:
        """Give one who waits a place, but not on a host that is ``full``; add those that are."""
        for host in waiting.hosts:
            if waiting.number is not None:
                return
            number = _bound(host, self._limit) if host not in full else None
            if number is None:
                full.add(host)
                continue
            waiting.host, waiting.number = host, number
            waiting.woken.set()
            self._held[host] += 1

    def _tell(self, waiting: _Waiting) -> None:
        """Say what is waited for, once, if it is somebody else who could end it."""
        if trio.current_time() - waiting.begun < PATIENCE:
            return
        for host in waiting.hosts:
            others = self._limit - self._held[host]
            if others and host not in self._warned:
                self._warned.add(host)
                logger.warning(
                    "waiting for a connection to %s: other processes on this machine hold %s that"
                    " are allowed at a time (connections_per_host)",
                    waiting.names[host],
                    f"all {self._limit}"
                    if others == self._limit
                    else f"{others} of the {self._limit}",
                )

    def _leave(self, waiting: _Waiting) -> None:
        if waiting.number is not None:
            waiting.number.close()
            self._held[waiting.host] -= 1


def _known(host: str) -> str:
    """Return how ``host`` stands in a name: as it is, unless that would not fit or be read back."""
    return host if _PLAIN.fullmatch(host) else blake2b(host.encode(), digest_size=16).hexdigest()


def _bound(host: str, limit: int) -> socket.socket | None:
    """Return a socket bound to a free number below ``limit``, None if all are taken."""
    with socket.socket(socket.AF_UNIX) as made:  # it does not listen: nobody can connect to it
        for number in reversed(range(limit)):
            if _bind(made, f"\0{_PREFIX}{_known(host)}/{number}"):
                return socket.socket(fileno=made.detach())
    return None


def _bind(sock: socket.socket, name: str) -> bool:
    """Bind, and tell whether the name was free."""
    try:
        sock.bind(name)
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            return False
        raise errors.PoolError(
            "the connections to a host cannot be counted with those of other processes:"
            f" {exc.strerror}; allow this process to bind abstract unix sockets"
        ) from exc
    return True


def _taken() -> Counter[str]:
    """Return how many places of each host are taken, by whomever; nothing where that is secret."""
    try:
        lines = _SOCKETS.read_text(errors="replace").splitlines()
    except OSError:
        return Counter()
    names = (line.partition(f" @{_PREFIX}")[2] for line in lines)
    return Counter(name.rpartition("/")[0] for name in names if name)
