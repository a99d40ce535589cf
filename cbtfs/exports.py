"""NBD connections to a pool's disks: which host, how many, and why none.

A connection costs its host a plugged device and one of the 16 places of its xapi-nbd, which tells
nothing when it refuses: it just closes. So each connection needs a place first (``places``), the
connections to one disk are opened one after another (in parallel they race to VDI_IN_USE in the
pool), and the reason of a failure is looked up over XAPI.

Rules of this file:

1. ``get_nbd_info`` is asked before every connection, and again if a place had to be waited for: its
   export names die with their session.
2. TLS follows the purpose of the networks alone. ``nbd`` is never read without it.
3. A host that does not prove who it is ends the attempt; no other is tried in silence.
4. Export names are credentials: no record that holds one has it in its ``repr``.
"""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import msgspec
import trio

from . import errors, nbd
from .nbd import Export, NbdAddress, Timeouts
from .places import Places
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
    """A ``vdi_nbd_server_info``; NBD has no longer names, nor any with a null character."""

    exportname: Annotated[str, msgspec.Meta(max_length=1024, pattern=r"^[^\x00]*$")]
    address: str
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    cert: str = ""
    subject: str = ""

    def __repr__(self) -> str:
        return f"<{self.address}:{self.port}>"


class _Network(msgspec.Struct, frozen=True):
    purpose: tuple[str, ...] = ()


class _Pif(msgspec.Struct, frozen=True):
    host: str = ""
    IP: str = ""


class _HostRecord(msgspec.Struct, frozen=True):
    uuid: str


class _Host(NamedTuple):
    ref: str
    uuid: str


@dataclass(slots=True)
class _Search:
    """A connection wanted: the addresses tried in this round, and the last one and its error.

    ``patience`` is for attempts, in seconds; waiting for a place does not count.
    """

    vdi_ref: str
    patience: float
    tried: set[str] = field(default_factory=set[str])
    address: NbdAddress | None = None
    error: errors.ExportError | None = None


class Exports:
    """The NBD connections of one pool.

    ``_gates`` and ``_open`` know the disks that a connection is open to, or wanted.

    Args:
        session: asked for addresses, purposes and reasons.
        per_host: connections to each host that we and other processes here may have.
        timeouts: for each connection.
    """

    def __init__(self, session: Session, *, per_host: int, timeouts: Timeouts) -> None:
        self._session = session
        self._timeouts = timeouts
        self._places = Places(per_host)
        self._told_at: dict[str, float] = {}
        self._gates: dict[str, trio.Lock] = defaultdict(trio.Lock)
        self._open: Counter[str] = Counter()
        self._hosts: dict[str, _Host] = {}
        self._failed: dict[str, float] = {}

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
        if not self._open[vdi_ref]:  # a mount sees any number of disks in its life
            del self._open[vdi_ref]
            self._gates.pop(vdi_ref, None)

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
        search = _Search(vdi_ref, patience=2 * self._timeouts.connect)
        for attempt in range(_ROUNDS):
            if attempt:
                await trio.sleep(_PAUSE)
            search.tried.clear()
            export = await self._round(search, stack)
            if export is not None:
                return export
            if search.patience <= 0:
                break
        raise errors.ExportLost(
            f"{search.error or 'no host answers'}; {await self._advice(search.address)}"
        ) from search.error

    async def _round(self, search: "_Search", stack: AsyncExitStack) -> Export | None:
        """Try every host once; return the export, None if each failed or patience ran out."""
        while search.patience > 0:
            async with AsyncExitStack() as attempt:
                address = await self._placed(search, attempt)
                if address is None:
                    return None
                export = await self._try(search, address, attempt)
                if export is not None:
                    stack.push_async_exit(attempt.pop_all())
                    return export
        return None

    async def _try(
        self, search: "_Search", address: NbdAddress, stack: AsyncExitStack
    ) -> Export | None:
        search.address = address
        search.tried.add(str(address))
        begun = trio.current_time()
        try:
            opening = nbd.open_export(address, timeouts=self._timeouts)
            return await stack.enter_async_context(opening)
        except errors.ExportError as exc:
            self._tell(f"{exc}; trying again")
            search.error = exc
            search.patience -= trio.current_time() - begun
            self._failed[self._key(address)] = trio.current_time()
            return None

    def _tell(self, text: str) -> None:
        """Warn, for nothing is copied meanwhile, which can take minutes; but once for all disks."""
        now = trio.current_time()
        fresh = now - self._told_at.get(text, -math.inf) >= _GRUDGE
        logger.log(logging.WARNING if fresh else logging.INFO, "%s", text)
        if fresh:
            self._told_at[text] = now

    async def _placed(self, search: "_Search", stack: AsyncExitStack) -> NbdAddress | None:
        """Return where to connect next, with a place there that ``stack`` gives back.

        None if all addresses have been tried.
        """
        while addresses := await self._untried(search):
            hosts = {self._key(address): str(address) for address in addresses}
            bad = [host for host in hosts if self._is_bad(host)]
            async with AsyncExitStack() as attempt:
                holding = self._places.held(hosts, last=bad)
                place = await attempt.enter_async_context(holding)
                if place.waited:  # the export names may have died with their session
                    addresses = await self._untried(search)
                here = [address for address in addresses if self._key(address) == place.host]
                if here:
                    stack.push_async_exit(attempt.pop_all())
                    return here[0]
        return None

    async def _untried(self, search: "_Search") -> list[NbdAddress]:
        addresses = await self._addresses(search.vdi_ref)
        return [address for address in addresses if str(address) not in search.tried]

    async def _addresses(self, vdi_ref: str) -> list[NbdAddress]:
        """Return where the disk is exported now."""
        told = await self._session.fetch("VDI.get_nbd_info", vdi_ref, type=list[_NbdInfo])
        purpose = await self.purpose()
        # xapi-nbd listens on IPv4 only, and xapi lists IPv6 addresses with their prefix length
        infos = [info for info in told if ":" not in info.address and "/" not in info.address]
        if not infos or not purpose:
            raise errors.PoolError(await self._unreadable(vdi_ref, purpose))
        await self._know_hosts(info.address for info in infos)
        return [
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

    def _is_bad(self, host: str) -> bool:
        return trio.current_time() - self._failed.get(host, -math.inf) < _GRUDGE

    def _key(self, address: NbdAddress) -> str:
        """Return what names the xapi-nbd at ``address`` on this machine, whoever asks."""
        host = self._hosts.get(address.host)
        return f"{host.uuid if host else address.host}:{address.port}"

    async def _know_hosts(self, addresses: Iterable[str]) -> None:
        """Learn which host has which address: several of one host share its places."""
        if all(address in self._hosts for address in addresses):
            return
        fetch = self._session.fetch
        pifs = await fetch("PIF.get_all_records", type=dict[str, _Pif])
        hosts = await fetch("host.get_all_records", type=dict[str, _HostRecord])
        self._hosts = {
            pif.IP: _Host(pif.host, hosts[pif.host].uuid)
            for pif in pifs.values()
            if pif.IP and pif.host in hosts
        }

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
                dom0 = await self._session.fetch("host.get_control_domain", host.ref, type=str)
                used = len(await self._session.fetch("VM.get_VBDs", dom0, type=list[str]))
                if used >= PLACES:
                    return f"it has {used} disks attached, and serves {PLACES} over NBD at most"
        return "what xapi-nbd wrote to that host's log says why"
