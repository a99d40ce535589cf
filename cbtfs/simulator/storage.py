r"""Storage: what the storage manager does with disks, their layers and their change logs.

A snapshot freezes the leaf, which becomes a hidden VDI, and puts two empty leaves on it::

         live                 live   snapshot
          |          ->          \   /
        [base]                  [hidden]
                                   |
                                 [base]

Destroying one of the two leaves a hidden layer with a single child; they are coalesced. The
change logs form chains of their own, by uuid, and are never derived from contents. What sm
does is in sm, drivers/VDI.py (``_cbt_snapshot``, ``delete``, ``list_changed_blocks``).
"""

import threading
import uuid as uuids
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from . import changelog, failures, layers
from .changelog import ChangeLog, LogDump
from .disk import Disk
from .failures import SimError
from .layers import Layer
from .tracking import Tracking

LONGEST_CHAIN = 30
"""Layers of a disk; one more snapshot is refused (sm, drivers/vhdutil.py)."""


class StorageDump(TypedDict):
    """The storage in ``state.json``: layers by name, disks by uuid, logs by uuid."""

    layers: dict[str, tuple[str, str, int, list[int]]]
    disks: dict[str, tuple[int, int, str]]
    logs: dict[str, LogDump]


@dataclass
class Rearranged:
    """What happened to the hidden VDIs: uuids whose parent is another now, and uuids gone."""

    moved: set[str] = field(default_factory=set[str])
    gone: set[str] = field(default_factory=set[str])


class Storage:
    """The disks of a pool and their logs; thread-safe.

    Attributes:
        disks: contents by uuid of the VDI, metadata-only ones included.
        hidden: frozen layers by uuid of their hidden VDI.
        logs: change logs by uuid of the VDI.
        coalesce: whether chains are shortened at once.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.disks: dict[str, Disk] = {}
        self.hidden: dict[str, Layer] = {}
        self.logs = Tracking()
        self.coalesce = True
        self._owners: dict[Layer, Disk] = {}
        self._rearranged = Rearranged()
        self._trash: list[Path] = []
        self._lock = threading.RLock()

    # ── contents ─────────────────────────────────────────────────────────────────────────

    def create(self, uuid: str, *, size: int, sector: int) -> Disk:
        """Make an empty disk."""
        with self._lock:
            disk = Disk(uuid, size=size, sector=sector, leaf=None)
            self._stack(disk, self._new_layer())
            self.disks[uuid] = disk
            return disk

    def snapshot(self, uuid: str, child: str, *, hidden: str, active: bool, track: bool) -> bool:
        """Freeze a disk; ``child`` becomes the snapshot's uuid, ``hidden`` the base copy's.

        Args:
            uuid: of the live VDI.
            child: of the snapshot.
            hidden: for the frozen layer, if one is needed.
            active: a host has the disk open for writing.
            track: False if the log cannot be made: tracking goes off, the snapshot is taken.

        Returns:
            Whether ``hidden`` was used; a disk not written since its last snapshot shares
            the parent instead (sm, drivers/FileSR.py).

        Raises:
            SimError: the chain is too long.
        """
        with self._lock, self.disks[uuid].lock:
            used = self._fork(uuid, child, hidden=hidden)
            if uuid not in self.logs:
                return used
            if track:
                self.logs.rename(uuid, child, size=self.disks[uuid].size, active=active)
                self.disks[child].log = self.logs[child]
                self.disks[uuid].log = self.logs[uuid]
            else:
                self.disable_cbt(uuid)
            return used

    def clone(self, uuid: str, child: str, *, hidden: str) -> bool:
        """Make ``child`` a writable copy; tracking stays as it is on ``uuid``, off on ``child``."""
        with self._lock, self.disks[uuid].lock:
            return self._fork(uuid, child, hidden=hidden)

    def destroy(self, uuid: str) -> None:
        """Remove a disk; its log is merged into the next newer one."""
        with self._lock:
            log = self.logs.get(uuid)
            if log is not None:
                with self.disks.get(log.child, self.disks[uuid]).lock:
                    self.logs.unlink(uuid)
                self.disks[uuid].log = None
            self.data_destroy(uuid)
            del self.disks[uuid]

    def data_destroy(self, uuid: str) -> None:
        """Remove the contents, keep the log."""
        with self._lock:
            disk = self.disks[uuid]
            with disk.lock:
                leaf = disk.leaf
                disk.stack(None)
            if leaf is not None:
                below = leaf.parent
                self._owners.pop(leaf)
                self._rearranged.moved.add(uuid)
                self._discard(leaf)
                self._settle(below)

    def resize(self, uuid: str, size: int, *, track: bool) -> None:
        """Grow a disk; new space is zero and not in the log. Without ``track`` the log fails.

        Raises:
            SimError: the disk would shrink.
        """
        with self._lock, self.disks[uuid].lock:
            disk = self.disks[uuid]
            if size < disk.size:
                raise failures.storage(79, "VDI Invalid size", detail="shrinking not allowed")
            disk.size = size
            if uuid in self.logs and track:
                self.logs[uuid].grow(size)
            elif uuid in self.logs:
                self.disable_cbt(uuid)

    def collect(self) -> None:
        """Coalesce whatever can be, as the garbage collector does in its own time."""
        with self._lock:
            for layer in list(self.hidden.values()):
                if layer.uuid:
                    self._settle(layer, force=True)

    def rearranged(self) -> Rearranged:
        """Return what changed in the tree of hidden VDIs since the last call."""
        with self._lock:
            found, self._rearranged = self._rearranged, Rearranged()
            found.moved = {u for u in found.moved if u in self.disks or u in self.hidden}
            return found

    def parent(self, uuid: str) -> str:
        """Return the uuid of the hidden VDI below a VDI, "" at the bottom."""
        layer = self.hidden[uuid] if uuid in self.hidden else self.disks[uuid].leaf
        return layer.parent.uuid if layer is not None and layer.parent is not None else ""

    # ── change logs ──────────────────────────────────────────────────────────────────────

    def enable_cbt(self, uuid: str, *, active: bool) -> None:
        """Start an empty log; without effect if there is one."""
        with self._lock, self.disks[uuid].lock:
            if uuid not in self.logs:
                self._put_log(uuid, ChangeLog(self.disks[uuid].size))
                if active:
                    self.logs[uuid].activate()

    def disable_cbt(self, uuid: str) -> None:
        """Delete the log: nothing older can be compared with anything newer any more."""
        with self._lock, self.disks[uuid].lock:
            self.logs.drop(uuid)
            self.disks[uuid].log = None

    def activate(self, uuid: str) -> bool:
        """A host opens the disk for writing; False if the log was bad and tracking is off now."""
        with self._lock, self.disks[uuid].lock:
            log = self.logs.get(uuid)
            if log is None:
                return True
            if not log.consistent:
                self.disable_cbt(uuid)
                return False
            log.activate()
            return True

    def deactivate(self, uuid: str, *, crashed: bool = False) -> None:
        """The host closes the disk, or dies with it open."""
        with self._lock, self.disks[uuid].lock:
            log = self.logs.get(uuid)
            if log is not None and crashed:
                log.crash()
            elif log is not None:
                log.deactivate()

    def changed(self, older: str, newer: str) -> ChangeLog:
        """Return what was written after ``older`` up to ``newer``, as one log.

        Raises:
            SimError: fault 460 or 459, in sm's words.
        """
        with self._lock:
            chain = self.logs.chain(older, newer)
            with self.disks[newer].lock:
                return changelog.union(chain)

    # ── keeping it ───────────────────────────────────────────────────────────────────────

    def dump(self) -> StorageDump:
        """Return layers, disks and logs as JSON can hold them."""
        with self._lock:
            known = {layer for disk in self.disks.values() for layer in disk.chain()}
            known |= set(self.hidden.values())
            disks: dict[str, tuple[int, int, str]] = {}
            for uuid, disk in self.disks.items():
                with disk.lock:
                    leaf = disk.leaf.name if disk.leaf is not None else ""
                    disks[uuid] = (disk.size, disk.sector, leaf)
            return {
                "layers": {layer.name: _dump_layer(layer) for layer in known},
                "disks": disks,
                "logs": {uuid: log.dump() for uuid, log in self.logs.items()},
            }

    def restore(self, dump: StorageDump) -> None:
        """Become what ``dump`` gave; files of no layer are removed."""
        made = {name: Layer(self.directory, name) for name in dump["layers"]}
        for name, (parent, uuid, size, runs) in dump["layers"].items():
            made[name].link(made.get(parent))
            made[name].uuid, made[name].size = uuid, size
            made[name].masks = _masks(runs)
        self.hidden = {layer.uuid: layer for layer in made.values() if layer.uuid}
        for uuid, (size, sector, leaf) in dump["disks"].items():
            disk = Disk(uuid, size=size, sector=sector, leaf=None)
            self.disks[uuid] = disk
            if leaf:
                self._stack(disk, made[leaf])
        for uuid, log in dump["logs"].items():
            self._put_log(uuid, ChangeLog.restore(log))
        for path in self.directory.glob("*.raw"):
            if path.name.partition(".")[0] not in made:
                path.unlink()

    def empty_trash(self) -> None:
        """Remove files of layers that are gone; called once a state without them is saved."""
        with self._lock:
            trash, self._trash = self._trash, []
        for path in trash:
            path.unlink(missing_ok=True)

    # ── inside ───────────────────────────────────────────────────────────────────────────

    def _new_layer(self, *, parent: Layer | None = None) -> Layer:
        return Layer(self.directory, uuids.uuid4().hex, parent=parent)

    def _stack(self, disk: Disk, leaf: Layer) -> None:
        if disk.leaf is not None:
            self._owners.pop(disk.leaf, None)
        disk.stack(leaf)
        self._owners[leaf] = disk
        self._rearranged.moved.add(disk.uuid)

    def _fork(self, uuid: str, child: str, *, hidden: str) -> bool:
        disk = self.disks[uuid]
        leaf = disk.leaf
        if leaf is None:
            raise ValueError(f"disk {uuid} has no data")
        copy = Disk(child, size=disk.size, sector=disk.sector, leaf=None)
        self.disks[child] = copy
        if not leaf.masks and leaf.parent is not None:
            self._stack(copy, self._new_layer(parent=leaf.parent))
            return False
        if len(disk.chain()) >= LONGEST_CHAIN:
            del self.disks[child]
            raise SimError("SR_BACKEND_FAILURE_109", "", "The snapshot chain is too long", "")
        self._stack(copy, self._new_layer(parent=leaf))
        self._stack(disk, self._new_layer(parent=leaf))
        leaf.uuid, leaf.size = hidden, disk.size
        self.hidden[hidden] = leaf
        self._rearranged.moved.add(hidden)
        return True

    def _put_log(self, uuid: str, log: ChangeLog) -> None:
        self.logs.put(uuid, log)
        self.disks[uuid].log = log

    def _discard(self, layer: Layer) -> None:
        if layer.uuid:
            self._rearranged.gone.add(layer.uuid)
            self.hidden.pop(layer.uuid, None)
            layer.uuid = ""
        layer.link(None)
        self._trash += layer.paths()
        layer.close()

    def _settle(self, layer: Layer | None, *, force: bool = False) -> None:
        """Remove a hidden layer without children, merge one with a single child."""
        if not (self.coalesce or force):
            return
        while layer is not None and not layer.children:
            below = layer.parent
            self._discard(layer)
            layer = below
        while layer is not None and len(layer.children) == 1:
            layer = self._merge(layer, next(iter(layer.children)))

    def _merge(self, lower: Layer, upper: Layer) -> Layer | None:
        """Make one layer of a hidden one and its only child; return it if it is hidden too.

        The smaller is copied into the larger. If the child is a disk's leaf, its guest
        waits meanwhile, as sm pauses tapdisk.
        """
        disk = self._owners.get(upper)
        if disk is None:
            return self._merge_hidden(lower, upper)
        with disk.lock:
            if upper.blocks() <= lower.blocks():
                layers.copy_missing(upper, lower, override=True)
                self.hidden.pop(lower.uuid)
                self._rearranged.gone.add(lower.uuid)
                lower.uuid = ""
                self._stack(disk, lower)
                self._discard(upper)
            else:
                layers.copy_missing(lower, upper, override=False)
                upper.link(lower.parent)
                self._stack(disk, upper)
                self._discard(lower)
        return None

    def _merge_hidden(self, lower: Layer, upper: Layer) -> Layer:
        if upper.blocks() <= lower.blocks():
            layers.copy_missing(upper, lower, override=True)
            kept, merged = lower, upper
        else:
            layers.copy_missing(lower, upper, override=False)
            kept, merged = upper, lower
            upper.link(lower.parent)
        for child in list(merged.children - {kept}):
            child.link(kept)
        self._discard(merged)
        self._restack(kept)
        return kept

    def _restack(self, layer: Layer) -> None:
        self._rearranged.moved.add(layer.uuid)
        for child in layer.children:
            disk = self._owners.get(child)
            if disk is None:
                self._restack(child)
                continue
            with disk.lock:
                self._stack(disk, child)


def _dump_layer(layer: Layer) -> tuple[str, str, int, list[int]]:
    """Return (parent, uuid, size, [first chunk, count, mask, …]), equal masks joined."""
    runs: list[int] = []
    for chunk, mask in sorted(layer.masks.items()):
        if runs and runs[-1] == mask and runs[-3] + runs[-2] == chunk:
            runs[-2] += 1
        else:
            runs += [chunk, 1, mask]
    parent = layer.parent.name if layer.parent is not None else ""
    return parent, layer.uuid, layer.size, runs


def _masks(runs: list[int]) -> dict[int, int]:
    found: dict[int, int] = {}
    for first, count, mask in zip(runs[::3], runs[1::3], runs[2::3], strict=True):
        found.update(dict.fromkeys(range(first, first + count), mask))
    return found
