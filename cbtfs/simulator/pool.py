"""SimulatedPool: hosts, storage and records of a pool. (Skeleton: signatures are final.)"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .disk import Disk
from .faults import Faults

Value = bool | int | float | str | list["Value"] | dict[str, "Value"]
Record = dict[str, Value]


class Database:
    """The pool's records: class name → ref → record."""

    def record(self, kind: str, ref: str) -> Record:
        """Return the record of ``ref`` (class as in xapi: ``VM``, ``VDI``, ``host``, ``pool``)."""
        raise NotImplementedError

    def records(self, kind: str) -> Mapping[str, Record]:
        """Return all records of a class by ref."""
        raise NotImplementedError

    def by_uuid(self, kind: str, uuid: str) -> str:
        """Return the ref; SimError UUID_INVALID."""
        raise NotImplementedError


@dataclass(frozen=True)
class HostAddress:
    """A host as the servers need it: all NBD addresses are IPv4 literals to listen on."""

    ref: str
    uuid: str
    name: str
    hostname: str
    address: str
    nbd_addresses: tuple[str, ...]


@dataclass(frozen=True)
class LiveDisk:
    """A writable disk of a running VM."""

    vm_uuid: str
    vm_name: str
    device: str
    disk: Disk


class Attachment:
    """A VDI attached in a host's dom0; ``close`` unplugs (after nbd.detach_delay), idempotent."""

    vdi_ref: str
    vdi_uuid: str
    disk: Disk
    size: int
    sector: int

    def pread_into(self, offset: int, view: memoryview) -> None:
        """Read as ``disk`` does, and count the bytes."""
        raise NotImplementedError

    def close(self) -> None:
        """Unplug and destroy the VBD."""
        raise NotImplementedError

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SimulatedPool:
    """A pool whose state lives in a directory."""

    directory: Path
    faults: Faults
    db: Database
    lock: threading.RLock
    users: dict[str, str]  # name → password of local accounts
    https_port: int
    nbd_port: int  # set before the servers start; get_nbd_info answers it

    def __init__(self, directory: Path, *, faults: Faults | None = None) -> None:
        raise NotImplementedError

    def save(self) -> None:
        """Write state.json and the logs; atomic."""
        raise NotImplementedError

    def load(self) -> bool:
        """Read them; False if there are none. If the pool was not closed: as after a power cut."""
        raise NotImplementedError

    def close(self) -> None:
        """End waiting calls, save, close files."""
        raise NotImplementedError

    def hosts(self) -> list[HostAddress]:
        """Return the hosts, master first."""
        raise NotImplementedError

    def set_certificate(self, host_ref: str, pem: str, *, subject: str) -> None:
        """Say what a host's servers show: for get_nbd_info and host.get_server_certificate."""
        raise NotImplementedError

    def nbd_mode(self) -> str:
        """Return ``nbd``, ``insecure_nbd`` or ``""`` (no purpose, or both): NBD servers ask this."""
        raise NotImplementedError

    def open_export(self, host_ref: str, exportname: str) -> Attachment:
        """Attach what ``/<uuid>?session_id=<ref>`` names in that host's dom0; SimError on anything."""
        raise NotImplementedError

    def http_attach(
        self, host_ref: str, session: str, vdi: str, *, write: bool = False
    ) -> Attachment:
        """Attach a VDI (ref or uuid) for an HTTP handler; SimError."""
        raise NotImplementedError

    def sees(self, host_ref: str, vdi: str) -> str:
        """Return host_ref if it has the VDI's SR attached, else another host that has (for the 302)."""
        raise NotImplementedError

    def find_vdi(self, name: str) -> str:
        """Return the ref for a ref or uuid; SimError HANDLE_INVALID/UUID_INVALID."""
        raise NotImplementedError

    def login(self, user: str, password: str, *, host_ref: str, originator: str = "") -> str:
        """Return a new session ref (HTTP Basic uses it too); SimError."""
        raise NotImplementedError

    def logout(self, session: str) -> None:
        """End a session."""
        raise NotImplementedError

    def check_session(self, session: str, *, host_ref: str = "") -> None:
        """SimError SESSION_INVALID; with host_ref HOST_IS_SLAVE on a supporter."""
        raise NotImplementedError

    def task_create(self, session: str, label: str) -> str:
        """Return a pending task's ref."""
        raise NotImplementedError

    def task_progress(self, task: str, progress: float) -> None:
        """Set progress, 0 to 1."""
        raise NotImplementedError

    def task_finish(self, task: str, result: str = "") -> None:
        """Finish a task; ``result`` is the XML text, such as ``<value>OpaqueRef:…</value>``."""
        raise NotImplementedError

    def task_fail(self, task: str, failure: Exception) -> None:
        """Fail a task; a SimError gives error_info, others INTERNAL_ERROR."""
        raise NotImplementedError

    def call(self, method: str, *params: Value, host_ref: str = "", session: str = "") -> Value:
        """Carry out an API call inside the process (for scenarios, import handlers, tests).

        ``params`` without the session; without ``session`` with all rights.
        """
        raise NotImplementedError

    def live_disks(self) -> list[LiveDisk]:
        """Return the writable disks of running VMs."""
        raise NotImplementedError

    def generation(self) -> int:
        """Return a number that grows with every change of a record."""
        raise NotImplementedError

    def disk(self, vdi_ref: str) -> Disk:
        """Return the contents of a VDI."""
        raise NotImplementedError

    def promote(self, host_ref: str) -> None:
        """Make a host the master: sessions and tasks are lost."""
        raise NotImplementedError

    def restart_xapi(self) -> None:
        """Restart xapi: sessions and tasks are lost."""
        raise NotImplementedError

    def control(self, command: str, *args: str) -> object:
        """Carry out a command of the simulator (not of xapi); JSON-able answer."""
        raise NotImplementedError

    def count(self, counter: str, amount: int = 1) -> None:
        """Add to a counter, such as ``nbd.connections``; ``counters`` shows them."""
        raise NotImplementedError
