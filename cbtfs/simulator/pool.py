"""SimulatedPool: what the servers, the scenarios and the tests do with a pool."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from . import (
    api,
    attachments,
    commands,
    disasters,
    nbdinfo,
    operations,
    sessions,
    tasks,
    volumes,
)
from .attachments import Attachment
from .database import Database
from .disk import Disk
from .faults import Faults
from .state import Certificate, State
from .values import Record, Value

__all__ = [
    "Attachment",
    "Database",
    "Disk",
    "HostAddress",
    "LiveDisk",
    "Record",
    "SimulatedPool",
    "Value",
]


@dataclass(frozen=True)
class HostAddress:
    """A host as the servers need it; NBD addresses are IPv4 literals to listen on."""

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


class SimulatedPool(State):
    """A pool whose state lives in a directory; all methods may be called from any thread.

    Args:
        directory: for ``state.json`` and the disks; made if missing.
        faults: the settings; shared with whoever changes them.

    Attributes:
        faults: what the pool was told to get wrong.
        db: the records.
        lock: held while reading several records that belong together.
        users: names and passwords that may log in.
        https_port: where hosts take API calls.
        nbd_port: what ``get_nbd_info`` answers; set before the servers start.
    """

    def __init__(self, directory: Path, *, faults: Faults | None = None) -> None:
        super().__init__(directory, faults=faults)

    def load(self) -> bool:
        """Read what ``save`` wrote; False if there is nothing.

        If the pool was not closed it is as after a power cut: virtual machines are halted,
        and what was open for writing counts as crashed.
        """
        clean = self.restore()
        if clean is None:
            return False
        disasters.settle(self, crashed=not clean)
        return True

    def close(self) -> None:
        """End calls that wait, and save."""
        self.closing.set()
        with self.lock:
            self.db.changed.notify_all()
        self.save(clean=True)

    def hosts(self) -> list[HostAddress]:
        """Return the hosts, master first."""
        with self.lock:
            master = self.master
            refs = sorted(self.db.records("host"), key=lambda ref: ref != master)
            return [self._host(ref) for ref in refs]

    def set_certificate(self, host_ref: str, pem: str, *, subject: str) -> None:
        """Say what a host's servers show: for get_nbd_info and host.get_server_certificate."""
        self.certificates[host_ref] = Certificate(pem, subject)

    def nbd_mode(self) -> str:
        """Return ``nbd``, ``insecure_nbd``, or ``""`` for no purpose or both: NBD servers ask."""
        return nbdinfo.purpose(self)

    # ── attachments ──────────────────────────────────────────────────────────────────────

    def open_export(self, host_ref: str, exportname: str) -> Attachment:
        """Attach what ``/UUID?session_id=REF`` names in a host's dom0.

        Raises:
            SimError: anything is wrong.
        """
        return attachments.open_export(self, host_ref, exportname)

    def http_attach(
        self, host_ref: str, session: str, vdi: str, *, write: bool = False
    ) -> Attachment:
        """Attach a VDI (ref or uuid) for an HTTP handler.

        Raises:
            SimError: the session or the VDI is no good, or it is in use.
        """
        sessions.check(self, session)
        with self.lock:
            ref = self.find_vdi(vdi)
            operations.check(self, ref, "destroy" if write else "copy")
        return attachments.open_in_dom0(self, host_ref, ref, mode="RW" if write else "RO")

    def sees(self, host_ref: str, vdi: str) -> str:
        """Return ``host_ref`` if it sees the VDI's SR, else a host that does, "" if none."""
        with self.lock:
            sr = self.db.text("VDI", self.find_vdi(vdi), "SR")
            candidates = [host_ref, *self.db.records("host")]
            return next((host for host in candidates if self.sees_sr(host, sr)), "")

    def find_vdi(self, name: str) -> str:
        """Return the ref of a VDI named by ref or uuid.

        Raises:
            SimError: HANDLE_INVALID or UUID_INVALID.
        """
        with self.lock:
            if name.startswith("OpaqueRef:"):
                self.db.record("VDI", name)
                return name
            return self.db.by_uuid("VDI", name)

    def disk(self, vdi_ref: str) -> Disk:
        """Return the contents of a VDI.

        Raises:
            SimError: HANDLE_INVALID.
        """
        with self.lock:
            return volumes.disk_of(self, vdi_ref)

    def live_disks(self) -> list[LiveDisk]:
        """Return the writable disks of running VMs."""
        found: list[LiveDisk] = []
        with self.lock:
            for vbd, record in self.db.records("VBD").items():
                vm = str(record["VM"])
                open_for_writing = record["currently_attached"] and record["mode"] == "RW"
                if not open_for_writing or record["type"] != "Disk":
                    continue
                owner = self.db.record("VM", vm)
                if owner["is_control_domain"] or owner["is_a_snapshot"]:
                    continue
                disk = volumes.disk_of(self, self.db.text("VBD", vbd, "VDI"))
                device = str(record["device"])
                found.append(LiveDisk(str(owner["uuid"]), str(owner["name_label"]), device, disk))
        return found

    def generation(self) -> int:
        """Return a number that grows with every change of a record, until xapi restarts."""
        return self.db.generation

    # ── sessions, tasks and calls ────────────────────────────────────────────────────────

    def login(self, user: str, password: str, *, host_ref: str, originator: str = "") -> str:
        """Return a new session's ref; HTTP Basic uses this too.

        Raises:
            SimError: HOST_IS_SLAVE, SESSION_AUTHENTICATION_FAILED.
        """
        return sessions.login(self, user, password, host=host_ref, originator=originator)

    def logout(self, session: str) -> None:
        """End a session."""
        sessions.logout(self, session)

    def check_session(self, session: str, *, host_ref: str = "") -> None:
        """Return if a session is valid.

        Raises:
            SimError: SESSION_INVALID; with ``host_ref`` HOST_IS_SLAVE on a supporter.
        """
        sessions.check(self, session, host=host_ref)

    def task_create(self, session: str, label: str) -> str:
        """Return the ref of a new pending task."""
        return tasks.create(self, label, session=session)

    def task_progress(self, task: str, progress: float) -> None:
        """Set how far a task is, from 0 to 1."""
        tasks.progress(self, task, progress)

    def task_finish(self, task: str, result: str = "") -> None:
        """Complete a task; ``result`` is XML text such as ``<value>OpaqueRef:…</value>``."""
        tasks.finish(self, task, result=result)

    def task_fail(self, task: str, failure: Exception) -> None:
        """Fail a task; what is not a SimError becomes INTERNAL_ERROR."""
        tasks.fail(self, task, failure)

    def call(self, method: str, *params: Value, host_ref: str = "", session: str = "") -> Value:
        """Carry out an API call inside the process; ``params`` without the session.

        Raises:
            SimError: what the call fails with; ordered faults do not apply.
        """
        return api.invoke(self, method, params, host=host_ref or self.master, session=session)

    # ── what happens to a pool ───────────────────────────────────────────────────────────

    def promote(self, host_ref: str) -> None:
        """Make a host the master: sessions and tasks are lost, event tokens void."""
        disasters.promote(self, host_ref)

    def restart_xapi(self) -> None:
        """Restart xapi: sessions and tasks are lost, event tokens void; disks stay open."""
        disasters.restart_xapi(self)

    def crash_host(self, host_ref: str) -> None:
        """Let a host die with everything that runs on it."""
        disasters.crash_host(self, host_ref)

    def control(self, command: str, *args: str) -> object:
        """Carry out a command of the simulator, see ``commands``; the answer fits into JSON.

        Raises:
            UsageError: no such command or object.
        """
        return commands.run(self, command, args)

    def counts(self) -> Mapping[str, int]:
        """Return the counters."""
        return MappingProxyType(dict(self.counters))

    def _host(self, ref: str) -> HostAddress:
        pifs = self.db.refs("host", ref, "PIFs")
        addresses = (self.db.text("PIF", pif, "IP") for pif in pifs)
        return HostAddress(
            ref=ref,
            uuid=self.db.text("host", ref, "uuid"),
            name=self.db.text("host", ref, "name_label"),
            hostname=self.db.text("host", ref, "hostname"),
            address=self.db.text("host", ref, "address"),
            nbd_addresses=tuple(dict.fromkeys(filter(None, addresses))),
        )
