"""Hostile names through a whole sync: nothing is written outside the store, all is found again."""

import os
from pathlib import Path

import pytest

from cbtfs.simulator.builder import Builder
from cbtfs.simulator.memory import FIRST_ADDRESS
from cbtfs.simulator.pool import SimulatedPool
from cbtfs.simulator.topology import build_topology

from .commands import Shell, items
from .simulated import Api, running_pool

SIZE = 4 << 20

pytestmark = pytest.mark.timeout(300)


def everything_below(top: Path) -> set[str]:
    """Return the paths of all files that are no part of a store or a pool."""
    return {
        f"{folder}/{name}"
        for folder, folders, names in os.walk(top)
        if not {"store", "pool", "state"} & set(Path(folder).relative_to(top).parts)
        for name in (*folders, *names)
    }


def test_every_vm_of_the_pool_is_synced_whatever_its_name(tmp_path: Path) -> None:
    with running_pool(tmp_path / "pool") as pool:
        shell = Shell(pool, tmp_path / "store")
        (tmp_path / "state").mkdir()
        (tmp_path / "store").mkdir()
        before = everything_below(tmp_path)
        live = [
            vm
            for vm in Api(pool).login().records("VM").values()
            if not (vm["is_a_snapshot"] or vm["is_a_template"] or vm["is_control_domain"])
        ]

        # disks shared between VMs and those reset at boot cannot be synced: left out
        told = items(shell.json("-q", "sync", "--vm", "*"), "vms")

        assert everything_below(tmp_path) == before
        assert {vm["uuid"] for vm in told} == {vm["uuid"] for vm in live}
        assert {"../../etc", "a/b", "", ".", ".."} <= {vm["vm"] for vm in told}
        assert {vm["vm"] for vm in told if vm["point"] is None} == {"kiosk", "node-a", "node-b"}
        shell.run("verify")
        folders = {path.name for path in shell.store.iterdir()}
        for entry in (shell.store / "by-name").iterdir():
            assert entry.is_symlink()
            assert entry.readlink().name in folders
            assert entry.resolve().parent == shell.store.resolve()
        listed = items(shell.json("list"), "vms")
        assert {vm["uuid"] for vm in listed} == {vm["uuid"] for vm in told if vm["point"]}


def test_a_disk_of_an_impossible_size_has_no_point_and_stops_no_other(tmp_path: Path) -> None:
    sizes = {"none": 0, "negative": -4096, "huge": 1 << 63, "good": SIZE}
    (tmp_path / "pool").mkdir()
    made = SimulatedPool(tmp_path / "pool")
    builder = Builder(made, seed="sizes")
    topology = build_topology(builder, address=FIRST_ADDRESS)
    for name, size in sizes.items():
        vdi = builder.add_vdi(topology.shared, name, size=SIZE)
        builder.add_vbd(builder.add_vm(name), vdi, userdevice="0")
        with made.db.changed:
            made.db.set("VDI", vdi, virtual_size=size)
    made.close()
    with running_pool(tmp_path / "pool") as pool:
        told = items(Shell(pool, tmp_path / "store").json("sync", "--vm", "*", status=3), "vms")

    assert {vm["vm"] for vm in told if vm["point"]} == {"good"}
    said = [str(vm["error"]) for vm in told if not vm["point"]]
    assert all("bytes, which no disk has" in text for text in said)
    assert len(said) == len(sizes) - 1
