"""Hostile names through a whole sync: nothing is written outside the store, all is found again."""

import os
from pathlib import Path

import pytest

from .commands import Shell, items
from .simulated import Api, running_pool

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
