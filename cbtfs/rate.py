"""Rate: a limit in bytes per second that any number of disks share."""

import trio

from . import units

BURST = 0.25
"""Seconds' worth that may go at once after a pause."""

_STEPS = 2
"""Parts that a burst is made of: see ``Rate.step``."""


class Rate:
    """Lets so many bytes pass per second, whoever asks, in the order of asking.

    ::

        credit  |####|      |##  |      |    |          earned by waiting, at most a burst
                take now    take now    wait, then take

    One who waits holds the gate: those behind it wait for the gate, so a large request is not
    starved by small ones, and one that is cancelled has taken nothing.

    Args:
        bytes_per_second: above 0.
    """

    def __init__(self, bytes_per_second: float) -> None:
        if bytes_per_second <= 0:
            raise ValueError("a rate is above 0 bytes per second")
        self.bytes_per_second = bytes_per_second
        self._gate = trio.Lock()
        self._paid_until = float("-inf")  # what was taken so far is earned at this time

    def __repr__(self) -> str:
        return f"<Rate {units.format_size(int(self.bytes_per_second))}/s>"

    @property
    def step(self) -> int:
        """How many bytes to ask for at a time, at most, so that what goes at once is no burst."""
        return max(1, int(self.bytes_per_second * BURST / _STEPS))

    async def take(self, count: int) -> None:
        """Return when ``count`` more bytes may go; a cancelled call takes nothing."""
        async with self._gate:
            credit = trio.current_time() - BURST / _STEPS
            due = max(self._paid_until, credit) + count / self.bytes_per_second
            await trio.sleep_until(due)
            self._paid_until = due
