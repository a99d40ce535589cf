"""Events: what changes in a pool, asked of xapi (``event.from``), which answers when there is some.

A token says up to where everything is known. It is void for another xapi: after a failover or a
restart it may be refused, but it may also be taken for one of its own. So with every new login,
whatever the reason, everything is read anew.

xapi would tell everything as events, too, in one answer that takes three times the memory. So a
token comes first, of the class that our own login has just changed, then the records class by
class; what changes meanwhile comes after that token.
"""

from collections.abc import Mapping, Sequence

import msgspec
import trio

from . import errors, rawrecords
from .inventory import CLASSES
from .rawrecords import Record
from .replica import Batch, Event
from .xapi import Session

WAIT = 30.0
"""Seconds after which xapi answers although nothing has happened: half of what a session takes for
silence."""


class _Event(msgspec.Struct, frozen=True):
    ref: str
    operation: str
    kind: str = msgspec.field(name="class")
    snapshot: msgspec.Raw = msgspec.Raw(b"")


class _Answer(msgspec.Struct, frozen=True):
    events: list[_Event]
    token: str
    valid_ref_counts: dict[str, int] = {}


class Feed:
    """The events of a pool, of the classes that an inventory needs; for one task."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._token = ""
        self._login = 0

    def __repr__(self) -> str:
        return f"<Feed after {self._token or 'nothing'}>"

    def start_over(self) -> None:
        """Make the next batch a complete one."""
        self._token = ""

    async def next(self) -> Batch:
        """Wait for something to happen, and return it; after ``WAIT`` seconds it is nothing.

        The first batch is complete and comes at once, as does any after which the pool may be
        another.

        Raises:
            PoolUnreachable: nobody answers; the next call goes on where this one was.
            AuthenticationFailed: login or certificate refused.
            PoolError: xapi refused, or its answer is not understood.
        """
        batch: Batch | None = None
        while batch is None:
            login = self._session.generation
            if self._token and login == self._login:
                batch = await self._events()
            else:
                token = (await self._ask(["session"], "")).token
                batch = Batch([], tables=await self._tables())
                self._token = token
            if login != self._session.generation:  # it may be another xapi since
                self._token, batch = "", None
            self._login = login
        return batch

    async def _events(self) -> Batch | None:
        """Return what has happened, or None if the token is refused."""
        try:
            answer = await self._ask([name.lower() for name in CLASSES], self._token)
        except errors.XapiFailure as exc:
            if exc.code != "EVENT_FROM_TOKEN_PARSE_FAILURE":
                raise
            self._token = ""
            return None
        self._token = answer.token
        found = [Event(e.kind, e.operation, e.ref, memoryview(e.snapshot)) for e in answer.events]
        return Batch(found, counts=answer.valid_ref_counts)

    async def _tables(self) -> dict[str, Mapping[str, Record]]:
        found: dict[str, Mapping[str, Record]] = {}
        for name in CLASSES:
            raw = await self._session.tables([name])
            found[name] = await trio.to_thread.run_sync(rawrecords.READERS[name], raw.pop(name))
        return found

    async def _ask(self, classes: Sequence[str], token: str) -> _Answer:
        return await self._session.fetch("event.from", classes, token, WAIT, type=_Answer)
