"""A running pool with one small VM: ``v``, with the disks ``v 0``, ``v 1``, …"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cbtfs import units

from .commands import leftovers
from .simulated import Api, RunningPool, running_pool

SIZE = 4 * units.MiB


@dataclass(frozen=True)
class Small:
    """A pool with the VM ``v``, and what a test does to it."""

    pool: RunningPool
    api: Api
    vm: str

    def add_disk(self, name: str, number: int, *, size: int = SIZE, sr: str = "") -> str:
        """Make a disk, on the shared SR if no ref is given, and plug it in; return its ref."""
        sr = sr or next(r for r, sr in self.api.records("SR").items() if sr["type"] == "nfs")
        record = {"name_label": name, "SR": sr, "virtual_size": str(size), "type": "user"}
        none: dict[str, object] = {}
        rest = {"sharable": False, "read_only": False, "other_config": none}
        vdi = self.api.text("VDI.create", {**record, **rest})
        self.attach(vdi, number)
        return vdi

    def attach(self, vdi: str, number: int) -> None:
        """Plug a disk into ``v``."""
        record = {"VM": self.vm, "VDI": vdi, "userdevice": str(number), "mode": "RW"}
        none: dict[str, object] = {}
        rest = {"type": "Disk", "bootable": False, "empty": False, "other_config": none}
        qos = {"qos_algorithm_type": "", "qos_algorithm_params": none, "unpluggable": True}
        vbd = self.api.text("VBD.create", {**record, **rest, **qos})
        if self.api.text("VM.get_power_state", self.vm) == "Running":
            self.api.call("VBD.plug", vbd)

    def detach(self, vdi: str) -> None:
        """Unplug a disk from ``v``."""
        for ref, vbd in self.api.records("VBD").items():
            if (vbd["VM"], vbd["VDI"]) == (self.vm, vdi):
                self.api.call("VBD.unplug", ref)
                self.api.call("VBD.destroy", ref)

    def disk(self, name: str) -> str:
        """Return the ref of the live disk called ``name``."""
        (ref,) = (
            ref
            for ref, vdi in self.api.records("VDI").items()
            if vdi["name_label"] == name and vdi["managed"] and not vdi["is_a_snapshot"]
        )
        return ref

    def uuid(self, name: str) -> str:
        """Return the uuid of the live disk called ``name``."""
        return self.api.text("VDI.get_uuid", self.disk(name))

    def bases(self) -> list[str]:
        """Return the names of the disks that have a base, once for each base."""
        names = {ref: str(vdi["name_label"]) for ref, vdi in self.api.records("VDI").items()}
        return sorted(names[str(v["snapshot_of"])] for v in self._snapshots(metadata=True))

    def snapshots(self) -> list[str]:
        """Return the names of the snapshots that have data, of VDIs and VMs, whoever made them."""
        vms = [v for v in self.api.records("VM").values() if v["is_a_snapshot"]]
        return sorted(str(v["name_label"]) for v in (*self._snapshots(metadata=False), *vms))

    def _snapshots(self, *, metadata: bool) -> list[dict[str, object]]:
        found = [v for v in self.api.records("VDI").values() if v["is_a_snapshot"]]
        return [v for v in found if (v["type"] == "cbt_metadata") is metadata]


@contextlib.contextmanager
def running_small(directory: Path, *, sizes: Sequence[int] = (SIZE, SIZE, SIZE)) -> Iterator[Small]:
    """Run a pool in ``directory`` whose VM ``v`` runs with disks of these sizes, in bytes."""
    with running_pool(directory, "empty") as pool:
        api = Api(pool).login()
        vm = api.text("VM.create", {"name_label": "v", "name_description": ""})
        made = Small(pool, api, vm)
        for number, size in enumerate(sizes):
            made.add_disk(f"v {number}", number, size=size)
        api.call("VM.start", vm, False, False)
        yield made


QUICKLY = "20ms"
"""How long the data of a snapshot stays undestroyed, where nobody tests that."""


@contextlib.contextmanager
def tidied(small: Small) -> Iterator[None]:
    """Switch all faults off in the end, and fail if something made for reading is still there."""
    yield
    for key in small.pool.faults():
        small.pool.set(key, "")
    small.pool.set("vdi.data_destroy_wait", QUICKLY)
    left = leftovers(small.pool)
    assert (left.snapshots, left.dom0_vbds) == ([], [])
