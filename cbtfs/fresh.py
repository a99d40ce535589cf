"""Fresh: what is slow to read, read once for all who ask at the same time, and never too old.

::

    a asks   reading 1 ├────────────┤ a
    b asks                 b waits    reading 2 ├────────────┤ b, c
    c asks                        c waits

Nobody gets what was read from before they asked: b may know that something has changed since.
"""

from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import trio

from . import errors

T = TypeVar("T")


class Fresh(Generic[T]):
    """Shares the results of ``read``, one call of which is under way at a time.

    ``_begun`` counts the readings; ``_value`` or ``_error`` is what the last one gave. They change
    only under ``_turn``.
    """

    def __init__(self, read: Callable[[], Awaitable[T]]) -> None:
        self._read = read
        self._turn = trio.Lock()
        self._begun = 0
        self._value: T | None = None
        self._error: errors.CbtfsError | None = None

    async def get(self) -> T:
        """Return what a reading gave that began after this call.

        Raises:
            CbtfsError: what that reading raised.
        """
        asked = self._begun
        async with self._turn:
            try:
                if self._begun > asked and self._error is not None:
                    raise self._error
                if self._begun > asked and self._value is not None:
                    return self._value
                return await self._again()
            finally:
                if not self._turn.statistics().tasks_waiting:  # a pool's inventory is not small
                    self._value = self._error = None

    async def _again(self) -> T:
        self._begun += 1
        self._value = self._error = None  # and so it stays if this one is cancelled
        try:
            self._value = value = await self._read()
        except errors.CbtfsError as exc:
            self._error = exc
            raise
        return value
