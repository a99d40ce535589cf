"""A running pool with many small VMs: ``a00`` … and ``b00`` …, two disks each, on two hosts.

All disks are on the SR that both hosts have, and hold a few blocks of bytes that tell where they
are from.
"""

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cbtfs import units
from cbtfs.simulator.builder import Builder
from cbtfs.simulator.memory import FIRST_ADDRESS
from cbtfs.simulator.pool import SimulatedPool
from cbtfs.simulator.topology import build_topology

from .simulated import RunningPool, running_pool

SIZE = 32 * units.MiB
STRIDE = 256 * units.KiB
"""From one changed block to the next: too far for both to be read in one go."""

FILLED = 4
"""Blocks of each disk that hold something from the beginning."""

NAMES = tuple(f"{letter}{number:02d}" for letter in "ab" for number in range(10))
DEVICES = ("xvda", "xvdb")


@contextmanager
def running(directory: Path, *, per_host: int) -> Iterator[RunningPool]:
    """Run the pool; its configuration allows ``per_host`` connections to each host."""
    build(directory)
    with running_pool(directory) as pool:
        text = pool.config.read_text()
        limited = text.replace("[store.", f"connections_per_host = {per_host}\n[store.", 1)
        assert limited != text
        pool.config.write_text(limited)
        yield pool


def build(directory: Path) -> None:
    """Make the pool's state in ``directory``."""
    directory.mkdir()
    pool = SimulatedPool(directory)
    builder = Builder(pool, seed="many")
    topology = build_topology(builder, address=FIRST_ADDRESS)
    for number, name in enumerate(NAMES):
        vm = builder.add_vm(name, running_on=topology.hosts[number % 2])
        for position, device in enumerate(DEVICES):
            vdi = builder.add_vdi(topology.shared, f"{name} {device}", size=SIZE, cbt=True)
            for block in range(FILLED):
                pool.disk(vdi).write(block * STRIDE, content(name, device, block))
            builder.add_vbd(vm, vdi, userdevice=str(position))
        builder.start(vm)
    pool.close()


def content(name: str, device: str, block: int, *, generation: int = 0) -> bytes:
    """Return what a block holds: 64 KiB unlike any other's."""
    seed = struct.pack(">8s4sHH", name.encode(), device.encode(), block, generation)
    return seed * (64 * units.KiB // len(seed))


def change(pool: RunningPool, names: Sequence[str], *, blocks: int, generation: int) -> None:
    """Write ``blocks`` scattered blocks of every disk of the VMs ``names``, as their guests."""
    for name in names:
        for device in DEVICES:
            guest = pool.open_guest(name, device)
            for block in range(blocks):
                data = content(name, device, block, generation=generation)
                guest.pwrite(data, block * STRIDE)
            guest.shutdown()
