"""Tree: every name and inode number of the mount, made from an inventory and a catalogue.

::

    README.txt  pool.json
    by-uuid/    UUID.raw  UUID.json                        the files; every link points here
    by-vm/      web1/  vm.json  xvda.raw -> …
                       snapshots/ 20261122T020000Z~nightly/ xvda.raw -> …   latest -> …
    by-name/    root disk.raw -> …                         disks, but not their snapshots
    by-sr/      Local storage/ root disk.raw -> …          the same
    backups/    web1/ 20261122T020000Z -> STORE/…   latest -> …

Rules of this file:

1. A tree never changes; a changed pool gets a new one.
2. An inode number is a hash of uuids, not of names, so that it survives renames and remounts.
3. What cannot be read has no file: unmanaged and missing VDIs, ``cbt_metadata``, suspend images,
   and the temporary snapshots that live disks are read through.
4. Names from the pool become file names only through ``names.safe_names``.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Literal

import msgspec

from . import catalogue, errors, inventory as inventories
from .catalogue import Catalogue
from .inventory import VDI, VM, Disk, Inventory
from .names import NAME_MAX, safe_names

__all__ = ["README", "ROOT", "Node", "Tree", "build", "is_shown", "safe_names"]

ROOT = 1
"""Inode number of the mount point, as FUSE has it."""

README = b"""\
This is a pool of virtual machines, mounted read-only by cbtfs.

by-uuid/   every disk and snapshot as a raw image, UUID.raw, and what the pool says of it, UUID.json
by-vm/     the disks of each VM by device, and under snapshots/ those of its snapshots
by-name/   disks by their names
by-sr/     disks by storage repository and name
backups/   the restore points of the store, if one was given

A snapshot never changes. A disk that is not a snapshot is read as it was at the first read after
opening it; that takes a temporary snapshot, which goes away by itself. Copy sparsely:

    cp --sparse=always by-vm/VM/snapshots/latest/xvda.raw /somewhere

A name with ~ and eight hex digits at its end belongs to several things of the pool, or could not be
a file name as it was; the digits are from the uuid.
"""

# ── Nodes ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A file, folder or link of the mount.

    Attributes:
        parent: inode number of the folder it is in; that of the root is its own.
        target: where a link points.
        vdi_ref: the VDI whose contents a file shows, "" for a text file.
        content: what a text file holds.
        size: in bytes; of a link the length of its target.
        blocks: space that it takes, in units of 512 bytes. Never 0 unless ``size`` is: ``tar -S``
            takes a file without blocks for one hole, and reads nothing.
    """

    inode: int
    kind: Literal["dir", "file", "link"]
    name: str
    parent: int
    target: str = ""
    vdi_ref: str = ""
    content: bytes = b""
    size: int = 0
    blocks: int = 0
    mtime_ns: int = 0
    nlink: int = 1


class Tree:
    """The names of the mount at one moment; built by ``build``."""

    def __init__(self, nodes: Mapping[int, Node], names: Mapping[int, Mapping[str, int]]) -> None:
        self._nodes = nodes
        self._names = names
        self._children = {
            inode: tuple(nodes[child] for _, child in sorted(entries.items()))
            for inode, entries in names.items()
        }

    def __len__(self) -> int:
        return len(self._nodes)

    def __repr__(self) -> str:
        return f"<Tree of {len(self)} nodes>"

    def node(self, inode: int) -> Node:
        """Return the node with this inode number.

        Raises:
            NotFound: there is none (any more).
        """
        node = self._nodes.get(inode)
        if node is None:
            raise errors.NotFound(f"the mount has no inode {inode}")
        return node

    def lookup(self, parent: int, name: bytes | str) -> Node | None:
        """Return the node called ``name`` in the folder ``parent``, or None."""
        try:
            text = name if isinstance(name, str) else name.decode()
        except UnicodeDecodeError:
            return None
        inode = self._names.get(parent, {}).get(text)
        return None if inode is None else self._nodes[inode]

    def children(self, inode: int) -> Sequence[Node]:
        """Return what the folder ``inode`` holds, by name; nothing for what is no folder."""
        return self._children.get(inode, ())


class _Builder:
    """A tree under construction. ``identity`` is a path of uuids that names a node for ever."""

    def __init__(self, now_ns: int) -> None:
        self.now_ns = now_ns
        root = Node(inode=ROOT, kind="dir", name="", parent=ROOT, mtime_ns=now_ns, nlink=2)
        self._nodes = {ROOT: root}
        self._names: dict[int, dict[str, int]] = {ROOT: {}}

    def folder(self, parent: int, name: str, identity: str, *, mtime_ns: int = -1) -> int:
        """Add a folder and return its inode number."""
        inode = self._number(identity)
        mtime_ns = self.now_ns if mtime_ns < 0 else mtime_ns
        self._add(
            Node(inode=inode, kind="dir", name=name, parent=parent, mtime_ns=mtime_ns, nlink=2)
        )
        self._names[inode] = {}
        above = self._nodes[parent]
        self._nodes[parent] = replace(above, nlink=above.nlink + 1)
        return inode

    def link(self, parent: int, name: str, identity: str, *, target: str) -> None:
        """Add a symbolic link."""
        self._add(
            Node(
                inode=self._number(identity),
                kind="link",
                name=name,
                parent=parent,
                target=target,
                size=len(target.encode(errors="surrogateescape")),
                mtime_ns=self.now_ns,
            )
        )

    def text(self, parent: int, name: str, identity: str, *, content: bytes) -> None:
        """Add a small text file."""
        self._add(
            Node(
                inode=self._number(identity),
                kind="file",
                name=name,
                parent=parent,
                content=content,
                size=len(content),
                blocks=-(-len(content) // 512),
                mtime_ns=self.now_ns,
            )
        )

    def image(self, parent: int, name: str, identity: str, *, vdi: VDI) -> None:
        """Add the file that shows the contents of ``vdi``."""
        self._add(
            Node(
                inode=self._number(identity),
                kind="file",
                name=name,
                parent=parent,
                vdi_ref=vdi.ref,
                size=vdi.size,
                blocks=max(-(-vdi.used // 512), min(vdi.size, 1)),
                mtime_ns=_ns(vdi.snapshot_time) if vdi.is_a_snapshot else self.now_ns,
            )
        )

    def finish(self) -> Tree:
        """Return the tree."""
        return Tree(self._nodes, self._names)

    def _add(self, node: Node) -> None:
        self._nodes[node.inode] = node
        self._names[node.parent][node.name] = node.inode

    def _number(self, identity: str) -> int:
        """Return the inode number of ``identity``: 63 bits of a hash, the next free one if taken.

        0 is no inode number, 1 is the root, and tools that take them for signed must not see
        negative ones.
        """
        inode = int.from_bytes(_digest(identity)) >> 1
        while inode <= ROOT or inode in self._nodes:
            inode = (inode + 1) % (1 << 63)
        return inode


def _digest(identity: str) -> bytes:
    return blake2b(identity.encode(errors="surrogatepass"), digest_size=8).digest()


# ── Building ─────────────────────────────────────────────────────────────────────────────────


def build(
    inventory: Inventory, *, backups: Catalogue | None, store_path: str, now: datetime
) -> Tree:
    """Return the tree of a pool.

    Args:
        inventory: what the pool has.
        backups: the restore points of a store; None leaves ``backups/`` out.
        store_path: absolute path of that store.
        now: modification time of whatever is no snapshot.
    """
    builder = _Builder(_ns(now))
    shown = [vdi for vdi in inventory.vdis.values() if is_shown(vdi)]
    builder.text(ROOT, "README.txt", "README.txt", content=README)
    builder.text(ROOT, "pool.json", "pool.json", content=_pool_document(inventory, shown))
    _add_files(builder, inventory, shown)
    disks = [vdi for vdi in shown if not vdi.is_a_snapshot]
    _add_names(builder, disks, builder.folder(ROOT, "by-name", "by-name"), "by-name", up="..")
    _add_srs(builder, inventory, disks)
    vms = builder.folder(ROOT, "by-vm", "by-vm")
    live = inventory.live_vms()
    names = safe_names([(vm.uuid, vm.name) for vm in live])
    for vm in live:
        _add_vm(builder, inventory, vm, builder.folder(vms, names[vm.uuid], f"by-vm/{vm.uuid}"))
    if backups is not None:
        _add_backups(builder, backups, store_path)
    return builder.finish()


def is_shown(vdi: VDI) -> bool:
    """Tell whether ``vdi`` has a file in the mount: it can be read, and is no tool of our own."""
    if not vdi.is_readable:
        return False
    owned = inventories.read_owner(vdi.other_config, vdi.uuid)
    return owned is None or owned.role != "live"


def _add_files(builder: _Builder, inventory: Inventory, shown: Sequence[VDI]) -> None:
    folder = builder.folder(ROOT, "by-uuid", "by-uuid")
    for vdi in shown:
        raw, described = f"{vdi.uuid}.raw", f"{vdi.uuid}.json"
        document = _vdi_document(inventory, vdi)
        builder.image(folder, raw, f"by-uuid/{raw}", vdi=vdi)
        builder.text(folder, described, f"by-uuid/{described}", content=document)


def _add_names(
    builder: _Builder, disks: Sequence[VDI], folder: int, identity: str, *, up: str
) -> None:
    """Add a link by name for each of ``disks`` to ``folder``."""
    names = safe_names([(v.uuid, v.name) for v in disks], limit=NAME_MAX - len(".raw"))
    for vdi in disks:
        builder.link(
            folder,
            f"{names[vdi.uuid]}.raw",
            f"{identity}/{vdi.uuid}",
            target=f"{up}/by-uuid/{vdi.uuid}.raw",
        )


def _add_srs(builder: _Builder, inventory: Inventory, disks: Sequence[VDI]) -> None:
    top = builder.folder(ROOT, "by-sr", "by-sr")
    held: dict[str, list[VDI]] = {}
    for vdi in disks:
        held.setdefault(vdi.sr_ref, []).append(vdi)
    srs = [sr for sr in inventory.srs.values() if sr.ref in held]
    names = safe_names([(sr.uuid, sr.name) for sr in srs])
    for sr in srs:
        identity = f"by-sr/{sr.uuid}"
        folder = builder.folder(top, names[sr.uuid], identity)
        _add_names(builder, held[sr.ref], folder, identity, up="../..")


def _add_vm(builder: _Builder, inventory: Inventory, vm: VM, folder: int) -> None:
    identity = f"by-vm/{vm.uuid}"
    disks = [disk for disk in inventory.disks_of(vm) if is_shown(disk.vdi)]
    snapshots = inventory.vm_snapshots_of(vm)
    stamped = [(s.uuid, f"{_stamp(s.snapshot_time)}~{s.name or s.uuid[:8]}") for s in snapshots]
    names = safe_names(stamped)
    _add_disks(builder, disks, folder, identity, up="../..")
    builder.text(
        folder,
        "vm.json",
        f"{identity}/vm.json",
        content=_vm_document(vm, disks, snapshots, names),
    )
    top = builder.folder(folder, "snapshots", f"{identity}/snapshots")
    for snapshot in snapshots:
        name, path = names[snapshot.uuid], f"{identity}/snapshots/{snapshot.uuid}"
        inside = builder.folder(top, name, path, mtime_ns=_ns(snapshot.snapshot_time))
        its_disks = [disk for disk in inventory.disks_of(snapshot) if is_shown(disk.vdi)]
        _add_disks(builder, its_disks, inside, path, up="../../../..")
    if snapshots:
        newest = names[snapshots[-1].uuid]
        builder.link(top, "latest", f"{identity}/snapshots/latest", target=newest)


def _add_disks(
    builder: _Builder, disks: Sequence[Disk], folder: int, identity: str, *, up: str
) -> None:
    for disk in disks:
        name = f"{disk.device}.raw"
        target = f"{up}/by-uuid/{disk.vdi.uuid}.raw"
        builder.link(folder, name, f"{identity}/{name}", target=target)


def _add_backups(builder: _Builder, backups: Catalogue, store_path: str) -> None:
    top = builder.folder(ROOT, "backups", "backups")
    histories = [history for history in backups.vms.values() if history.points]
    names = safe_names([(history.uuid, history.name) for history in histories])
    for history in histories:
        identity = f"backups/{history.uuid}"
        folder = builder.folder(top, names[history.uuid], identity)
        for point in history.points:
            target = f"{store_path}/{history.uuid}/{point.time}"
            builder.link(folder, point.time, f"{identity}/{point.time}", target=target)
        newest = history.points[-1].time
        builder.link(folder, "latest", f"{identity}/latest", target=newest)


# ── Documents ────────────────────────────────────────────────────────────────────────────────


def _pool_document(inventory: Inventory, shown: Sequence[VDI]) -> bytes:
    pool = inventory.pool
    master = inventory.hosts.get(pool.master_ref)
    return _document(
        {
            "uuid": pool.uuid,
            "name": pool.name,
            "master": master.uuid if master else "",
            "nbd": inventory.nbd_purpose,
            "hosts": [
                {"uuid": h.uuid, "name": h.name, "address": h.address, "enabled": h.enabled}
                for h in inventory.hosts.values()
            ],
            "srs": [
                {"uuid": sr.uuid, "name": sr.name, "type": sr.type, "cbt": sr.cbt_capable}
                for sr in inventory.srs.values()
            ],
            "vms": len(inventory.live_vms()),
            "disks": sum(not vdi.is_a_snapshot for vdi in shown),
            "snapshots": sum(vdi.is_a_snapshot for vdi in shown),
        }
    )


def _vm_document(
    vm: VM, disks: Sequence[Disk], snapshots: Sequence[VM], names: Mapping[str, str]
) -> bytes:
    return _document(
        {
            "uuid": vm.uuid,
            "name": vm.name,
            "power_state": vm.power_state,
            "tags": sorted(vm.tags),
            "disks": [
                {"device": d.device, "uuid": d.vdi.uuid, "name": d.vdi.name, "size": d.vdi.size}
                for d in disks
            ],
            "snapshots": [
                {
                    "uuid": snapshot.uuid,
                    "name": snapshot.name,
                    "time": _stamp(snapshot.snapshot_time),
                    "folder": names[snapshot.uuid],
                }
                for snapshot in snapshots
            ],
        }
    )


def _vdi_document(inventory: Inventory, vdi: VDI) -> bytes:
    sr = inventory.srs.get(vdi.sr_ref)
    origin = inventory.vdis.get(vdi.snapshot_of) if vdi.is_a_snapshot else None
    return _document(
        {
            "uuid": vdi.uuid,
            "name": vdi.name,
            "description": vdi.description,
            "size": vdi.size,
            "used": vdi.used,
            "type": vdi.type,
            "sr": {"uuid": sr.uuid, "name": sr.name, "type": sr.type} if sr else None,
            "cbt_enabled": vdi.cbt_enabled,
            "read_only": vdi.read_only,
            "is_a_snapshot": vdi.is_a_snapshot,
            "snapshot_of": origin.uuid if origin else "",
            "snapshot_time": _stamp(vdi.snapshot_time) if vdi.is_a_snapshot else "",
            "snapshots": [snapshot.uuid for snapshot in inventory.snapshots_of(vdi)],
            "vms": _holders(inventory, vdi),
            "tags": sorted(vdi.tags),
        }
    )


def _holders(inventory: Inventory, vdi: VDI) -> list[dict[str, str]]:
    """Return the VMs that have ``vdi``, and as which device."""
    vbds = [vbd for vbd in map(inventory.vbds.get, vdi.vbd_refs) if vbd]
    found = [(inventory.vms.get(vbd.vm_ref), vbd.device) for vbd in vbds]
    return [{"uuid": vm.uuid, "name": vm.name, "device": device} for vm, device in found if vm]


def _document(fields: Mapping[str, object]) -> bytes:
    text = json.dumps({"schema": 1, **fields}, ensure_ascii=False)
    return msgspec.json.format(text.encode(errors="replace"), indent=2) + b"\n"


def _stamp(when: datetime) -> str:
    return catalogue.format_time(when)


def _ns(when: datetime) -> int:
    """Return ``when`` in nanoseconds since 1970; xapi's times are whole seconds."""
    return max(0, int(when.astimezone(UTC).timestamp())) * 1_000_000_000
