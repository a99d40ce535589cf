"""Task: work that a pool does on its own, from the making of its record to the end of it.

xapi keeps a record of each ``Async`` call, and of what one of its HTTP handlers does for a client
that made a task for it. Whoever made it destroys it; xapi itself forgets it only after an hour.
"""

import logging
import re
import xmlrpc.client
from typing import Protocol, TypeVar, cast

import msgspec
import trio

from . import errors, process, wire
from .owner import TASK, Owned, read_task, write_owner

logger = logging.getLogger(__name__)
T = TypeVar("T")

CLEANUP = 10.0
"""Seconds that the pool gets to tidy up after a call of ours."""

_POLL_FIRST, _POLL_MOST = 0.02, 2.0
_PLAIN = re.compile(r"<value>(?:<string>([^<>&\r]*)</string>|([^<>&\r]*))</value>")
"""A string with nothing in it for a parser to do, which would need five copies of it: of the 43 MB
bitmap of 16 TiB that took 130 MiB more."""

_UNFINISHED = {"pending", "cancelling"}


class Record(msgspec.Struct, frozen=True):
    """What the pool says of a task."""

    uuid: str = ""
    name_label: str = ""
    name_description: str = ""
    status: str = ""


class Caller(Protocol):
    """A session, as far as a task needs it."""

    async def call(self, method: str, *args: object) -> object:
        """Call ``method``."""
        ...

    async def fetch(
        self,
        method: str,
        *args: object,
        type: type[T],  # noqa: A002 - as msgspec calls it
    ) -> T:
        """Call ``method``, which only reads."""
        ...


class Task:
    """A task of ours at the pool.

    Args:
        caller: the session to ask through.
        ref: the task's reference.
        what: the call that it carries out, for messages.
    """

    def __init__(self, caller: Caller, ref: str, *, what: str) -> None:
        self.ref = ref
        self._caller = caller
        self._what = what

    def __repr__(self) -> str:
        return f"<Task for {self._what}>"

    async def outcome(self) -> str:
        """Wait for its end and return its result, a reference or text.

        Raises:
            XapiFailure: it failed, or was cancelled.
        """
        status = await self.end()
        if status == "success":
            return unwrapped(await self._caller.fetch("task.get_result", self.ref, type=str))
        told = await self._caller.fetch("task.get_error_info", self.ref, type=list[str])
        code, *params = told or ["TASK_CANCELLED"]
        raise errors.XapiFailure(code, tuple(params), method=self._what)

    async def complaint(self) -> errors.XapiFailure | None:
        """Return what it failed with, None if it did not, or the pool does not tell in time."""
        with trio.move_on_after(CLEANUP):
            try:
                await self.outcome()
            except errors.AuthenticationFailed:
                raise
            except errors.XapiFailure as exc:
                return exc if exc.method == self._what else None
            except errors.CbtfsError as exc:
                logger.info("%s: %s", self._what, exc)
        return None

    async def end(self) -> str:
        """Wait for its end and return its status: ``success``, ``failure`` or ``cancelled``."""
        pause = _POLL_FIRST
        while (status := await self._status()) in _UNFINISHED:
            await trio.sleep(pause)
            pause = min(pause * 1.5, _POLL_MOST)
        return status

    async def cancel(self) -> None:
        """Ask the pool to give it up; whether and when it does is its own affair."""
        try:
            await self._caller.call("task.cancel", self.ref)
        except errors.CbtfsError as exc:
            logger.info("cleaning up: %s", exc)

    async def abandon(self) -> None:
        """Cancel it unless it has ended, see it end, and destroy it; not to be interrupted.

        The pool gets ten seconds to end it, and ten more to forget it.
        """
        with trio.move_on_after(CLEANUP, shield=True):
            try:
                if await self._status() in _UNFINISHED:
                    await self.cancel()
                    await self.end()
            except errors.CbtfsError as exc:
                logger.info("cleaning up: %s", exc)
        await self.destroy()

    async def destroy(self) -> None:
        """Have the pool forget it, as far as it answers within ten seconds."""
        with trio.move_on_after(CLEANUP, shield=True):
            try:
                await self._caller.call("task.destroy", self.ref)
            except errors.CbtfsError as exc:
                logger.info("cleaning up: %s", exc)  # xapi forgets a completed task by itself

    async def _status(self) -> str:
        return await self._caller.fetch("task.get_status", self.ref, type=str)


async def create(caller: Caller, label: str, *, what: str) -> Task:
    """Return a new task for one of xapi's handlers, to be destroyed by the caller.

    Args:
        caller: the session to make it through.
        label: what people see in a list of the pool's tasks.
        what: the call that it will carry out, for messages.
    """
    me = process.this_process()
    owned = Owned(
        self_uuid="", role=TASK, host=me.host, pid=me.pid, boot=me.boot, starttime=me.starttime
    )
    return await begin(caller, "task.create", label, write_owner(owned), what=what)


async def ours(caller: Caller) -> dict[str, Record]:
    """Return the tasks that ``create`` made, in this process or another, by reference."""
    records = await caller.fetch("task.get_all_records", type=dict[str, Record])
    return {ref: record for ref, record in records.items() if read_task(record.name_description)}


async def remove(caller: Caller, ref: str) -> None:
    """Cancel a task that another process made, if it goes on, and destroy it.

    Raises:
        PoolError: it is not ours, or the pool refused.
    """
    try:
        record = await caller.fetch("task.get_record", ref, type=Record)
        if read_task(record.name_description) is None:
            raise errors.PoolError(f"task {record.uuid} is left alone: it is not tagged by cbtfs")
        if record.status in _UNFINISHED:
            # whoever served it has lost its client long ago, so there is no end to wait for
            await Task(caller, ref, what=record.name_label).cancel()
        await caller.call("task.destroy", ref)
    except errors.XapiFailure as exc:
        if exc.code != "HANDLE_INVALID":
            raise


async def begin(caller: Caller, method: str, *args: object, what: str) -> Task:
    """Return the task that a call of ``method`` makes, to be destroyed by the caller.

    It cannot be cancelled: a task made and not known would be a leak.
    """
    ref = ""
    with trio.CancelScope(shield=True):
        ref = str(await caller.call(method, *args))
    return Task(caller, ref, what=what)


def unwrapped(result: str) -> str:
    """Return the value in a task's result: XML in a string, "" for nothing.

    Raises:
        PoolError: it is something else.
    """
    if not result.startswith("<"):
        return result
    if plain := _PLAIN.fullmatch(result):
        return plain[1] or plain[2] or ""
    text = f"<methodResponse><params><param>{result}</param></params></methodResponse>"
    try:
        (value,), _ = cast(tuple[tuple[object], str], xmlrpc.client.loads(text))
        return str(value)
    except wire.NOT_XML_RPC as exc:
        raise errors.PoolError("the result of a task is in no form that xapi uses") from exc
