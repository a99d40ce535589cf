"""Events: what changes in a pool, asked of xapi (``event.from``), which answers when there is some.

A token says up to where everything is known. It is void for another xapi: after a failover or a
restart it may be refused, but it may also be taken for one of its own. So with every new login,
whatever the reason, everything is asked for anew.
"""

import msgspec

from . import errors
from .inventory import CLASSES
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
        while True:
            login = self._session.generation
            complete = not self._token or login != self._login
            try:
                answer = await self._ask("" if complete else self._token)
            except errors.XapiFailure as exc:
                if complete or exc.code != "EVENT_FROM_TOKEN_PARSE_FAILURE":
                    raise
                self._token = ""
                continue
            if complete or login == self._session.generation:
                break
        self._token, self._login = answer.token, login
        found = [Event(e.kind, e.operation, e.ref, memoryview(e.snapshot)) for e in answer.events]
        return Batch(found, complete=complete, counts=answer.valid_ref_counts)

    async def _ask(self, token: str) -> _Answer:
        classes = [name.lower() for name in CLASSES]
        return await self._session.fetch("event.from", classes, token, WAIT, type=_Answer)
