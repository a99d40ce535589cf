"""Room: places for reads on their way, so that their memory is bounded.

::

    size places              as many again
    | silent | silent |      | other | other |      after a while: no disk waits for another's host
      counts no more

A place is held until its read ends, and a host that falls silent ends none for a minute. Soon a
disk on that host has all places, and the disks on other hosts must not wait for it. So a read that
has stalled keeps nobody waiting, up to as many as there are places, but reads of its own disk.
"""

from collections import Counter
from dataclasses import dataclass, field

import trio

STALLED = 5.0
"""Seconds after which a read keeps no other disk waiting."""


@dataclass(slots=True, eq=False)
class Place:
    """One that a read of the disk ``key`` has since the time ``begun``."""

    key: str
    begun: float = 0.0
    counts: bool = True


@dataclass(slots=True, eq=False)
class _Waiting:
    place: Place
    given: trio.Event = field(default_factory=trio.Event)


class Room:
    """``size`` places, and as many again while as many reads have stalled.

    All of it changes between awaits only.
    """

    def __init__(self, size: int) -> None:
        self._free = size
        self._more = size
        self._counting: dict[Place, None] = {}  # the oldest first
        self._stalled: Counter[str] = Counter()
        self._queue: dict[_Waiting, None] = {}

    async def take(self, key: str) -> Place:
        """Wait for a place, but not a turn if there is one; whoever has it calls ``leave``."""
        place = Place(key)
        if self._may_have(place):
            self._give(place)
            return place
        waiting = _Waiting(place)
        self._queue[waiting] = None
        try:
            while not waiting.given.is_set():
                with trio.move_on_at(self._next_stall()):
                    await waiting.given.wait()
                self._pass_over_stalled()
        except BaseException:
            if waiting in self._queue:
                del self._queue[waiting]
            else:
                self.leave(place)
            raise
        return place

    def leave(self, place: Place) -> None:
        """Give a place back."""
        if place.counts:
            del self._counting[place]
            self._free += 1
        else:
            self._more += 1
            self._stalled -= Counter([place.key])
        self._give_out()

    def _may_have(self, place: Place) -> bool:
        return self._free > 0 and place.key not in self._stalled

    def _give(self, place: Place) -> None:
        self._free -= 1
        self._counting[place] = None
        place.begun = trio.current_time()

    def _give_out(self) -> None:
        """Give what is free to those who wait, the first who may have it first."""
        for waiting in list(self._queue) if self._free else ():
            if self._may_have(waiting.place):
                self._give(waiting.place)
                del self._queue[waiting]
                waiting.given.set()

    def _next_stall(self) -> float:
        """Return when there may be more to give out."""
        now = trio.current_time()
        oldest = next(iter(self._counting), None) if self._more else None
        return (now if oldest is None else oldest.begun) + STALLED

    def _pass_over_stalled(self) -> None:
        """Count those no more that have stalled, as far as there is memory for others."""
        now = trio.current_time()
        stalled = [place for place in self._counting if place.begun + STALLED <= now]
        for place in stalled[: self._more]:
            del self._counting[place]
            place.counts = False
            self._more -= 1
            self._free += 1
            self._stalled[place.key] += 1
        if stalled:
            self._give_out()
