"""One NBD export of a pool, read through libnbd and driven by trio."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class NbdAddress:
    """Where one VDI is exported, as ``VDI.get_nbd_info`` tells it.

    ``export_name`` is a credential (it contains the session), so neither it nor the certificate
    shows in ``repr``. ``tls`` follows the purpose of the network, never the answer of the host.
    """

    host: str
    port: int
    export_name: str = field(repr=False)
    cert_pem: str = field(default="", repr=False)
    subject: str = ""
    tls: bool = True


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long, in seconds, to wait for a host before its connection counts as lost."""

    connect: float = 60.0
    request: float = 60.0
    close: float = 30.0


class Export:
    """A readable export. Closed by the context manager that opened it."""

    size: int

    async def read_into(self, buffer: memoryview | bytearray, offset: int) -> None:
        """Fill ``buffer`` with the bytes at ``offset``; any offset and length within ``size``.

        Several calls may be under way at once. If cancelled, the buffer is not touched after.

        Raises:
            ExportLost: the connection is gone or the server is silent; a fresh one may work.
            ExportError: the range is outside the disk, or the server answered an error.
        """
        raise NotImplementedError

    async def pread(self, length: int, offset: int) -> bytes:
        """Return ``length`` bytes at ``offset``; as ``read_into``."""
        raise NotImplementedError


@asynccontextmanager
async def open_export(
    address: NbdAddress, *, timeouts: Timeouts | None = None
) -> AsyncIterator[Export]:
    """Connect to ``address`` and yield its export; on exit wait until the host closed it.

    Raises:
        AuthenticationFailed: the peer is not the host, or it does not do TLS; nothing was sent.
        ExportLost: nobody answers, or the host closed the connection.
    """
    raise NotImplementedError
    yield Export()
