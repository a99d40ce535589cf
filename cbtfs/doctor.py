"""Doctor: can this machine, this store and this pool do what is asked of them; if not, what helps.

Each check is one function that looks and changes nothing; what it finds is a ``Finding`` with the
remedy, a line that can be typed where there is one.
"""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nbd as libnbd  # only to ask its version; export.py alone works with it

from . import errors, image, mountpoint, units
from .inventory import SR, Inventory, read_owner

SLOTS = 16
"""Connections that xapi-nbd serves at a time on each host (xapi-nbd, main.ml)."""

ROOM = 0.1
"""Share of the store's file system below which free space is warned of."""

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        name: what was looked at.
        level: ``ok``; ``warn`` if things work but worse; ``fail`` if something cannot work.
        detail: what there is, one sentence.
        remedy: what to do about it; "" if nothing.
    """

    name: str
    level: Level
    detail: str
    remedy: str = ""


# ── This machine ─────────────────────────────────────────────────────────────────────────────


def machine() -> list[Finding]:
    """Look at this machine: FUSE, libnbd, programs, versions."""
    return [_versions(), _libnbd(), _fuse(), *_user_allow_other()]


def _versions() -> Finding:
    packages = ("cbtfs", "pyfuse3", "trio", "XenAPI")
    told = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return Finding("versions", "ok", ", ".join((f"Python {platform.python_version()}", *told)))


def _libnbd() -> Finding:
    version = libnbd.NBD().get_version()
    return Finding("libnbd", "ok", f"libnbd {version}; certificates are verified by cbtfs itself")


def _fuse() -> Finding:
    try:
        mountpoint.check_fuse()
    except errors.MountError as exc:
        what, _, remedy = str(exc).partition("; ")
        return Finding("FUSE", "fail", f"{what}: mount does not work, sync does", remedy)
    return Finding("FUSE", "ok", "/dev/fuse can be used")


def _user_allow_other() -> Iterator[Finding]:
    """Warn an ordinary user that root will not see into the mount."""
    if os.geteuid() == 0:
        return
    try:
        allowed = "user_allow_other" in Path("/etc/fuse.conf").read_text(encoding="utf-8").split()
    except OSError:
        allowed = False
    if not allowed:
        yield Finding(
            "FUSE for others",
            "warn",
            "only you can look into your mounts, not even root (losetup and mount need root)",
            "echo user_allow_other | sudo tee -a /etc/fuse.conf; then mount with -o allow_other",
        )


# ── The store ────────────────────────────────────────────────────────────────────────────────


def store(path: Path) -> list[Finding]:
    """Look at the directory of a store, or at where it would be made."""
    place = next((p for p in (path, *path.parents) if p.is_dir()), Path("/"))
    if os.statvfs(place).f_flag & os.ST_RDONLY:
        detail = f"{place} is on a file system that is mounted read-only"
        remedy = f"sudo mount -o remount,rw {_mount_point(place)}; if that fails, see dmesg"
        return [Finding("store", "fail", detail, remedy)]
    if not os.access(place, os.W_OK | os.X_OK):
        return [
            Finding(
                "store", "fail", f"{place} cannot be written to by you", f"sudo chown $USER {place}"
            )
        ]
    state = "a store" if (path / "cbtfs.json").exists() else "no store yet; the first sync makes it"
    return [Finding("store", "ok", f"{path}: {state}"), _reflinks(place), _room(place)]


def _mount_point(place: Path) -> Path:
    """Return where the file system of ``place`` is mounted."""
    resolved = place.resolve()
    return next(path for path in (resolved, *resolved.parents) if path.is_mount())


def _reflinks(place: Path) -> Finding:
    try:
        supported = image.reflink_supported(place)
    except errors.StoreError as exc:
        return Finding("reflinks", "fail", str(exc))
    if supported:
        return Finding("reflinks", "ok", "unchanged blocks are shared between restore points")
    return Finding(
        "reflinks",
        "warn",
        "this file system cannot share blocks: every restore point is written, and takes space, in"
        " full, although only changes are read from the pool",
        "put the store on XFS (mkfs.xfs has reflink=1 by default) or btrfs",
    )


def _room(place: Path) -> Finding:
    usage = shutil.disk_usage(place)
    detail = f"{units.format_size(usage.free)} of {units.format_size(usage.total)} are free"
    if usage.free >= ROOM * usage.total:
        return Finding("free space", "ok", detail)
    return Finding("free space", "warn", detail, "enlarge the file system or remove restore points")


# ── The pool ─────────────────────────────────────────────────────────────────────────────────


def pool(inventory: Inventory) -> list[Finding]:
    """Look at a pool through its inventory."""
    return [
        _nbd(inventory),
        *_slots(inventory),
        *[_tracking(inventory, sr) for sr in _storages(inventory)],
        _unreadable(inventory),
        _ours(inventory),
    ]


def _nbd(inventory: Inventory) -> Finding:
    if inventory.nbd_purpose == "nbd":
        names = [n.name for n in inventory.networks.values() if "nbd" in n.purpose]
        return Finding("NBD", "ok", f"served with TLS on: {', '.join(sorted(names))}")
    remedy = "xe network-param-add param-name=purpose param-key=nbd uuid=NETWORK"
    if inventory.nbd_purpose == "insecure_nbd":
        return Finding(
            "NBD", "fail", "served without TLS only: anybody on that network can read along", remedy
        )
    return Finding("NBD", "fail", "no network serves NBD, so no disk can be read", remedy)


def _slots(inventory: Inventory) -> Iterator[Finding]:
    """Count the connections of each host by the VBDs that its control domain holds."""
    held: dict[str, int] = {}
    for vbd in inventory.vbds.values():
        vm = inventory.vms.get(vbd.vm_ref)
        if vm is not None and vm.is_control_domain and vbd.currently_attached:
            held[vm.resident_on] = held.get(vm.resident_on, 0) + 1
    for host in sorted(inventory.hosts.values(), key=lambda host: host.name):
        free = max(0, SLOTS - held.get(host.ref, 0))
        detail = f"about {free} of {SLOTS} NBD connections are free"
        if free:
            yield Finding(f"host {host.name}", "ok", detail)
        else:
            yield Finding(
                f"host {host.name}", "warn", detail, "wait, or stop other backup programs"
            )


def _storages(inventory: Inventory) -> list[SR]:
    """Return the SRs that hold disks worth a backup, by name."""
    used = {vdi.sr_ref for vdi in inventory.live_disks() if not inventory.is_cd_image(vdi)}
    return sorted((sr for sr in inventory.srs.values() if sr.ref in used), key=lambda sr: sr.name)


def _tracking(inventory: Inventory, sr: SR) -> Finding:
    disks = [vdi for vdi in inventory.live_disks() if vdi.sr_ref == sr.ref]
    on = sum(vdi.cbt_enabled for vdi in disks)
    name = f"SR {sr.name}"
    if not sr.host_refs:
        return Finding(name, "warn", "no host has it attached", f"xe pbd-plug (SR {sr.uuid})")
    if not sr.cbt_capable:
        detail = f"type {sr.type} cannot track changes: all of its {len(disks)} disks is read by each sync"
        return Finding(name, "warn", detail, "move disks to an SR with CBT, or accept the reading")
    detail = f"type {sr.type} tracks changes, on for {on} of {len(disks)} disks"
    return Finding(name, "ok", f"{detail} (sync turns it on)" if on < len(disks) else detail)


def _unreadable(inventory: Inventory) -> Finding:
    if not inventory.problems:
        return Finding("inventory", "ok", f"{len(inventory.vdis)} VDIs, {len(inventory.vms)} VMs")
    detail = f"{len(inventory.problems)} records left out, the first: {inventory.problems[0]}"
    return Finding("inventory", "warn", detail)


def _ours(inventory: Inventory) -> Finding:
    owned = [read_owner(vdi.other_config, vdi.uuid) for vdi in inventory.vdis.values()]
    roles = [owner.role for owner in owned if owner is not None]
    detail = (
        f"{roles.count('base')} snapshots kept as bases of increments,"
        f" {roles.count('live')} temporary ones of mounts"
    )
    return Finding("of ours", "ok", detail)
