"""State: what a simulated pool is made of, and the little that everything in it needs.

Locks, in the order in which they may be taken: an SR's operation lock, ``State.lock`` (the
database's), the storage's, a disk's. Nothing waits for time or for another thread while it
holds ``State.lock``.
"""

import json
import threading
import uuid as uuids
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

from .database import Database
from .failures import SimError
from .faults import Faults
from .storage import Storage, StorageDump
from .values import NULL, Record, Timestamp


@dataclass(frozen=True)
class Plugin:
    """What a type of SR can do.

    Attributes:
        cbt: tracks changed blocks.
        disks: makes, resizes, snapshots and destroys VDIs; False for libraries and devices.
        shared: reachable from several hosts.
        label: what the type is called.
        thick: a disk takes its whole size from the beginning (sm, LVMSR.py: the size of its volume
            is its utilisation); a snapshot takes what it holds.
    """

    cbt: bool
    disks: bool
    shared: bool
    label: str
    thick: bool = False


PLUGINS: dict[str, Plugin] = {
    "ext": Plugin(cbt=True, disks=True, shared=False, label="Local EXT3 VHD"),
    "lvm": Plugin(cbt=True, disks=True, shared=False, label="Local VHD on LVM", thick=True),
    "file": Plugin(cbt=True, disks=True, shared=False, label="Local Path VHD"),
    "nfs": Plugin(cbt=True, disks=True, shared=True, label="NFS VHD"),
    "smb": Plugin(cbt=True, disks=True, shared=True, label="SMB"),
    "lvmoiscsi": Plugin(cbt=True, disks=True, shared=True, label="VHD over iSCSI", thick=True),
    "lvmohba": Plugin(cbt=True, disks=True, shared=True, label="VHD over FC", thick=True),
    "largeblock": Plugin(cbt=True, disks=True, shared=False, label="Large Block SR"),
    "xfs": Plugin(cbt=True, disks=True, shared=False, label="XFS"),
    "zfs": Plugin(cbt=True, disks=True, shared=False, label="Local ZFS VHD"),
    "linstor": Plugin(cbt=False, disks=True, shared=True, label="LINSTOR"),
    "cephfs": Plugin(cbt=False, disks=True, shared=True, label="CephFS"),
    "iso": Plugin(cbt=False, disks=False, shared=True, label="ISO"),
    "udev": Plugin(cbt=False, disks=False, shared=False, label="udev"),
}
"""Types of SR; which track changes is the list of SM.features' VDI_CONFIG_CBT."""


@dataclass(frozen=True)
class Geometry:
    """Of an SR's disks: sizes are multiples of ``granularity``, requests of ``sector``."""

    granularity: int
    sector: int


@dataclass(frozen=True)
class Certificate:
    """What a host's servers show: PEM text, and the name to verify it by."""

    pem: str
    subject: str


class Saved(TypedDict):
    """What ``state.json`` holds."""

    version: int
    clean: bool
    database: dict[str, dict[str, Record]]
    storage: StorageDump
    geometry: dict[str, tuple[int, int]]
    forgotten: dict[str, str]


class State:
    """A pool: records, disks, settings. See ``pool.SimulatedPool`` for what can be done to it."""

    def __init__(self, directory: Path, *, faults: Faults | None = None) -> None:
        self.directory = directory
        self.faults = faults if faults is not None else Faults()
        self.db = Database()
        self.lock = self.db.lock
        disks = directory / "disks"
        disks.mkdir(parents=True, exist_ok=True)
        self.storage = Storage(disks)
        self.geometry: dict[str, Geometry] = {}
        self.certificates: dict[str, Certificate] = {}
        self.users = {"root": "root"}
        self.https_port = 443
        self.nbd_port = 10809
        self.counters: Counter[str] = Counter()
        self.closing = threading.Event()
        self.used: dict[str, float] = {}
        self.plugging: Counter[str] = Counter()
        self.sr_locks: dict[str, threading.Lock] = {}
        self.forgotten: dict[str, str] = {}
        self.cancellations: dict[str, threading.Event] = {}
        self.owners: dict[str, str] = {}
        self._counting = threading.Lock()

    # ── helpers ──────────────────────────────────────────────────────────────────────────

    def count(self, counter: str, amount: int = 1) -> None:
        """Add to a counter."""
        with self._counting:
            self.counters[counter] += amount

    def peak(self, counter: str, value: int) -> None:
        """Raise a counter to ``value`` if it is lower."""
        with self._counting:
            self.counters[counter] = max(self.counters[counter], value)

    def sleep(self, seconds: float, *, cancelled: threading.Event | None = None) -> None:
        """Wait, unless the pool is closed or the task is cancelled meanwhile.

        Raises:
            SimError: TASK_CANCELLED, or HOST_STILL_BOOTING when the pool closes.
        """
        if seconds <= 0:
            return
        if cancelled is not None and cancelled.wait(seconds):
            raise SimError("TASK_CANCELLED", NULL)
        if cancelled is None and self.closing.wait(seconds):
            raise SimError("HOST_STILL_BOOTING")

    @property
    def master(self) -> str:
        """The ref of the master host."""
        return self.db.text("pool", self.db.only("pool"), "master")

    def host_name(self, host_ref: str) -> str:
        """Return the name of a host."""
        return self.db.text("host", host_ref, "name_label")

    def dom0(self, host_ref: str) -> str:
        """Return the ref of a host's control domain."""
        return self.db.text("host", host_ref, "control_domain")

    def plugin(self, sr: str) -> Plugin:
        """Return what an SR can do."""
        return PLUGINS[self.db.text("SR", sr, "type")]

    def sees_sr(self, host_ref: str, sr: str) -> bool:
        """Return whether a host has an attached PBD of an SR."""
        return any(
            self.db.text("PBD", pbd, "host") == host_ref
            and self.db.flag("PBD", pbd, "currently_attached")
            for pbd in self.db.refs("SR", sr, "PBDs")
        )

    def message(self, name: str, *, kind: str, uuid: str, body: str, priority: int = 3) -> None:
        """Leave a message for people, as xapi does when tracking is lost."""
        self.db.create(
            "message",
            new_ref(),
            {
                "uuid": new_uuid(),
                "name": name,
                "priority": priority,
                "cls": kind,
                "obj_uuid": uuid,
                "timestamp": Timestamp.now(),
                "body": body,
            },
        )

    # ── keeping it ───────────────────────────────────────────────────────────────────────

    def save(self, *, clean: bool = False) -> None:
        """Write ``state.json``, atomically.

        Args:
            clean: the pool is being closed; otherwise a later ``restore`` is like the start
                after a power cut.
        """
        with self.lock:
            saved: Saved = {
                "version": 1,
                "clean": clean,
                "database": self.db.dump(),
                "storage": self.storage.dump(),
                "geometry": {k: (g.granularity, g.sector) for k, g in self.geometry.items()},
                "forgotten": self.forgotten,
            }
            scratch = self.directory / "state.json.new"
            scratch.write_text(json.dumps(saved), encoding="ascii")
            scratch.replace(self.directory / "state.json")
            self.storage.empty_trash()

    def restore(self) -> bool | None:
        """Read ``state.json``; return whether it was left clean, None if there is none."""
        path = self.directory / "state.json"
        if not path.exists():
            return None
        saved = cast(Saved, json.loads(path.read_text(encoding="ascii")))
        with self.lock:
            self.db.restore(saved["database"])
            self.storage.restore(saved["storage"])
            self.geometry = {k: Geometry(*pair) for k, pair in saved["geometry"].items()}
            self.forgotten = saved["forgotten"]
        return saved["clean"]


def new_uuid() -> str:
    """Return a uuid."""
    return str(uuids.uuid4())


def new_ref() -> str:
    """Return an opaque reference."""
    return f"OpaqueRef:{uuids.uuid4()}"
