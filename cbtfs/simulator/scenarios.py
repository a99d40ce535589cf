"""Scenarios: what a fresh simulated pool holds.

``default``
    Two hosts, every kind of SR, and VMs worth reading: `default_scenario`.
``speed``
    One running VM ``bench`` with a 2 GiB disk of bytes that don't compress.
``large``
    500 VMs with 20 sparse disks each: 10,000 VDIs.
``huge``
    One running VM ``huge`` with a sparse disk of 16 TiB, data at its start, middle and end.
``empty``
    Hosts, networks and SRs, but no VM.

Two builds of a scenario are equal, to the uuids and the last byte.
"""

from collections.abc import Callable

from . import default_scenario, filesystem, memory
from .builder import Builder
from .memory import FIRST_ADDRESS
from .pool import Record, SimulatedPool
from .topology import Topology, build_topology

__all__ = ["SCENARIOS", "build"]

MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40

BENCH_SIZE = 2 * GiB
HUGE_SIZE = 16 * TiB
_STRIDE = 3989
LARGE_VMS = 500
LARGE_DISKS = 20


def _empty(builder: Builder, topology: Topology) -> None:
    """Add nothing."""


def _speed(builder: Builder, topology: Topology) -> None:
    vdi = builder.add_vdi(topology.shared, "bench disk", size=BENCH_SIZE, cbt=True)
    disk = builder.pool.disk(vdi)
    # slices of one piece of noise, never on a multiple of anything: no two blocks are equal
    noise = memoryview(filesystem.noise("bench", BENCH_SIZE // MiB * _STRIDE + MiB))
    for number in range(BENCH_SIZE // MiB):
        disk.write(number * MiB, noise[number * _STRIDE :][:MiB])
    vm = builder.add_vm("bench", running_on=topology.hosts[0])
    builder.add_vbd(vm, vdi, userdevice="0", bootable=True)
    builder.start(vm)


def _large(builder: Builder, topology: Topology) -> None:
    for number in range(LARGE_VMS):
        name = f"vm{number:03d}"
        vm = builder.add_vm(name, running_on=topology.hosts[number % 2] if number < 4 else "")
        for device in range(LARGE_DISKS):
            sr = topology.shared if device else topology.local[number % 2]
            vdi = builder.add_vdi(sr, f"{name} disk {device}", size=8 * GiB, cbt=device % 2 == 0)
            builder.add_vbd(vm, vdi, userdevice=str(device))
        if number < 4:
            builder.start(vm)


def _huge(builder: Builder, topology: Topology) -> None:
    fields: Record = {"sm_config": {"image-format": "qcow2"}}
    vdi = builder.add_vdi(topology.shared, "huge disk", size=HUGE_SIZE, cbt=True, fields=fields)
    disk = builder.pool.disk(vdi)
    for offset in (0, MiB, HUGE_SIZE // 2, HUGE_SIZE - MiB):
        disk.write(offset, filesystem.noise(f"huge {offset}", MiB))
    vm = builder.add_vm("huge", running_on=topology.hosts[0])
    builder.add_vbd(vm, vdi, userdevice="0")
    builder.start(vm)


SCENARIOS: dict[str, Callable[[Builder, Topology], None]] = {
    "default": default_scenario.populate,
    "empty": _empty,
    "huge": _huge,
    "large": _large,
    "speed": _speed,
}


def build(pool: SimulatedPool, name: str, *, address: str = FIRST_ADDRESS) -> None:
    """Fill an empty pool with the scenario ``name``.

    Args:
        pool: without any record.
        name: a key of `SCENARIOS`.
        address: of the first host; the second follows it, NBD networks are ten further.

    Raises:
        UsageError: no such scenario.
    """
    memory.check_name(name)
    builder = Builder(pool, seed=f"cbtfs {name}")
    SCENARIOS[name](builder, build_topology(builder, address=address))
    for sr in pool.db.records("SR"):  # so that the records tell what was written
        pool.call("SR.scan", sr)
