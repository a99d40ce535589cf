"""Conversion: one record of xapi's becomes one of ours, on its own.

A null reference becomes "", a time that is none ``EPOCH``, a size has 63 bits, and a device name is
safe as a file name. Uuids are not checked here: whether one is the only one of its kind takes all
records, see ``inventory``.
"""

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from . import rawrecords
from .records import EPOCH, PIF, SR, VBD, VDI, VM, Host, Network, Pool

_LARGEST = (1 << 63) - 1
"""Bytes of a file at most (linux, loff_t)."""

_DEVICE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")


def pool(raw: rawrecords.PoolRecord) -> Pool:
    """Return the pool."""
    return Pool(
        uuid=raw.uuid,
        name=raw.name_label,
        master_ref=_reference(raw.master),
        restrictions=raw.restrictions,
    )


def attached_hosts(
    pbds: Iterable[rawrecords.PBDRecord], hosts: Mapping[str, object]
) -> dict[str, tuple[str, ...]]:
    """Return by SR which of ``hosts`` have it attached."""
    found: dict[str, set[str]] = {}
    for pbd in pbds:
        if pbd.currently_attached and pbd.host in hosts:
            found.setdefault(pbd.SR, set()).add(pbd.host)
    return {ref: tuple(sorted(refs)) for ref, refs in found.items()}


def tracking_types(drivers: Iterable[rawrecords.SMRecord]) -> frozenset[str]:
    """Return the SR types whose driver tracks changed blocks.

    An SR's ``allowed_operations`` would say it too, but is empty while another operation runs.
    """
    return frozenset(sm.type for sm in drivers if "VDI_CONFIG_CBT" in sm.features)


def host(ref: str, raw: rawrecords.HostRecord) -> Host:
    """Return a host."""
    return Host(
        ref=ref,
        uuid=raw.uuid.lower(),
        name=raw.name_label,
        address=raw.address,
        hostname=raw.hostname,
        enabled=raw.enabled,
    )


def sr(
    ref: str,
    raw: rawrecords.SRRecord,
    attached: Mapping[str, tuple[str, ...]],
    tracking: frozenset[str],
) -> SR:
    """Return an SR.

    Args:
        ref: its reference.
        raw: its record.
        attached: the hosts that have it attached, by its reference.
        tracking: the SR types that track changed blocks.
    """
    return SR(
        ref=ref,
        uuid=raw.uuid.lower(),
        name=raw.name_label,
        type=raw.type,
        shared=raw.shared,
        content_type=raw.content_type,
        allowed_operations=raw.allowed_operations,
        physical_size=_size(raw.physical_size),
        physical_utilisation=_size(raw.physical_utilisation),
        host_refs=attached.get(ref, ()),
        cbt_capable=raw.type in tracking,
    )


def vm(ref: str, raw: rawrecords.VMRecord) -> VM:
    """Return a VM, template or VM snapshot."""
    return VM(
        ref=ref,
        uuid=raw.uuid.lower(),
        name=raw.name_label,
        power_state=raw.power_state,
        is_a_template=raw.is_a_template,
        is_a_snapshot=raw.is_a_snapshot,
        is_control_domain=raw.is_control_domain,
        snapshot_of=_reference(raw.snapshot_of),
        snapshot_time=_time(raw.snapshot_time),
        vbd_refs=raw.VBDs,
        tags=raw.tags,
        other_config=raw.other_config,
        blocked_operations=raw.blocked_operations,
        resident_on=_reference(raw.resident_on),
    )


def vbd(ref: str, raw: rawrecords.VBDRecord) -> VBD:
    """Return a VBD."""
    return VBD(
        ref=ref,
        uuid=raw.uuid.lower(),
        vm_ref=_reference(raw.VM),
        vdi_ref=_reference(raw.VDI),
        device=_device(raw),
        userdevice=raw.userdevice,
        type=raw.type,
        mode=raw.mode,
        currently_attached=raw.currently_attached,
        empty=raw.empty,
    )


def vdi(ref: str, raw: rawrecords.VDIRecord) -> VDI:
    """Return a VDI."""
    return VDI(
        ref=ref,
        uuid=raw.uuid.lower(),
        name=raw.name_label,
        description=raw.name_description,
        sr_ref=_reference(raw.SR),
        size=_size(raw.virtual_size),
        used=_size(raw.physical_utilisation),
        type=raw.type,
        managed=raw.managed,
        missing=raw.missing,
        is_a_snapshot=raw.is_a_snapshot,
        snapshot_of=_reference(raw.snapshot_of),
        snapshot_time=_time(raw.snapshot_time),
        cbt_enabled=raw.cbt_enabled,
        read_only=raw.read_only,
        sharable=raw.sharable,
        on_boot=raw.on_boot,
        vbd_refs=raw.VBDs,
        other_config=raw.other_config,
        tags=raw.tags,
        allowed_operations=raw.allowed_operations,
        is_tools_iso=raw.is_tools_iso,
        location=raw.location,
        sm_config=raw.sm_config,
    )


def network(ref: str, raw: rawrecords.NetworkRecord) -> Network:
    """Return a network."""
    return Network(ref=ref, name=raw.name_label, purpose=raw.purpose)


def pif(ref: str, raw: rawrecords.PIFRecord) -> PIF:
    """Return a network interface."""
    return PIF(
        ref=ref,
        network_ref=_reference(raw.network),
        host_ref=_reference(raw.host),
        ip=raw.IP,
        currently_attached=raw.currently_attached,
    )


def _reference(ref: str) -> str:
    return "" if ref == "OpaqueRef:NULL" else ref


def _size(size: int) -> int:
    """Return a size that a file can have: one out of that range would hide its whole folder."""
    return min(max(0, size), _LARGEST)


def _time(text: str) -> datetime:
    """Return xapi's ``20261122T020000Z`` as a time; ``EPOCH`` for what is none."""
    try:
        when = datetime.fromisoformat(text)
        return when.astimezone(UTC) if when.tzinfo else when.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return EPOCH


def _device(raw: rawrecords.VBDRecord) -> str:
    """Return the disk's name in its VM: ``xvda`` for number 0, ``xvdaa`` for number 26.

    xapi fills ``device`` when the disk is plugged, so that of a VM that never ran has only its
    number.
    """
    if _DEVICE.fullmatch(raw.device):
        return raw.device
    if re.fullmatch(r"[0-9]{1,4}", raw.userdevice):
        number, letters = int(raw.userdevice) + 1, ""
        while number:
            number, last = divmod(number - 1, 26)
            letters = chr(ord("a") + last) + letters
        return f"xvd{letters}"
    if _DEVICE.fullmatch(raw.userdevice):
        return raw.userdevice
    return "disk"
