"""Pruning a real store: what goes, what stays, and what a kill in between leaves."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from cbtfs import errors, prune, store as stores
from cbtfs.catalogue import VMHistory
from cbtfs.retention import Keep
from cbtfs.store import Store

from .commands import Shell, items, leftovers
from .smallvm import running_small
from .test_store import OTHER, VM, commit, noise

TIMES = [f"202611{day:02}T020000Z" for day in range(10, 16)]
CONTENT = noise(3 << 16)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "store"
    with stores.open_store(root) as store:
        for time in TIMES:
            commit(store, time=time, content=CONTENT)
    return root


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with stores.open_store(root) as opened:
        yield opened


def times(root: Path, vm: str = VM) -> list[str]:
    return [name for name in names(root, vm) if name[0] == "2"]


def names(root: Path, vm: str = VM) -> list[str]:
    return sorted(path.name for path in (root / vm).iterdir())


def history(store: Store) -> VMHistory:
    found = store.history(VM)
    assert found is not None
    return found


def cbtfs(root: Path, *arguments: str, status: int = 0, config: str = "") -> str:
    """Run the command; return what it printed, or what it said if it failed."""
    file = root.parent / "cbtfs.toml"
    file.write_text(config)
    command = [sys.executable, "-m", "cbtfs", "--config", str(file), "--store", str(root)]
    done = subprocess.run([*command, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


def document(root: Path, *arguments: str, config: str = "") -> dict[str, object]:
    found: dict[str, object] = json.loads(cbtfs(root, "--json", *arguments, config=config))
    return found


# ── prune ──


def test_what_no_rule_keeps_is_gone_and_all_else_is_whole(root: Path, store: Store) -> None:
    found = prune.prune(store, VM, Keep(last=2))

    assert [verdict.kept for verdict in found] == [False] * 4 + [True] * 2
    assert times(root) == TIMES[-2:]
    assert not any(name.startswith(".removed") for name in names(root))
    for point in store.catalogue().vms[VM].points:
        reference = store.catalogue().resolve(f"web1/{point.time}")
        assert not store.verify(reference).damaged
    assert (root / VM / "latest").readlink() == Path(TIMES[-1])


def test_verdicts_alone_change_nothing(root: Path, store: Store) -> None:
    prune.verdicts(store, history(store), Keep(last=1))

    assert times(root) == TIMES


def test_a_pinned_point_stays_until_it_is_unpinned(root: Path, store: Store) -> None:
    assert store.pin(VM, TIMES[0], wanted=True)
    assert not store.pin(VM, TIMES[0], wanted=True)
    prune.prune(store, VM, Keep(last=1))
    assert times(root) == [TIMES[0], TIMES[-1]]

    assert store.pin(VM, TIMES[0], wanted=False)
    prune.prune(store, VM, Keep(last=1))
    assert times(root) == [TIMES[-1]]


def test_a_point_pinned_at_the_last_moment_stays(
    root: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {
        time: replace(known, pinned=False) for time, known in store.facts(history(store)).items()
    }
    store.pin(VM, TIMES[1], wanted=True)
    monkeypatch.setattr(Store, "facts", lambda *_: facts)

    found = prune.prune(store, VM, Keep(last=1))

    assert times(root) == [TIMES[1], TIMES[-1]]
    assert found[1].reasons == ("pinned",)


def test_a_point_with_an_open_image_stays(root: Path, store: Store) -> None:
    with (root / VM / TIMES[2] / "xvda.raw").open("rb"):
        found = prune.prune(store, VM, Keep(last=1))

    assert found[2].reasons == ("open",)
    assert times(root) == [TIMES[2], TIMES[-1]]


@contextmanager
def looped(path: Path) -> Iterator[None]:
    device = subprocess.check_output(["losetup", "-f", "-r", "--show", path], text=True).strip()
    try:
        yield
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a loop device")
def test_a_point_behind_a_loop_device_stays(root: Path, store: Store) -> None:
    with looped(root / VM / TIMES[3] / "xvda.raw"):
        found = prune.prune(store, VM, Keep(last=1))

    assert found[3].reasons == ("open",)


def test_while_somebody_syncs_the_vm_nothing_is_removed(root: Path, store: Store) -> None:
    with store.lock(VM), stores.open_store(root) as other, pytest.raises(errors.StoreLocked):
        prune.prune(other, VM, Keep(last=1))

    assert times(root) == TIMES


def test_what_a_killed_run_began_is_finished(root: Path, store: Store) -> None:
    (root / VM / TIMES[0]).rename(root / VM / f".removed-{TIMES[0]}")
    (root / VM / f".removed-{TIMES[0]}" / "xvda.b3").unlink()

    assert [p.time for p in history(store).points] == TIMES[1:]
    prune.prune(store, VM, Keep(last=9))

    assert times(root) == TIMES[1:]
    assert not (root / VM / f".removed-{TIMES[0]}").exists()


def test_points_removed_by_hand_are_no_matter(root: Path, store: Store) -> None:
    subprocess.run(["rm", "-r", root / VM / TIMES[1], root / VM / TIMES[5]], check=True)

    found = prune.prune(store, VM, Keep(last=2))

    assert [v.point.time for v in found if v.kept] == [TIMES[3], TIMES[4]]


_KILLED = """
import os, sys
from pathlib import Path
from cbtfs import prune, store
from cbtfs.retention import Keep

number = int(sys.argv[2])

def hook(event, args):
    global number
    if event in {"os.rename", "os.remove", "os.rmdir", "os.scandir", "open", "os.listdir"}:
        number -= 1
        if not number:
            os.kill(os.getpid(), 9)

with store.open_store(Path(sys.argv[1])) as opened:
    sys.addaudithook(hook)
    prune.prune(opened, sys.argv[3], Keep(last=2))
    opened.pin(sys.argv[3], sys.argv[4], wanted=True)
"""


@pytest.mark.timeout(120)
def test_killed_at_any_file_it_touches_a_second_run_finishes(root: Path, tmp_path: Path) -> None:
    """Each operation on a file is one that the interpreter tells of before it happens."""
    killed, number = 0, 0
    while True:
        number += 1
        copy = tmp_path / f"copy{number}"
        subprocess.run(["cp", "-a", root, copy], check=True)
        command = [sys.executable, "-c", _KILLED, copy, str(number * STEP), VM, TIMES[-1]]
        done = subprocess.run(list(map(str, command)), check=False)
        assert done.returncode in {0, -signal.SIGKILL}
        with stores.open_store(copy) as store:
            left = [point.time for point in history(store).points]
            assert left == TIMES[len(TIMES) - len(left) :]  # oldest first, and never one too many
            assert len(left) >= 2
            for time in left:
                assert (copy / VM / time / "xvda.raw").read_bytes() == CONTENT
            assert store.unlisted == ()
            prune.prune(store, VM, Keep(last=2))
            store.pin(VM, TIMES[-1], wanted=True)
            assert store.is_pinned(VM, TIMES[-1])
        assert times(copy) == TIMES[-2:]
        assert [name for name in names(copy) if name[0] == "."] == [".lock"]
        subprocess.run(["rm", "-r", copy], check=True)
        if not done.returncode:
            break
        killed += 1
    assert killed > 5


STEP = int(os.environ.get("CBTFS_KILL_STEP", "9"))
"""Every so manieth operation; contrib/soak/kill-prune tries them all."""


# ── the command ──


def test_the_plan_names_a_reason_for_every_point(root: Path) -> None:
    printed = cbtfs(root, "prune", "-n", "--keep-last", "1", "--keep-daily", "2").splitlines()

    assert [" ".join(line.split()) for line in printed] == [
        "POINT VERDICT WHY",
        *(f"web1/{time} remove no rule keeps it" for time in TIMES[:4]),
        f"web1/{TIMES[4]} keep daily 2 of 2",
        f"web1/{TIMES[5]} keep last 1 of 1, daily 1 of 2, the newest",
    ]
    assert times(root) == TIMES


def test_options_prune(root: Path) -> None:
    found = document(root, "prune", "--keep-last", "2")

    assert times(root) == TIMES[-2:]
    (vm,) = items(found, "vms")
    assert [point["kept"] for point in items(vm, "points")] == [False] * 4 + [True] * 2


CONFIG = """
[store.main]
path = "store"
[job.nightly]
vms = ["web*"]
keep = {{ last = {last} }}
[job.other]
vms = ["db"]
"""


def test_the_rules_of_the_job_count(root: Path) -> None:
    with stores.open_store(root) as store:
        commit(store, vm=OTHER, name="db", time=TIMES[0])
        commit(store, vm=OTHER, name="db", time=TIMES[1])

    cbtfs(root, "prune", config=CONFIG.format(last=3))

    assert times(root) == TIMES[-3:]
    assert times(root, OTHER) == TIMES[:2]


@pytest.mark.timeout(120)
def test_a_job_does_not_remove_what_another_keeps(tmp_path: Path) -> None:
    with running_small(tmp_path / "pool", sizes=[1 << 20]) as small:
        shell = Shell(small.pool, tmp_path / "store")
        jobs = {"many": "keep.last = 3", "one": "keep.last = 1", "all": ""}
        small.pool.config.write_text(
            small.pool.config.read_text()
            + "".join(f'\n[job.{name}]\nvms = ["v"]\n{keep}' for name, keep in jobs.items())
        )
        for job in ("many", "many", "one"):
            (vm,) = items(shell.json("sync", job), "vms")
            assert vm["removed"] == []
        shell.run("prune")
        (vm,) = items(shell.json("list"), "vms")
        assert [point["job"] for point in items(vm, "points")] == ["many", "many", "one"]

        for job in ("all", "one"):  # without rules of its own, all that a job has made stays
            (vm,) = items(shell.json("sync", job), "vms")
            assert vm["removed"] == []
        assert "so all of it stays" in shell.run("prune", status=2).stderr


def test_without_any_rule_nothing_is_done(root: Path) -> None:
    said = cbtfs(root, "prune", status=2)

    assert "no rule to prune by" in said
    assert times(root) == TIMES


def test_pin_and_unpin(root: Path) -> None:
    assert cbtfs(root, "pin", f"web1/{TIMES[0]}").startswith(f"web1/{TIMES[0]} is pinned")
    assert "pinned, complete" in cbtfs(root, "list")
    cbtfs(root, "prune", "--keep-last", "1")
    assert times(root) == [TIMES[0], TIMES[-1]]
    assert cbtfs(root, "unpin", f"web1/{TIMES[0]}") == f"web1/{TIMES[0]} is pinned no more\n"
    assert "whole restore point" in cbtfs(root, "pin", f"web1/{TIMES[0]}/xvda", status=2)
    assert "no restore point" in cbtfs(root, "pin", "web1/2031", status=10)


# ── after a sync ──


@pytest.mark.timeout(120)
def test_a_job_keeps_what_its_rules_say_and_its_increments_go_on(tmp_path: Path) -> None:
    with running_small(tmp_path / "pool", sizes=[4 << 20]) as small:
        shell = Shell(small.pool, tmp_path / "store")
        config = tmp_path / "job.toml"
        job = '[job.nightly]\nvms = ["v"]\nkeep = { last = 2 }\n'
        config.write_text(f"{small.pool.config.read_text()}\n{job}")
        methods: list[object] = []
        removed: list[object] = []
        for _ in range(4):
            guest = small.pool.open_guest("v", "xvda")
            guest.pwrite(os.urandom(4096), 0)
            guest.shutdown()
            told = shell.json("--config", str(config), "sync", "nightly")
            (vm,) = items(told, "vms")
            methods += [disk["method"] for disk in items(vm, "disks")]
            removed += [vm["removed"]]

        (vm,) = items(shell.json("list"), "vms")
        found = items(vm, "points")
        assert methods == ["full", *["incremental"] * 3]
        assert [len(times) for times in removed if isinstance(times, list)] == [0, 0, 1, 1]
        assert len(found) == 2
        assert {point["job"] for point in found} == {"nightly"}
        assert len(leftovers(small.pool).bases) == 1
        shell.run("verify")
