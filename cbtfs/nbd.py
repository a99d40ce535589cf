"""NBD: connections to the exports of a pool, opened and closed in good order.

A connection is authenticated before it says anything (``anchor`` and ``channel``), read through
``export``, and ends when the host has detached the disk, or has had its time to.
"""

import logging
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import trio

from . import anchor, channel, errors, tls
from .export import Export, Part, verifies_names
from .nbdaddress import NbdAddress, Timeouts

__all__ = ["Export", "NbdAddress", "Part", "Timeouts", "open_export"]

logger = logging.getLogger(__name__)


class _UndecidedError(Exception):
    """libnbd could not get through to the host, be it for the certificate or not."""


@asynccontextmanager
async def open_export(
    address: NbdAddress, *, timeouts: Timeouts | None = None
) -> AsyncGenerator[Export]:
    """Connect to ``address`` and yield its export; on exit wait until the host closed it.

    Where libnbd can verify the host, it does TLS; what it refuses is tried once more through our
    own ``channel``, which knows more kinds of certificates and says what is wrong.

    Raises:
        AuthenticationFailed: the peer is not the host, or it does not do TLS; it was told nothing.
        ExportLost: nobody answers, or the host closed the connection.
        ExportError: the host speaks NBD, and refused.
    """
    async with AsyncExitStack() as stack:
        yield await _open(address, timeouts or Timeouts(), stack)


async def _open(address: NbdAddress, limits: Timeouts, stack: AsyncExitStack) -> Export:
    until = trio.current_time() + limits.connect
    if address.tls and verifies_names() and anchor.verifies(address.cert_pem, address.subject):
        try:
            with anchor.anchored(address.cert_pem) as directory:
                export = Export(address, timeouts=limits, anchored=directory)
                return await stack.enter_async_context(_connected(export, until))
        except _UndecidedError as exc:
            logger.debug("%s: libnbd: %s", address, exc)
    export = Export(address, timeouts=limits)
    return await stack.enter_async_context(_connected(export, until))


@asynccontextmanager
async def _connected(export: Export, until: float) -> AsyncGenerator[Export]:
    failure: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                await _connect(export, nursery, until)
                yield export
            except Exception as exc:  # carried out of the nursery, which would put it in a group
                failure = exc
            finally:
                await export.close()
    finally:
        export.forget()
    if failure is not None:
        raise failure


async def _connect(export: Export, nursery: trio.Nursery, until: float) -> None:
    address, limit = export.address, export.timeouts.connect
    try:
        with trio.fail_at(until):
            sock, abort = await _opened(export, nursery)
            nursery.start_soon(export.drive)
            await export.connect(sock, abort=abort)
    except trio.TooSlowError as exc:
        raise errors.ExportLost(f"{address} did not get ready within {limit:g} s") from exc
    except OSError as exc:
        raise errors.ExportLost(f"{address}: {tls.explain(exc)}") from exc
    except errors.ExportError as exc:
        if export.anchored:
            raise _UndecidedError(str(exc)) from exc
        raise


async def _opened(
    export: Export, nursery: trio.Nursery
) -> tuple[socket.socket, Callable[[], None]]:
    """Return a connected socket that has yet to say hello, and what drops its connection."""
    address = export.address
    if address.tls and not export.anchored:
        peer = await channel.open_channel(
            address.host, address.port, cert_pem=address.cert_pem, subject=address.subject
        )
        nursery.start_soon(peer.run)
        return peer.socket, peer.close
    stream = await tls.connect(address.host, address.port)
    sock = socket.socket(fileno=stream.socket.detach())
    twin = sock.dup()  # libnbd owns and closes the other
    return sock, lambda: _shut(twin)


def _shut(sock: socket.socket) -> None:
    with sock:
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # closed already
