"""Filesystem: what the kernel asks of a mount, answered from the tree and the disks.

Rules of this file:

1. Any exception but ``FUSEError`` that leaves a handler ends the mount. So every handler is
   ``_answered``, and that is the one place where an exception becomes an errno.
2. Names, attributes and extended attributes come from the tree and the inventory, which are in
   memory: ``ls -R``, ``stat`` and ``open`` never reach the pool. Only ``read`` does.
3. The contents behind a snapshot's inode never change, so the kernel may keep its pages for ever.
   Behind a live disk's inode they change with every source (see ``disks``): the kernel has to drop
   the pages it has until the first read of the new source shows that it did.
4. The size of a file does not change while it is open: a disk that grows shows its old size until
   then, for the reads of an open file end there.
5. Tree and inventory change together, in ``switch``, between awaits; what is open stays as it was.
6. The kernel holds the lock of a folder while somebody makes or removes a name in it. So ``mkdir``
   and ``rmdir`` are bounded as reads are, and wait for trees only, which wait for no such lock.
"""

import errno
import functools
import logging
import os
import stat
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn, TypeVar, Unpack, cast

import pyfuse3
import trio

from . import __version__, errors, maker as makers, units
from .cache import Cache
from .disks import Disks, Source
from .instant import owned
from .inventory import VDI, Inventory
from .maker import Maker, refusals, valid_name
from .pages import Pages
from .patience import Patience, TooSlow
from .readahead import Streams
from .tree import Changes, Node, Tree, is_made

log = logging.getLogger(__name__)

TIMEOUT = 120.0
"""Seconds until a read fails, by default: more than a host needs to plug a device twice (60 s is
what Xen Orchestra gives it), less than a user's patience."""

NAME_TIMEOUT = 5.0
"""Seconds that the kernel believes a name, and the attributes of what may change."""

SNAPSHOT_TIMEOUT = 3600.0
"""Seconds that the kernel believes the attributes of an immutable file."""

STUCK = 10.0
"""Seconds until a read of a disk fails of which another was not answered in time, at most."""

CLOSING = 1.0
"""Seconds in which the kernel tells of a file that was closed."""

REPORTED = 256
"""Failures that are remembered, so as not to be logged again."""

XATTR_PREFIX = "user.cbtfs."

_MODES = {"dir": stat.S_IFDIR | 0o550, "file": stat.S_IFREG | 0o440, "link": stat.S_IFLNK | 0o777}

_H = TypeVar("_H")
_Handler = Callable[["Filesystem", Unpack[tuple[object, ...]]], Awaitable[object]]


def _answered(handler: _H) -> _H:
    """Turn whatever ``handler`` raises into an answer for the kernel; rule 1."""
    handle = cast("_Handler", handler)
    action = handle.__name__

    async def answer(self: "Filesystem", *args: object) -> object:
        try:
            return await handle(self, *args)
        except pyfuse3.FUSEError:
            raise
        except errors.Denied as error:
            raise pyfuse3.FUSEError(error.errno) from error
        except Exception as error:
            self.failures.report(action, self.name_of(action, args[0]), error)
            raise pyfuse3.FUSEError(errno.EIO) from error

    return cast("_H", functools.update_wrapper(answer, handle))


class Failures:
    """Says once why something failed: who copies a dead disk asks for it a thousand times."""

    def __init__(self) -> None:
        self._reported: OrderedDict[str, None] = OrderedDict()

    def report(self, action: str, name: str, error: Exception) -> None:
        """Log that ``action`` on the file ``name`` failed, with the origin if nobody foresaw it."""
        text = f"{action} {name}: {str(error) or type(error).__name__}"
        if text in self._reported:
            return
        self._reported[text] = None
        if len(self._reported) > REPORTED:
            self._reported.popitem(last=False)
        log.error("%s", text, exc_info=None if isinstance(error, errors.CbtfsError) else error)

    def forget(self, name: str) -> None:
        """Log the next failure of the file ``name`` again, because somebody opens it anew."""
        for text in [t for t in self._reported if f" {name}: " in t]:
            del self._reported[text]


@dataclass(slots=True, eq=False)
class _File:
    """An open file: a text of ours, or a disk if there is a ``source``. ``pid`` opened it."""

    node: Node
    pid: int
    source: Source | None = None
    streams: Streams | None = None


class Filesystem(pyfuse3.Operations):
    """A pool's tree; nothing in it can be changed but that snapshots of VMs come and go.

    Args:
        tree: the names.
        inventory: what the names stand for.
        disks: the contents.
        cache: what has been read of them.
        timeout: seconds until a read fails.
        maker: takes and removes snapshots; None: nobody does.
    """

    def __init__(
        self,
        tree: Tree,
        *,
        inventory: Inventory,
        disks: Disks,
        cache: Cache,
        timeout: float = TIMEOUT,
        maker: Maker | None = None,
    ) -> None:
        super().__init__()
        self.failures = Failures()
        self.patience = Patience()
        self.pages = Pages(pyfuse3.notify_store)
        self._tree = tree
        self._inventory = inventory
        self._disks = disks
        self._cache = cache
        self._timeout = timeout
        self._maker = maker
        self._hidden: frozenset[str] = frozenset()  # VDIs of the inventory
        self._switched = trio.Event()
        self._resized: set[int] = set()
        self._owner = (os.getuid(), os.getgid())
        self._last_handle = 0
        self._files: dict[int, _File] = {}
        self._folders: dict[int, list[Node]] = {}
        self._stuck: set[str] = set()  # keys of sources of which a read was not answered in time

    def name_of(self, action: str, number: object) -> str:
        """Return the name of the node or open file that a handler's first argument stands for."""
        if not isinstance(number, int):
            return "/"
        if action in {"read", "release"}:
            return self._files[number].node.name if number in self._files else f"handle {number}"
        try:
            return self._tree.node(number).name or "/"
        except errors.NotFound:
            return f"inode {number}"

    def temporary(self, inventory: Inventory) -> frozenset[str]:
        """Return the references of snapshots that are only there because somebody reads a disk."""
        known = self._inventory.vdis.keys() - self._hidden
        self._hidden = self._disks.temporary(inventory.vdis.values(), known=known)
        return self._hidden

    def switch(self, tree: Tree, inventory: Inventory) -> None:
        """Show another tree from now on; ``invalidate`` then makes the kernel forget the other."""
        self._tree = tree
        self._inventory = inventory
        self._switched.set()
        self._switched = trio.Event()
        for file in self._files.values():
            node = tree.nodes.get(file.node.inode)
            if node is not None and node.size != file.node.size and file.source is not None:
                self._resized.add(node.inode)

    # ── Names and attributes ─────────────────────────────────────────────────────────────────

    @_answered
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Return the attributes of a name in a folder."""
        parent = self._node(parent_inode)
        if name == b".":
            return self._attributes(parent)
        if name == b"..":
            return self._attributes(self._node(parent.parent))
        node = self._tree.lookup(parent_inode, name)
        if node is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(node)

    @_answered
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Return the attributes of a node."""
        return self._attributes(self._node(inode))

    @_answered
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        """Return where a link points."""
        return os.fsencode(self._node(inode).target)

    @_answered
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """Note what is in a folder now, so that a listing is of one instant."""
        self._node(inode)
        handle = self._new_handle()
        self._folders[handle] = list(self._tree.children(inode))
        return handle

    @_answered
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List a folder from its ``start_id``-th name on, with attributes."""
        for index, node in enumerate(self._folders[fh][start_id:], start=start_id + 1):
            if not pyfuse3.readdir_reply(token, node.name.encode(), self._attributes(node), index):
                break

    @_answered
    async def releasedir(self, fh: int) -> None:
        """Forget an open folder."""
        del self._folders[fh]

    @_answered
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Return the size of all disks; nothing is free, because nothing can be written."""
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4 * units.KiB
        data.f_blocks = sum(v.size for v in self._inventory.vdis.values()) // data.f_frsize
        data.f_namemax = 255
        return data

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Do nothing: a node lives as long as the tree."""

    # ── Extended attributes ──────────────────────────────────────────────────────────────────

    @_answered
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """Return a fact about a disk, or about the mount."""
        if not name.startswith(b"user."):
            # ls asks for a label and an ACL of each file, unless it is told that there are none
            raise pyfuse3.FUSEError(errno.ENOTSUP)
        facts = self._facts(self._node(inode))
        if name not in facts:
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        return facts[name]

    @_answered
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        """Return which facts there are."""
        return list(self._facts(self._node(inode)))

    # ── Contents ─────────────────────────────────────────────────────────────────────────────

    @_answered
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open a file without reading it; rule 3 says whether the kernel may keep its pages."""
        node = self._node(inode)
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise pyfuse3.FUSEError(errno.EROFS)
        file = _File(node, ctx.pid)
        # of a text, who opened it before a change would leave the old pages to those who come after
        keep_cache = False
        if node.vdi_ref:
            vdi = self._inventory.vdis.get(node.vdi_ref)
            if vdi is None:
                raise pyfuse3.FUSEError(errno.ESTALE)
            if not self._disks.allows(vdi):
                raise pyfuse3.FUSEError(errno.EPERM)
            file.source = self._disks.open(vdi, size=node.size)
            file.streams = Streams(node.size)
            keep_cache = vdi.is_a_snapshot or file.source.instant is not None
            if file.source.files == 1:
                self.failures.forget(node.name)
        handle = self._new_handle()
        self._files[handle] = file
        return pyfuse3.FileInfo(fh=handle, keep_cache=keep_cache)

    @_answered
    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Return bytes of an open file within the time limit."""
        file = self._files[fh]
        if file.source is None:
            return file.node.content[off : off + size]
        data: bytes | bytearray | memoryview | None = self._cache.look(
            file.source, offset=off, length=size, streams=file.streams
        )
        if data is None:
            data = await self._fetched(file, file.source, off, size)
        # pyfuse3 takes any buffer, and copies it before anything else happens
        return cast("bytes", data)

    async def _fetched(
        self, file: _File, source: Source, off: int, size: int
    ) -> bytes | bytearray | memoryview:
        """Return bytes that may have to be waited for.

        What was not answered in time is asked for again by the kernel, piece by piece: so of a disk
        that is stuck nobody waits for as long again, until it answers.
        """
        limit = min(self._timeout / 4, STUCK) if source.key in self._stuck else self._timeout
        try:
            with self.patience.bounded(file.pid, limit):
                data = await self._cache.read(source, offset=off, length=size, streams=file.streams)
        except TooSlow:
            self._stuck.add(source.key)
            raise
        self._stuck.discard(source.key)
        grain = self._cache.grain(source, off) if source.vdi.is_a_snapshot else None
        if grain is not None and len(data) < len(grain.data):
            self.pages.give(file.node.inode, grain.offset, grain.data)
        return data

    @_answered
    async def release(self, fh: int) -> None:
        """Close an open file."""
        file = self._files.pop(fh)
        if file.source is not None:
            self._disks.close(file.source)
            if file.streams is not None:
                self._cache.close(file.streams)
            if not file.source.files:
                self._stuck.discard(file.source.key)

    # ── Snapshots ────────────────────────────────────────────────────────────────────────────

    @_answered
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Take a snapshot of the VM whose snapshots the folder holds; return when it shows."""
        maker, vm_ref = self._making(parent_inode)
        text = valid_name(name)
        with self.patience.bounded(ctx.pid, makers.LIMIT), refusals():
            ref, disks = await maker.make_snapshot(vm_ref, text, owner=owned("made"))
            while not self._shows(ref, disks):
                await self._switched.wait()
        (node,) = (n for n in self._tree.children(parent_inode) if n.vm_ref == ref)
        log.info("took snapshot %s of %s", text, self._node(self._node(parent_inode).parent).name)
        return self._attributes(node)

    @_answered
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Remove a snapshot that ``mkdir`` took, with its disks; return when it shows no more."""
        maker, _ = self._making(parent_inode)
        node = self._tree.lookup(parent_inode, name)
        if node is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        snapshot = self._inventory.vms.get(node.vm_ref)
        if snapshot is None or not is_made(snapshot):
            raise pyfuse3.FUSEError(errno.EPERM)
        disks = {disk.vdi.ref for disk in self._inventory.disks_of(snapshot)}
        await self._await_closed(disks)
        with self.patience.bounded(ctx.pid, makers.LIMIT), refusals():
            await self._disks.let_go(disks)
            await maker.remove_snapshot(snapshot.ref)
            while snapshot.ref in self._inventory.vms:
                await self._switched.wait()
        log.info("removed snapshot %s", node.name)

    async def _await_closed(self, vdi_refs: Collection[str]) -> None:
        """Return when no file of these VDIs is open, in a moment or never.

        The kernel tells of a file that is closed only after close(2) has returned.
        """
        deadline = trio.current_time() + CLOSING
        while self._disks.has_open(vdi_refs):
            if trio.current_time() > deadline:
                raise pyfuse3.FUSEError(errno.EBUSY)
            await trio.sleep(CLOSING / 20)

    def _making(self, folder: int) -> tuple[Maker, str]:
        """Return who takes snapshots, and the VM whose snapshots ``folder`` holds."""
        if self._maker is None:
            raise pyfuse3.FUSEError(errno.EROFS)
        vm = self._inventory.vms.get(self._node(folder).vm_ref)
        if vm is None or vm.is_a_snapshot:
            raise pyfuse3.FUSEError(errno.EROFS)
        return self._maker, vm.ref

    def _shows(self, ref: str, disks: Sequence[str]) -> bool:
        """Tell whether a snapshot that was made is there in full."""
        vm = self._inventory.vms.get(ref)
        if vm is None or not is_made(vm):
            return False
        return {disk.vdi.ref for disk in self._inventory.disks_of(vm)} >= set(disks)

    def _new_handle(self) -> int:
        self._last_handle += 1
        return self._last_handle

    def _node(self, inode: int) -> Node:
        try:
            return self._tree.node(inode)
        except errors.NotFound:
            held = self._held(inode)
            if held is None:
                raise pyfuse3.FUSEError(errno.ESTALE) from None
            return held.node  # gone from the pool, but somebody has it open

    def _held(self, inode: int) -> _File | None:
        return next((f for f in self._files.values() if f.node.inode == inode), None)

    def _size(self, node: Node) -> int:
        """Return the size of a file; rule 4."""
        if node.inode in self._resized:
            held = self._held(node.inode)
            if held is not None and held.source is not None:
                return held.source.size
            self._resized.discard(node.inode)
        return node.size

    def _attributes(self, node: Node) -> pyfuse3.EntryAttributes:
        vdi = self._inventory.vdis.get(node.vdi_ref)
        immutable = vdi is not None and vdi.is_a_snapshot
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = node.inode
        entry.st_mode = _MODES[node.kind]
        if self._maker is not None and node.name == "snapshots" and node.vm_ref:
            entry.st_mode |= stat.S_IWUSR
        entry.st_nlink = node.nlink
        entry.st_uid, entry.st_gid = self._owner
        entry.st_size = self._size(node)
        entry.st_blocks = node.blocks
        entry.st_blksize = units.MiB if vdi else 4 * units.KiB
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = node.mtime_ns
        entry.entry_timeout = NAME_TIMEOUT
        entry.attr_timeout = SNAPSHOT_TIMEOUT if immutable else NAME_TIMEOUT
        return entry

    def _facts(self, node: Node) -> dict[bytes, bytes]:
        vdi = self._inventory.vdis.get(node.vdi_ref)
        facts: dict[str, str] = {}
        if vdi is not None:
            facts = _facts_of(vdi, self._inventory)
        elif node.inode == pyfuse3.ROOT_INODE:
            pool = self._inventory.pool
            facts = {"pid": str(os.getpid()), "pool": pool.uuid, "version": __version__}
        return {
            f"{XATTR_PREFIX}{key}".encode(): value.encode("utf-8", "surrogateescape")
            for key, value in facts.items()
            if value
        }


async def _refuse(*_: object) -> NoReturn:
    raise pyfuse3.FUSEError(errno.EROFS)


# What the kernel lets through as soon as mkdir is possible; their signatures are of no interest.
for _change in (
    *("create", "link", "mknod", "rename", "symlink", "unlink"),
    *("setattr", "setxattr", "removexattr"),
):
    setattr(Filesystem, _change, _refuse)


def invalidate(changes: Changes) -> None:
    """Make the kernel forget what is otherwise now, as far as it knows of it.

    Blocks while requests for the same folders are under way: to be called in a thread, while others
    answer the kernel.
    """
    forget_name, forget = pyfuse3.invalidate_entry, pyfuse3.invalidate_inode
    names = [partial(forget_name, folder, name.encode()) for folder, name in changes.entries]
    attributes = [partial(forget, inode, attr_only=True) for inode in changes.attributes]
    contents = [partial(forget, inode) for inode in changes.contents]
    for call in (*names, *attributes, *contents):
        try:
            call()
        except OSError as error:
            if error.errno != errno.ENOENT:  # it never asked for that, or has forgotten it
                log.info("the kernel believes old names for a moment: %s", error)
                return


def _facts_of(vdi: VDI, inventory: Inventory) -> dict[str, str]:
    """Return what the extended attributes of a disk tell; "" is left out."""
    sr = inventory.srs.get(vdi.sr_ref)
    origin = inventory.vdis.get(vdi.snapshot_of) if vdi.is_a_snapshot else None
    return {
        "uuid": vdi.uuid,
        "name": vdi.name,
        "sr": sr.name if sr else "",
        "sr_uuid": sr.uuid if sr else "",
        "size": str(vdi.size),
        "used": str(vdi.used),
        "cbt_enabled": str(vdi.cbt_enabled).lower(),
        "is_a_snapshot": str(vdi.is_a_snapshot).lower(),
        "snapshot_of": origin.uuid if origin else "",
        "snapshot_time": vdi.snapshot_time.isoformat() if vdi.is_a_snapshot else "",
    }
