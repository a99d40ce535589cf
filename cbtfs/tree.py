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

1. A tree never changes; a changed pool gets a new one, which takes from the one before whatever is
   as it was: nodes, documents, and the modification times of what has none of its own.
2. An inode number is a hash of uuids, not of names, so that it survives renames and remounts.
3. What cannot be read has no file: unmanaged and missing VDIs, ``cbt_metadata``, suspend images,
   and the temporary snapshots that live disks are read through.
4. Names from the pool become file names only through ``names.safe_names``.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Literal

from . import descriptions, errors, inventory as inventories
from .catalogue import Catalogue
from .descriptions import Facts, is_shown
from .inventory import VDI, VM, Disk, Inventory
from .names import NAME_MAX, safe_names

__all__ = [
    "README",
    "ROOT",
    "Changes",
    "Node",
    "Tree",
    "build",
    "changes",
    "is_shown",
    "safe_names",
]

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
        vm_ref: the VM whose snapshots a folder holds, or the snapshot VM that it shows.
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
    vm_ref: str = ""
    content: bytes = b""
    size: int = 0
    blocks: int = 0
    mtime_ns: int = 0
    nlink: int = 1


_Document = tuple[Facts, bytes]
"""What the description of a disk was made of, and its text."""


class Tree:
    """The names of the mount at one moment; built by ``build``.

    Args:
        nodes: by inode number.
        names: the inode numbers of what is in each folder.
        documents: the descriptions of disks by uuid.
        since_ns: when the first of its line was built.
    """

    def __init__(
        self,
        nodes: Mapping[int, Node],
        names: Mapping[int, Mapping[str, int]],
        documents: Mapping[str, _Document],
        since_ns: int,
    ) -> None:
        self.nodes = nodes
        self.names = names
        self.documents = documents
        self.since_ns = since_ns

    def __len__(self) -> int:
        return len(self.nodes)

    def __repr__(self) -> str:
        return f"<Tree of {len(self)} nodes>"

    def node(self, inode: int) -> Node:
        """Return the node with this inode number.

        Raises:
            NotFound: there is none (any more).
        """
        node = self.nodes.get(inode)
        if node is None:
            raise errors.NotFound(f"the mount has no inode {inode}")
        return node

    def lookup(self, parent: int, name: bytes | str) -> Node | None:
        """Return the node called ``name`` in the folder ``parent``, or None."""
        try:
            text = name if isinstance(name, str) else name.decode()
        except UnicodeDecodeError:
            return None
        inode = self.names.get(parent, {}).get(text)
        return None if inode is None else self.nodes[inode]

    def children(self, inode: int) -> Sequence[Node]:
        """Return what the folder ``inode`` holds, by name; nothing for what is no folder."""
        entries = self.names.get(inode, {})
        return tuple(self.nodes[child] for _, child in sorted(entries.items()))


@dataclass(frozen=True, slots=True)
class Changes:
    """What is otherwise in one tree than in the one before.

    Attributes:
        entries: folder and name of what is gone, or stands for something else; what is new only has
            no entry.
        attributes: inode numbers of what looks different from outside.
        contents: of texts and links with another text or target.
    """

    entries: Sequence[tuple[int, str]]
    attributes: Sequence[int]
    contents: Sequence[int]

    def __bool__(self) -> bool:
        return bool(self.entries or self.attributes or self.contents)


def changes(before: Tree, after: Tree) -> Changes:
    """Return what somebody must forget who knows ``before`` and is to see ``after``."""
    entries = [
        (folder, name)
        for folder, names in before.names.items()
        if names != (now := after.names.get(folder, {}))
        for name, inode in names.items()
        if now.get(name) != inode
    ]
    attributes: list[int] = []
    contents: list[int] = []
    for inode, node in before.nodes.items():
        other = after.nodes.get(inode)
        if other is None or other is node:
            continue
        same = (node.content, node.target) == (other.content, other.target)
        (attributes if same else contents).append(inode)
    return Changes(entries, attributes, contents)


class _Builder:
    """A tree under construction. ``identity`` is a path of uuids that names a node for ever."""

    def __init__(self, now_ns: int, earlier: Tree | None) -> None:
        self._now_ns = now_ns
        self._earlier = earlier
        # what is as before is then equal at once, and most is
        self._usual_ns = earlier.since_ns if earlier else now_ns
        self._documents: dict[str, _Document] = {}
        root = Node(inode=ROOT, kind="dir", name="", parent=ROOT, mtime_ns=self._usual_ns, nlink=2)
        self._nodes = {ROOT: root}
        self._names: dict[int, dict[str, int]] = {ROOT: {}}

    def folder(
        self, parent: int, name: str, identity: str, *, mtime_ns: int = -1, vm_ref: str = ""
    ) -> int:
        """Add a folder and return its inode number."""
        inode = self._number(identity)
        mtime_ns = self._usual_ns if mtime_ns < 0 else mtime_ns
        self._add(
            Node(
                inode=inode,
                kind="dir",
                name=name,
                parent=parent,
                vm_ref=vm_ref,
                mtime_ns=mtime_ns,
                nlink=2,
            )
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
                mtime_ns=self._usual_ns,
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
                mtime_ns=self._usual_ns,
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
                mtime_ns=_ns(vdi.snapshot_time) if vdi.is_a_snapshot else self._usual_ns,
            )
        )

    def finish(self) -> Tree:
        """Return the tree."""
        if self._earlier is not None:
            for inode, node in self._nodes.items():
                self._nodes[inode] = self._settled(node, self._earlier)
        return Tree(self._nodes, self._names, self._documents, self._usual_ns)

    def _settled(self, node: Node, earlier: Tree) -> Node:
        """Return ``node`` with the time when it changed last; the earlier one if it is equal."""
        before = earlier.nodes.get(node.inode)
        if node.mtime_ns == self._usual_ns:
            if before is None or not self._shows_the_same(node, before):
                return replace(node, mtime_ns=self._now_ns)
            if before.mtime_ns != node.mtime_ns:
                node = replace(node, mtime_ns=before.mtime_ns)
        return before if before is not None and before == node else node

    def _shows_the_same(self, node: Node, before: Node) -> bool:
        if node.kind == "dir" and self._earlier is not None:
            return self._names[node.inode] == self._earlier.names.get(node.inode)
        return (node.kind, node.target, node.vdi_ref, node.size, node.content) == (
            before.kind,
            before.target,
            before.vdi_ref,
            before.size,
            before.content,
        )

    def description(self, inventory: Inventory, vdi: VDI) -> bytes:
        """Return the text that describes ``vdi``."""
        key = descriptions.facts(inventory, vdi)
        known = self._earlier.documents.get(vdi.uuid) if self._earlier else None
        if known is None or known[0] != key:
            known = (key, descriptions.of_vdi(key))
        self._documents[vdi.uuid] = known
        return known[1]

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
    inventory: Inventory,
    *,
    backups: Catalogue | None,
    store_path: str,
    now: datetime,
    earlier: Tree | None = None,
    hidden: Collection[str] = (),
) -> Tree:
    """Return the tree of a pool.

    Args:
        inventory: what the pool has.
        backups: the restore points of a store; None leaves ``backups/`` out.
        store_path: absolute path of that store.
        now: modification time of whatever is no snapshot, and not in ``earlier`` as it is now.
        earlier: the tree that this one takes the place of.
        hidden: references of VDIs that are not shown.
    """
    builder = _Builder(_ns(now), earlier)
    shown = [v for v in inventory.vdis.values() if is_shown(v) and v.ref not in hidden]
    builder.text(ROOT, "README.txt", "README.txt", content=README)
    builder.text(ROOT, "pool.json", "pool.json", content=descriptions.of_pool(inventory, shown))
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


def _add_files(builder: _Builder, inventory: Inventory, shown: Sequence[VDI]) -> None:
    folder = builder.folder(ROOT, "by-uuid", "by-uuid")
    for vdi in shown:
        raw, described = f"{vdi.uuid}.raw", f"{vdi.uuid}.json"
        document = builder.description(inventory, vdi)
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
    names = safe_names([(snapshot.uuid, _name(snapshot)) for snapshot in snapshots])
    _add_disks(builder, disks, folder, identity, up="../..")
    builder.text(
        folder,
        "vm.json",
        f"{identity}/vm.json",
        content=descriptions.of_vm(vm, disks, snapshots, names),
    )
    top = builder.folder(folder, "snapshots", f"{identity}/snapshots", vm_ref=vm.ref)
    for snapshot in snapshots:
        name, path = names[snapshot.uuid], f"{identity}/snapshots/{snapshot.uuid}"
        taken = _ns(snapshot.snapshot_time)
        inside = builder.folder(top, name, path, mtime_ns=taken, vm_ref=snapshot.ref)
        its_disks = [disk for disk in inventory.disks_of(snapshot) if is_shown(disk.vdi)]
        _add_disks(builder, its_disks, inside, path, up="../../../..")
    if snapshots:
        newest = names[snapshots[-1].uuid]
        builder.link(top, "latest", f"{identity}/snapshots/latest", target=newest)


def is_made(vm: VM) -> bool:
    """Tell whether a user made the snapshot ``vm`` through a mount."""
    owned = inventories.read_owner(vm.other_config, vm.uuid)
    return vm.is_a_snapshot and owned is not None and owned.role == "made"


def _name(snapshot: VM) -> str:
    """Return what the folder of a snapshot is called, before that is made valid and unique."""
    if is_made(snapshot):  # whoever says mkdir NAME expects to see NAME
        return snapshot.name
    return f"{descriptions.stamp(snapshot.snapshot_time)}~{snapshot.name or snapshot.uuid[:8]}"


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


def _ns(when: datetime) -> int:
    """Return ``when`` in nanoseconds since 1970."""
    seconds = int(when.astimezone(UTC).replace(microsecond=0).timestamp())
    return max(0, seconds * 1_000_000_000 + when.microsecond * 1000)
