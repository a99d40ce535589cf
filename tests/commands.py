"""The real ``cbtfs`` command against a simulated pool, as a user at a shell would run it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .simulated import Api, RunningPool


@dataclass(frozen=True)
class Shell:
    """Runs ``cbtfs --config … `` for one pool, with a store of its own."""

    pool: RunningPool
    store: Path

    def run(self, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a command; fail unless it ends with ``status``."""
        done = subprocess.run(
            self.command(*arguments), check=False, capture_output=True, text=True, env=self.env()
        )
        assert done.returncode == status, f"{arguments}: {done.returncode}\n{done.stderr}"
        return done

    def json(self, *arguments: str, status: int = 0) -> dict[str, object]:
        """Run a command with ``--json``; return its document."""
        document: object = json.loads(self.run("--json", *arguments, status=status).stdout)
        assert isinstance(document, dict)
        assert document["schema"] == 1
        return document

    def command(self, *arguments: str) -> list[str]:
        """Return the whole command line."""
        config = ["--config", str(self.pool.config), "--store", str(self.store)]
        return [sys.executable, "-m", "cbtfs", *config, *arguments]

    def env(self) -> dict[str, str]:
        """Return an environment in which nothing learned about another pool is found."""
        return os.environ | {"XDG_STATE_HOME": str(self.store.parent / "state")}

    def sync(self, vm: str, *arguments: str, status: int = 0) -> dict[str, dict[str, object]]:
        """Sync a VM; return what is told of its disks, by device."""
        (told,) = items(self.json("sync", "--vm", vm, *arguments, status=status), "vms")
        assert told["vm"] == vm
        return {str(disk["device"]): disk for disk in items(told, "disks")}

    def image(self, vm: str, device: str, point: str = "latest") -> Path:
        """Return the image of a disk in a point."""
        return self.store / "by-name" / vm / point / f"{device}.raw"


def items(document: dict[str, object], key: str) -> list[dict[str, object]]:
    """Return the list of objects under ``key``."""
    found = document[key]
    assert isinstance(found, list)
    assert all(isinstance(item, dict) for item in found)
    return found


def number(record: dict[str, object], key: str) -> int:
    """Return the whole number under ``key``."""
    value = record[key]
    assert isinstance(value, int)
    return value


def guest_content(pool: RunningPool, vm: str, device: str, target: Path) -> bytes:
    """Return what the guest reads from its disk, by way of nbdcopy."""
    subprocess.run(["nbdcopy", pool.guest(vm, device), str(target)], check=True)
    content = target.read_bytes()
    target.unlink()
    return content


@dataclass(frozen=True)
class Leftovers:
    """What of ours, or of control domains, a pool holds."""

    bases: list[str]
    snapshots: list[str]
    snapshot_vms: list[str]
    dom0_vbds: list[str]
    tasks: list[str]


def leftovers(pool: RunningPool) -> Leftovers:
    """Look at the pool as a third party: tags, VBDs of control domains, tasks."""
    api = Api(pool).login()
    vms = api.records("VM")
    tagged = {
        r: v for r, v in api.records("VDI").items() if "cbtfs:owner" in str(v["other_config"])
    }
    control_domains = {ref for ref, vm in vms.items() if vm["is_control_domain"]}
    return Leftovers(
        bases=[str(v["snapshot_of"]) for v in tagged.values() if v["type"] == "cbt_metadata"],
        snapshots=[str(v["uuid"]) for v in tagged.values() if v["type"] != "cbt_metadata"],
        snapshot_vms=[
            str(vm["uuid"])
            for vm in vms.values()
            if "cbtfs:owner" in str(vm["other_config"])
            or str(vm["name_label"]).startswith("cbtfs ")
        ],
        dom0_vbds=[r for r, v in api.records("VBD").items() if v["VM"] in control_domains],
        tasks=[r for r, task in api.records("task").items() if task["name_label"]],
    )
