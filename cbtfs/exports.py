"""NBD connections to a pool's disks: which host, how many, and why none.

A connection costs its host a plugged device and one of the 16 places of its xapi-nbd, which tells
nothing when it refuses: it just closes. So the places are counted here, the connections to one disk
are opened one after another (in parallel they race to VDI_IN_USE in the pool), and the reason of a
failure is looked up over XAPI.

Rules of this file:

1. ``get_nbd_info`` is asked before every connection: its export names die with their session.
2. TLS follows the purpose of the networks alone. ``nbd`` is never read without it.
3. A host that does not prove who it is ends the attempt; no other is tried in silence.
4. Export names are credentials: no record that holds one has it in its ``repr``.
"""

import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import msgspec
import trio

from . import errors, nbd
from .nbd import Export, NbdAddress, Timeouts
from .xapi import Session

logger = logging.getLogger(__name__)

PLACES = 16
"""Connections that one xapi-nbd serves (xen-api, ocaml/nbd/lib/consts.ml)."""

_ROUNDS = 5
_PAUSE = 1.0  # xapi-nbd frees a place after it has unplugged its device
_GRUDGE = 60.0  # seconds for which a host that failed comes last

_ALLOW_NBD = (
    "allow it on the network between the hosts and this machine: "
    "xe network-param-add uuid=NETWORK param-name=purpose param-key=nbd"
)


class _NbdInfo(msgspec.Struct, frozen=True, repr_omit_defaults=True):
    """A ``vdi_nbd_server_info``."""

    exportname: str
    address: str
    port: int
    cert: str = ""
    subject: str = ""

    def __repr__(self) -> str:
        return f"<{self.address}:{self.port}>"


class _Network(msgspec.Struct, frozen=True):
    purpose: tuple[str, ...] = ()


class _Pif(msgspec.Struct, frozen=True):
    host: str = ""
    IP: str = ""


class Exports:
    """The NBD connections of one pool.

    ``_places`` counts, per host, the connections open and being opened; a place is held until the
    host has ended the connection, as the host's own is.

    Args:
        session: asked for addresses, purposes and reasons.
        per_host: connections that we allow ourselves at each host.
        timeouts: for each connection.
    """

    def __init__(self, session: Session, *, per_host: int, timeouts: Timeouts) -> None:
        self._session = session
        self._timeouts = timeouts
        self._places: dict[str, trio.CapacityLimiter] = defaultdict(
            lambda: trio.CapacityLimiter(per_host)
        )
        self._gates: dict[str, trio.Lock] = defaultdict(trio.Lock)
        self._hosts: dict[str, str] = {}
        self._failed: dict[str, float] = {}
        self._open: dict[str, int] = defaultdict(int)

    def is_open(self, vdi_ref: str) -> bool:
        """Tell whether a connection to the disk is open or being opened here."""
        return self._open[vdi_ref] > 0

    @asynccontextmanager
    async def open(self, vdi_ref: str) -> AsyncGenerator[Export]:
        """Connect to a host that exports the disk; on exit that host has detached it.

        Raises:
            AuthenticationFailed: a host did not prove who it is.
            ExportLost: no host let us connect, although several attempts were made.
            ExportError: a host refused.
            PoolError: no host exports the disk; the text says what to do.
        """
        async with AsyncExitStack() as stack:
            self._open[vdi_ref] += 1
            stack.callback(self._left, vdi_ref)
            # in the pool, connections that plug one disk at the same time fail each other
            async with self._gates[vdi_ref]:
                export = await self._connected(vdi_ref, stack)
            try:
                yield export
            finally:
                if export.lost:  # the next connection had better be to another host
                    self._failed[self._key(export.address)] = trio.current_time()

    def _left(self, vdi_ref: str) -> None:
        self._open[vdi_ref] -= 1

    async def purpose(self) -> str:
        """Return ``nbd``, ``insecure_nbd``, or "" if no network of the pool serves NBD.

        One network with ``nbd`` makes every xapi-nbd of the pool insist on TLS.
        """
        networks = await self._session.fetch("network.get_all_records", type=dict[str, _Network])
        purposes = {purpose for network in networks.values() for purpose in network.purpose}
        return next((p for p in ("nbd", "insecure_nbd") if p in purposes), "")

    async def check(self) -> None:
        """Raise PoolError with the remedy if no network of the pool serves NBD."""
        if not await self.purpose():
            raise errors.PoolError(
                f"no network of the pool has the purpose nbd, so no disk can be read; {_ALLOW_NBD}"
            )

    # ── opening ──────────────────────────────────────────────────────────────────────────────────

    async def _connected(self, vdi_ref: str, stack: AsyncExitStack) -> Export:
        """Return an export that ``stack`` closes; tries every host, several times."""
        give_up = trio.current_time() + 2 * self._timeouts.connect
        last: errors.ExportError | None = None
        address: NbdAddress | None = None
        for attempt in range(_ROUNDS):
            if attempt:
                await trio.sleep(_PAUSE)
            for address in await self._addresses(vdi_ref):
                if last is not None and trio.current_time() >= give_up:
                    break
                try:
                    return await self._try(address, stack)
                except errors.ExportError as exc:
                    # nothing is copied meanwhile, which can take minutes: whoever waits is told
                    logger.warning("%s; trying again", exc)
                    last = exc
                    self._failed[self._key(address)] = trio.current_time()
        raise errors.ExportLost(
            f"{last or 'no host answers'}; {await self._advice(address)}"
        ) from last

    async def _try(self, address: NbdAddress, stack: AsyncExitStack) -> Export:
        async with AsyncExitStack() as attempt:
            places, holder = self._places[self._key(address)], object()
            await places.acquire_on_behalf_of(holder)
            attempt.callback(places.release_on_behalf_of, holder)
            opening = nbd.open_export(address, timeouts=self._timeouts)
            export = await attempt.enter_async_context(opening)
            stack.push_async_exit(attempt.pop_all())
        return export

    async def _addresses(self, vdi_ref: str) -> list[NbdAddress]:
        """Return where the disk is exported now, the host with the most places to spare first."""
        told = await self._session.fetch("VDI.get_nbd_info", vdi_ref, type=list[_NbdInfo])
        purpose = await self.purpose()
        # xapi-nbd listens on IPv4 only, and xapi lists IPv6 addresses with their prefix length
        infos = [info for info in told if ":" not in info.address and "/" not in info.address]
        if not infos or not purpose:
            raise errors.PoolError(await self._unreadable(vdi_ref, purpose))
        await self._know_hosts(info.address for info in infos)
        found = [
            NbdAddress(
                host=info.address,
                port=info.port,
                export_name=info.exportname,
                cert_pem=info.cert,
                subject=info.subject,
                tls=purpose != "insecure_nbd",
            )
            for info in infos
        ]
        return sorted(found, key=self._load)

    def _load(self, address: NbdAddress) -> tuple[bool, int]:
        key = self._key(address)
        places = self._places[key].statistics()
        bad = trio.current_time() - self._failed.get(key, -_GRUDGE) < _GRUDGE
        return bad, places.borrowed_tokens + places.tasks_waiting

    def _key(self, address: NbdAddress) -> str:
        return self._hosts.get(address.host, address.host)

    async def _know_hosts(self, addresses: Iterable[str]) -> None:
        """Learn which host has which address: several of one host share its places."""
        if all(address in self._hosts for address in addresses):
            return
        pifs = await self._session.fetch("PIF.get_all_records", type=dict[str, _Pif])
        self._hosts = {pif.IP: pif.host for pif in pifs.values() if pif.IP}

    # ── explaining ───────────────────────────────────────────────────────────────────────────────

    async def _unreadable(self, vdi_ref: str, purpose: str) -> str:
        """Return why no host exports the disk; xapi answers an empty list whatever it is."""
        if not purpose:
            return (
                f"no network of the pool has the purpose nbd, so no disk can be read; {_ALLOW_NBD}"
            )
        fetch = self._session.fetch
        sr = await fetch("VDI.get_SR", vdi_ref, type=str)
        pbds = await fetch("SR.get_PBDs", sr, type=list[str])
        attached = [await fetch("PBD.get_currently_attached", pbd, type=bool) for pbd in pbds]
        if not any(attached):
            name = await fetch("SR.get_name_label", sr, type=str)
            return f"no host has the SR {name!r} attached; plug one of its PBDs: xe pbd-plug"
        return (
            f"no host that has the disk has an IPv4 address on a network with the purpose {purpose};"
            " give its interface (PIF) there an address, and plug it"
        )

    async def _advice(self, address: NbdAddress | None) -> str:
        """Return what may explain a connection that was closed without a word."""
        host = self._hosts.get(address.host) if address else None
        if host is not None:
            with suppress(errors.PoolError):
                dom0 = await self._session.fetch("host.get_control_domain", host, type=str)
                used = len(await self._session.fetch("VM.get_VBDs", dom0, type=list[str]))
                if used >= PLACES:
                    return f"it has {used} disks attached, and serves {PLACES} over NBD at most"
        return "what xapi-nbd wrote to that host's log says why"
