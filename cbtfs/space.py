"""Space: the room in a store that runs under way are going to need.

A run is refused early if it needs more than is free. But several at a time would all find the same
room, fill the store together, and fail together. So what one was promised is not there for the
others until it has ended: they wait. It is not known how much of a promise has been used already,
so they may wait longer than they have to, but none is refused for it.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import trio

from . import errors, units
from .store import Store


class Space:
    """The room in one store.

    ``_promised`` changes between checkpoints only; then ``_changed`` is set, and another one made.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._promised: list[int] = []
        self._changed = trio.Event()

    @asynccontextmanager
    async def held(
        self, needed: int, *, name: str, waits: Callable[[], None]
    ) -> AsyncGenerator[None]:
        """Have about ``needed`` bytes promised to ``name``; ``waits`` is called if that takes time.

        Raises:
            StoreFull: there is less, whoever it is promised to.
        """
        waited = False
        while needed and needed > (free := self._store.free_space()) - sum(self._promised):
            if needed > free:
                raise errors.StoreFull(
                    f"{name} needs about {units.format_size(needed)} and {self._store.path}"
                    f" has {units.format_size(free)} free; remove restore points or enlarge it"
                )
            if not waited:
                waits()
            waited = True
            await self._changed.wait()
        self._promised.append(needed)
        try:
            yield
        finally:
            self._promised.remove(needed)
            self._changed.set()
            self._changed = trio.Event()
