"""``cbtfs clean`` after a sync or a mount was killed: what is ours goes, and nothing else does.

``contrib/soak/kill-clean`` kills it at every change that it makes in pool and store.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cbtfs import mountpoint
from cbtfs.owner import TAG_OWNER, Owned, write_owner

from .commands import Shell, items, leftovers
from .killmatrix import JOURNALED, Kind, Trial, open_trial
from .killpoints import Mode
from .killrun import Done
from .simulated import Api
from .smallvm import Small, running_small
from .test_mounted import User, is_gone

EVERY = int(os.environ.get("CBTFS_KILL_EVERY", "12"))
SEED = int(os.environ.get("CBTFS_SEED", str(time.time_ns())))

pytestmark = pytest.mark.timeout(300 + 3000 // EVERY)


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    place = tmp_path_factory.mktemp("clean")
    with open_trial(place, place / "store", seed=SEED) as opened:
        yield opened


def clean(trial: Trial, *arguments: str, at: int = 0) -> Done:
    config = ["--config", str(trial.small.pool.config), "--store", str(trial.store)]
    mode: Mode = "kill" if at else "count"
    return trial.runner.run(
        [*config, "clean", *arguments], root=trial.store, mode=mode, at=at, calls="changes"
    )


def kill_a_sync(trial: Trial, kind: Kind, at: int, *, match: str = "") -> None:
    trial.prepare(kind)
    done = trial.sync(mode="kill", at=at, match=match)
    assert done.killed or not match  # the number of points varies
    trial.look()


def assert_nothing_is_left(trial: Trial) -> None:
    left = leftovers(trial.small.pool)
    assert (left.snapshots, left.snapshot_vms, left.dom0_vbds) == ([], [], []), left
    assert not list(trial.store.glob("*/.partial-*"))
    done = clean(trial, "--partial")
    assert (done.status, done.out) == (0, "nothing to clean\n")
    trial.begun.clear()
    trial.forget_tasks()
    trial.assert_next_sync_is_right()


@pytest.mark.parametrize("kind", ["full", "incremental"])
def test_after_a_sync_was_killed_nothing_is_left(trial: Trial, kind: Kind) -> None:
    trace = trial.trace(kind)
    for at in trial.rng.sample(range(1, len(trace) + 1), max(2, 30 // EVERY)):
        kill_a_sync(trial, kind, at)
        bases = set(leftovers(trial.small.pool).bases)

        done = clean(trial, "--partial")

        assert done.status == 0, (trace[at - 1], done)
        assert bases <= set(leftovers(trial.small.pool).bases), "a base that is needed is gone"
        assert_nothing_is_left(trial)


def test_what_can_be_gone_on_with_stays_unless_it_is_asked_for(trial: Trial) -> None:
    kill_a_sync(trial, "full", 3, match=JOURNALED)
    before = leftovers(trial.small.pool)

    for arguments in ((), ("--partial", "-n"), ("--older-than", "7d")):
        done = clean(trial, *arguments)
        assert done.status == 0, done.err
        assert "v/" in done.out
        assert ("would remove" in done.out) == ("--partial" in arguments)
        assert ("goes on from there" in done.out) == ("--partial" not in arguments)
        left = leftovers(trial.small.pool)
        assert (left.snapshots, left.snapshot_vms) == (before.snapshots, before.snapshot_vms)
        assert len(list(trial.store.glob("*/.partial-*"))) == 1

    done = clean(trial, "--older-than", "0")
    assert done.status == 0, done.err
    assert leftovers(trial.small.pool).snapshots == []


def test_clean_is_killed_and_the_next_one_finishes(trial: Trial) -> None:
    kill_a_sync(trial, "full", 3, match=JOURNALED)
    points = clean(trial, "--partial").trace
    assert any("VM.destroy" in line for line in points)
    assert any("unlink" in line for line in points)
    trial.begun.clear()
    chosen = range(trial.rng.randrange(EVERY) + 1, len(points) + 1, EVERY)

    for at in chosen:
        kill_a_sync(trial, "full", 3, match=JOURNALED)
        killed = clean(trial, "--partial", at=at)
        trial.look()
        done = clean(trial, "--partial")
        assert done.status == 0, (at, killed.trace[-3:], done)
        assert_nothing_is_left(trial)
    print(f"killed at {len(chosen)} of {len(points)} points, seed {SEED}")  # noqa: T201 - with -s


# ── what is not ours, and what is ────────────────────────────────────────────────────────────


@dataclass
class Bystander:
    """Makes objects in a pool as other tools, and as cbtfs that was killed, would leave them."""

    small: Small

    @property
    def api(self) -> Api:
        return self.small.api

    def tag(self, kind: str, ref: str, **fields: str | int) -> str:
        """Write a tag of a dead process of this machine; return the ref."""
        facts: dict[str, str | int] = {
            "self_uuid": self.api.text(f"{kind}.get_uuid", ref),
            "role": "live",
            "host": socket.gethostname(),
            "boot": "an earlier one",
            **fields,
        }
        self.api.call(f"{kind}.add_to_other_config", ref, TAG_OWNER, text(facts))
        return ref

    def snapshot(self, disk: str = "v 0") -> str:
        return self.api.text("VDI.snapshot", self.small.disk(disk))

    def metadata(self) -> str:
        self.api.call("VDI.enable_cbt", self.small.disk("v 0"))
        ref = self.snapshot()
        self.api.call("VDI.data_destroy", ref)
        return ref

    def disk(self) -> str:
        sr = next(r for r, sr in self.api.records("SR").items() if sr["type"] == "nfs")
        none: dict[str, object] = {}
        record = {"name_label": "half", "SR": sr, "virtual_size": "4096", "type": "user"}
        rest = {"sharable": False, "read_only": False, "other_config": none}
        return self.api.text("VDI.create", {**record, **rest})

    def half_a_vm(self) -> tuple[str, str, str]:
        """Make a VM that is not finished, with a disk that is not either; return their refs."""
        vm = self.api.text("VM.create", {"name_label": "half", "name_description": ""})
        disk = self.tag("VDI", self.disk(), role="restored")
        return self.tag("VM", vm, role="restored"), disk, self.attach(disk, vm, mode="RW")

    def stick(self, vdi: str) -> str:
        """Attach a VDI to a control domain."""
        dom0 = next(r for r, vm in self.api.records("VM").items() if vm["is_control_domain"])
        vbd = self.attach(vdi, dom0, mode="RO")
        self.api.call("VBD.plug", vbd)
        return vbd

    def attach(self, vdi: str, vm: str, *, mode: str) -> str:
        none: dict[str, object] = {}
        record = {"VM": vm, "VDI": vdi, "userdevice": "autodetect", "mode": mode, "type": "Disk"}
        rest = {"bootable": False, "empty": False, "other_config": none, "unpluggable": True}
        qos = {"qos_algorithm_type": "", "qos_algorithm_params": none}
        return self.api.text("VBD.create", {**record, **rest, **qos})

    def everything(self) -> dict[str, set[str]]:
        kinds = ("VM", "VDI", "VBD", "task")
        return {kind: set(self.api.records(kind)) for kind in kinds}


def text(facts: dict[str, str | int]) -> str:
    return write_owner(Owned(**facts))  # type: ignore[arg-type]  # as the fields are


@pytest.fixture(scope="module")
def bystander(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bystander]:
    with running_small(tmp_path_factory.mktemp("small") / "pool") as small:
        yield Bystander(small)


@pytest.fixture
def shell(bystander: Bystander, tmp_path: Path) -> Shell:
    return Shell(bystander.small.pool, tmp_path / "store")


def test_only_what_is_tagged_as_ours_and_dead_goes(bystander: Bystander, shell: Shell) -> None:
    api = bystander.api
    shell.sync("v")
    bystander.metadata()
    bystander.stick(bystander.snapshot())
    bystander.tag("VDI", bystander.snapshot(), role="made")
    bystander.tag("VDI", bystander.snapshot(), self_uuid=bystander.small.uuid("v 0"))
    bystander.tag("VDI", bystander.snapshot(), host="elsewhere")
    bystander.tag("VDI", bystander.metadata(), role="base", store="another", vm="v")
    bystander.tag("VDI", bystander.small.disk("v 2"), role="base")
    bystander.stick(bystander.tag("VDI", bystander.snapshot(), boot=boot(), pid=os.getpid(),
                                  starttime=starttime()))  # fmt: skip
    api.text("task.create", "cbtfs: somebody else's", "")

    half = bystander.half_a_vm()
    ours = {
        "VDI": {
            bystander.tag("VDI", bystander.snapshot()),
            bystander.tag("VDI", bystander.disk(), role="restored"),
            bystander.tag("VDI", bystander.metadata(), role="base", store=store_uuid(shell),
                          vm=api.text("VM.get_uuid", bystander.small.vm)),
        },
        "task": {api.text("task.create", "cbtfs: ours", text(
            {"self_uuid": "", "role": "task", "host": socket.gethostname()}))},
        "VM": {half[0]},
        "VBD": {half[2], bystander.stick(bystander.tag("VDI", stuck := bystander.snapshot()))},
    }  # fmt: skip
    ours["VDI"] |= {stuck, half[1]}
    known = bystander.everything()
    dry = shell.json("clean", "-n")
    assert known == bystander.everything()

    told = shell.json("clean")

    for kind, refs in bystander.everything().items():
        assert known[kind] - refs == ours[kind], kind
    in_order = [[str(thing) for thing in items(one, "removed")] for one in (dry, told)]
    assert sorted(in_order[0]) == sorted(in_order[1])
    assert [len(items(told, key)) for key in ("removed", "failed")] == [8, 0]
    reasons = " ".join(str(thing["why"]) for thing in items(told, "left"))
    for part in ("--host elsewhere", "of another store, another", f"process {os.getpid()} is at"):
        assert part in reasons, reasons
    assert "nothing to clean" in shell.run("clean").stdout
    assert shell.sync("v")["xvda"]["method"] == "incremental"

    told = shell.json("clean", "--host", "elsewhere")
    assert [thing["what"] for thing in items(told, "removed")] == ["snapshot"]
    shell.run("clean", "--host", socket.gethostname(), status=2)


def boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def starttime() -> int:
    return int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])


def store_uuid(shell: Shell) -> str:
    store = shell.json("list")["store"]
    assert isinstance(store, dict)
    return str(store["uuid"])


def test_what_cannot_be_removed_is_told_and_stops_nothing_else(
    bystander: Bystander, shell: Shell
) -> None:
    for _ in range(2):
        bystander.tag("VDI", bystander.snapshot())
    bystander.small.pool.set("xapi.fail", "VDI.destroy*1:SR_BACKEND_FAILURE_46")

    done = shell.run("clean", status=3)

    assert "SR_BACKEND_FAILURE_46" in done.stderr
    assert (done.stdout.count("removed"), done.stdout.count("failed")) == (1, 1)
    assert shell.run("clean").stdout.count("removed") == 1
    bystander.small.pool.set("xapi.fail", "")


def test_a_sync_at_work_is_left_alone(bystander: Bystander, shell: Shell) -> None:
    pool = bystander.small.pool
    pool.set("nbd.delay", "1s")
    command = shell.command("sync", "--vm", "v")
    with subprocess.Popen(command, env=shell.env(), stderr=subprocess.DEVNULL) as process:
        while not list(shell.store.glob("*/.partial-*/*.raw")):
            assert process.poll() is None
            time.sleep(0.01)
        told = shell.json("clean", "--partial")
        pool.set("nbd.delay", "")

    assert told["removed"] == told["failed"] == []
    assert f"process {process.pid} is at work" in str(told["left"])
    assert process.returncode == 0
    shell.run("verify")


@pytest.mark.fuse
def test_the_snapshot_of_a_killed_mount_goes(bystander: Bystander, shell: Shell) -> None:
    user = User(bystander.small.pool, shell.store.parent)
    with user.mounted() as top:
        (top / "by-vm/v/xvda.raw").read_bytes()
        pid = user.pid
        assert f"process {pid} is at work" in shell.run("clean").stdout
        os.kill(pid, signal.SIGKILL)
        while not is_gone(pid):
            time.sleep(0.01)

        told = shell.json("clean")

    assert "snapshot" in {thing["what"] for thing in items(told, "removed")}
    assert mountpoint.find(user.top) is None
    assert "nothing to clean" in shell.run("clean").stdout


def test_without_the_pool_the_store_is_cleaned(tmp_path: Path) -> None:
    with running_small(tmp_path / "pool") as small:
        shell = Shell(small.pool, tmp_path / "store")
        shell.sync("v")
    (vm,) = (path.parent for path in shell.store.glob("*/latest"))
    (vm / ".partial-20261101T020000Z").mkdir()
    (vm / ".removed-20261101T020000Z").mkdir()
    (vm / ".removed-20261101T020000Z" / "xvda.raw").write_bytes(b"old")
    asked = vm / ".partial-20261102T020000Z"
    asked.mkdir()
    (asked / "intent.json").write_text(
        '{"time": "20261102T020000Z", "run": "1", "snapshot_name": "s", "vm_uuid": "v",'
        f' "host": "{socket.gethostname()}", "boot": "an earlier one"}}'
    )

    done = shell.run("clean", status=13)

    assert done.stdout.count("removed") >= 2
    assert "the pool has to be asked first" in done.stdout
    assert {path.name for path in vm.glob(".*-*")} == {asked.name}
