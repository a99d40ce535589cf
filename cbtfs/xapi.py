"""A session with a pool's xapi: calls, tasks, bulk reads and HTTP handlers."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Trust:
    """Whom to believe: fingerprints if there are any, else a CA file, else the system's CAs."""

    ca_file: str = ""
    fingerprints: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user of the pool."""

    user: str
    password: str = field(repr=False)


class Session:
    """A logged-in session that survives expiry and a change of master."""

    ref: str

    async def call(self, method: str, *args: object) -> object:
        """Call ``method`` (``VDI.get_record``) and return its value.

        Raises:
            XapiFailure: xapi refused.
            AuthenticationFailed: login or certificate refused.
            PoolUnreachable: nobody answers.
        """
        raise NotImplementedError

    async def call_async(self, method: str, *args: object) -> str:
        """Run ``Async.<method>`` to its end and return its result; if cancelled, so is the task."""
        raise NotImplementedError

    async def tables(self, classes: Iterable[str]) -> dict[str, bytes]:
        """Return the JSON of ``<class>.get_all_records`` of each class."""
        raise NotImplementedError

    async def export_metadata(self, vm_uuid: str) -> bytes:
        """Return the tar that ``/export_metadata`` makes of a VM."""
        raise NotImplementedError


@asynccontextmanager
async def open_session(
    url: str, *, credentials: Credentials, trust: Trust, state_dir: str | None = None
) -> AsyncIterator[Session]:
    """Log in at ``url`` or the master it names, and yield the session; log out on exit."""
    raise NotImplementedError
    yield Session()
