"""Tracking: the change logs of a pool's disks and how they hang together.

Logs point to each other by uuid, parent older, child newer. What happens to them is what sm
does, in sm, drivers/VDI.py (``_cbt_snapshot``, ``delete``, ``list_changed_blocks``); nothing
here ever looks at contents. The caller holds the storage's lock, and the lock of the disk
whose live log changes.
"""

from collections.abc import Iterator

from . import failures
from .changelog import ChangeLog
from .failures import SimError


class Tracking:
    """The logs by uuid of their VDI; a uuid that is missing is not tracked."""

    def __init__(self) -> None:
        self._logs: dict[str, ChangeLog] = {}

    def __contains__(self, uuid: str) -> bool:
        return uuid in self._logs

    def __getitem__(self, uuid: str) -> ChangeLog:
        return self._logs[uuid]

    def get(self, uuid: str) -> ChangeLog | None:
        """Return the log of a VDI, None if it is not tracked."""
        return self._logs.get(uuid)

    def items(self) -> Iterator[tuple[str, ChangeLog]]:
        """Yield uuids and logs."""
        yield from self._logs.items()

    def put(self, uuid: str, log: ChangeLog) -> None:
        """Give a VDI a log."""
        self._logs[uuid] = log

    def drop(self, uuid: str) -> None:
        """Delete a live log: its parent has no child any more, the chain ends there."""
        log = self._logs.pop(uuid, None)
        if log is not None and log.parent in self._logs:
            self._logs[log.parent].child = ""

    def rename(self, uuid: str, snapshot: str, *, size: int, active: bool) -> None:
        """Give the live log to a snapshot, start an empty one.

        The snapshot's log counts as consistent whatever it was before: sm's hole after a
        crash of a host.
        """
        old, new = self._logs.pop(uuid), ChangeLog(size)
        old.deactivate()
        if old.parent in self._logs:
            self._logs[old.parent].child = snapshot
        new.parent, new.child, old.child = snapshot, old.child, uuid
        if active:
            new.activate()
        self._logs[snapshot], self._logs[uuid] = old, new

    def unlink(self, uuid: str) -> None:
        """Take the log of a destroyed VDI out: the next newer one gets its writes."""
        log = self._logs.pop(uuid)
        child, parent = self._logs.get(log.child), self._logs.get(log.parent)
        if child is not None:
            child.merge(log)
            child.parent = log.parent
        if parent is not None:
            parent.child = log.child

    def chain(self, older: str, newer: str) -> list[ChangeLog]:
        """Return the logs after ``older`` up to and with that of ``newer``.

        Raises:
            SimError: fault 460 or 459, in sm's words.
        """
        if older == newer:
            raise _unknown("Source and target VDI are same")
        if older not in self._logs or newer not in self._logs:
            raise _unknown("Source and target VDI are unrelated")
        found: list[ChangeLog] = []
        here = older
        while here != newer:
            here = self._logs[here].child
            if here not in self._logs:
                raise _unknown("Source and target VDI are unrelated")
            if found:
                _check_growth(found[-1], self._logs[here])
            found.append(self._logs[here])
        return found


def _check_growth(before: ChangeLog, log: ChangeLog) -> None:
    """Refuse sizes that do not fit together, by the test that sm makes."""
    shrunk = log.size < before.size or log.length() < before.length()
    stuck = log.size > before.size and log.length() <= before.length()
    if shrunk or stuck:
        raise failures.storage(
            459,
            "Changed block tracking log is in an inconsistent state.",
            detail="Inconsistent bitmaps",
        )


def _unknown(detail: str) -> SimError:
    return failures.storage(
        460, "Failed to calculate changed blocks for given VDIs.", detail=detail
    )
