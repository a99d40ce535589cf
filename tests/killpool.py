"""Restores into a pool that are killed at a chosen point, and what must hold after it.

A ``Trial`` has a pool with the halted VM ``p`` of two disks, some bystanders, and a store with one
point of ``p``. A point to be killed at is anything that the command sends to xapi, before it is
sent and after its answer, each piece of an upload, and each change of a file of its own.

    in place   the disks are otherwise than in the point; after the kill another run finishes
    new VM     after the kill ``clean`` takes away what is not finished, and another restore works
"""

import random
import shutil
import time
import traceback
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import msgspec

from cbtfs import store as stores, units
from cbtfs.errors import CbtfsError
from cbtfs.owner import TAG_OWNER, Owned, read_task, write_owner

from .killmatrix import Result
from .killpoints import Mode
from .killrun import Done, Runner, open_runner
from .simulated import Failure
from .smallvm import Small, running_small
from .test_restore_pool import BLOCK, add_vm, content_of, devices_of, patch

Kind = Literal["in place", "new VM"]
KINDS: tuple[Kind, ...] = ("in place", "new VM")

LARGE = 8 * units.MiB
"""The first disk of ``p``: of several pieces of an upload."""

NEW = "new"
"""What the restored VM is called."""

KILLED_CLEAN = 0.3
"""How many of the runs of ``clean`` are killed."""

SETTLING = 15.0
"""Seconds that the pool gets to notice that a client is gone."""


@dataclass(frozen=True)
class Point:
    """The ``at``-th line, from 1, of the trace that has ``match`` in it."""

    at: int
    match: str = ""

    def call_in(self, trace: Sequence[str]) -> str:
        """Return what that line of a trace says: of threads, each run has an order of its own."""
        lines = [line for line in trace if self.match in f"{line}\n"]
        if self.at > len(lines):
            return "after the end"
        return lines[self.at - 1].partition(" ")[2].removeprefix("call ")


Objects = Mapping[str, Mapping[str, Mapping[str, object]]]
"""What does not change by itself of a pool's objects: by class, reference and field."""

Content = Mapping[str, bytes]
"""What disks hold, by name."""

_STABLE = {
    "VM": (
        "name_label",
        "name_description",
        "other_config",
        "power_state",
        "blocked_operations",
        "snapshot_of",
    ),
    "VDI": ("name_label", "name_description", "other_config", "virtual_size", "type"),
    "VBD": ("VM", "VDI", "userdevice", "mode"),
    "VIF": ("VM", "MAC", "network"),
    "SR": ("name_label", "other_config"),
}


class _Thing(msgspec.Struct):
    what: str
    name: str
    why: str


class _Cleaned(msgspec.Struct):
    removed: list[_Thing]
    failed: list[_Thing]
    left: list[_Thing]


class _Disk(msgspec.Struct):
    device: str
    vdi_uuid: str


class _Restored(msgspec.Struct):
    safety_snapshot: str | None
    disks: list[_Disk]


@dataclass
class Trial:
    """A pool, and a store with one point of ``p``; restore after restore goes wrong."""

    small: Small
    runner: Runner
    place: Path
    rng: random.Random
    bystanders: dict[str, bytes] = field(default_factory=dict[str, bytes])
    """What disks hold that no restore is about, by uuid."""

    first: Objects = field(default_factory=dict[str, Mapping[str, Mapping[str, object]]])
    """The pool's objects in the beginning."""

    _synced: str = ""
    """What the point is of: the uuid of a disk, which a revert replaces."""

    _traces: dict[Kind, tuple[str, ...]] = field(default_factory=dict[Kind, tuple[str, ...]])

    @property
    def store(self) -> Path:
        """Where the store is."""
        return self.place / "store"

    # ── One point ────────────────────────────────────────────────────────────────────────────

    def trace(self, kind: Kind) -> tuple[str, ...]:
        """Return all points that a restore of this kind has, as one that ended well had them."""
        if kind not in self._traces:
            self.prepare(kind)
            done = self.restore(kind)
            assert done.status == 0, done.err
            self._traces[kind] = done.trace
            (self.undo if kind == "in place" else self.remove_new)()
        return self._traces[kind]

    def spoil(self, kind: Kind, point: Point) -> Done:
        """Kill a restore at a point, and check everything that must hold then."""
        self.prepare(kind)
        before, wanted = self.objects(), self.wanted()
        now = self.content() if kind == "in place" else {}
        done = self.restore(kind, point, mode="kill")
        assert done.status in {0, -9}, done
        self.settle()
        self.assert_point_is_whole()
        if kind == "in place":
            self._after_in_place(before, wanted, now)
        else:
            self._after_new_vm(before, wanted)
        return done

    def interrupt(self, kind: Kind, point: Point) -> Done:
        """Send SIGINT to a restore at a point, and check what must hold then."""
        self.prepare(kind)
        before, wanted = self.objects(), self.wanted()
        now = self.content() if kind == "in place" else {}
        done = self.restore(kind, point, mode="int")
        assert done.status in {0, 130}, done
        assert "Traceback" not in done.err
        if kind == "in place":
            self.assert_told(done)
            self._after_in_place(before, wanted, now)
        elif done.status == 130:
            self.assert_same(before, self.objects())
            assert "nothing of it is left" in done.err
            assert self.our_tasks() == []
        else:
            self.assert_restored(before, wanted)
            self.remove_new()
        return done

    def prepare(self, kind: Kind) -> None:
        """Make a point of ``p``, unless there is one; for one in place the disks change then."""
        if self._synced != self.small.uuid("p 0"):
            self._forget_points()
            self.run_well("sync", "--vm", "p")
            self._synced = self.small.uuid("p 0")
        if kind == "in place":
            self.change()
            self._synced = ""

    def _forget_points(self) -> None:
        """Remove the store, and the bases of its points."""
        if self.store.exists():
            shutil.rmtree(self.store)
        for ref, record in self.small.api.records("VDI").items():
            if record["type"] == "cbt_metadata":
                self.small.api.call("VDI.destroy", ref)

    def change(self) -> None:
        """Write over some blocks, with zeros too, and into some that had no data."""
        numbers = self.rng.sample(range(LARGE // BLOCK), 20)
        blocks = {number * BLOCK: self.rng.randbytes(BLOCK) for number in numbers[:17]}
        blocks |= {number * BLOCK: bytes(BLOCK) for number in numbers[17:]}
        patch(self.small, self.small.disk("p 0"), blocks)
        patch(self.small, self.small.disk("p 3"), {0: self.rng.randbytes(2 * BLOCK)})

    def restore(self, kind: Kind, point: Point | None = None, *, mode: Mode = "count") -> Done:
        """Restore the point of the store; see ``run``."""
        where = ["--in-place"] if kind == "in place" else ["--to-sr", "ZFS", "--vm-name", NEW]
        return self.run("--json", "restore", "p/latest", *where, point=point, mode=mode)

    def run(self, *arguments: str, point: Point | None = None, mode: Mode = "count") -> Done:
        """Run a command; see ``Runner.run``."""
        where = ["--config", str(self.small.pool.config), "--store", str(self.store)]
        at, match = (point.at, point.match) if point is not None else (0, "")
        return self.runner.run(
            [*where, *arguments], root=self.place, mode=mode, at=at, match=match, calls="all"
        )

    def run_well(self, *arguments: str) -> Done:
        """Run a command that has to succeed."""
        done = self.run(*arguments)
        assert done.status == 0, f"{arguments}: {done.status}, {done.err}"
        return done

    # ── In place ─────────────────────────────────────────────────────────────────────────────

    def _after_in_place(self, before: Objects, wanted: Content, now: Content) -> None:
        self.assert_only_disks_changed(before)
        if self.is_finished():
            # the next run would be another restore, which takes a snapshot of its own
            self.run_well("clean")
        else:
            told = msgspec.json.decode(self.restore_again().out, type=_Restored)
            assert [uuid for uuid, _ in self.safety_snapshots()] == [told.safety_snapshot]
            cleaned = msgspec.json.decode(self.run_well("--json", "clean").out, type=_Cleaned)
            assert {thing.what for thing in cleaned.removed} <= {"task"}, cleaned
        assert self.content() == wanted, "the result is not the point"
        self.assert_only_disks_changed(before)
        self.assert_can_start()
        assert self.our_tasks() == []
        self.undo()
        assert self.content() == now, "the snapshot does not lead back"
        self.assert_can_start()

    def restore_again(self) -> Done:
        """Run a restore in place that has to succeed."""
        done = self.restore("in place")
        assert done.status == 0, f"the next run: {done.status}, {done.err}"
        return done

    def is_finished(self) -> bool:
        """Tell whether the restore in place came to its end: its snapshot is called the user's."""
        return any("not finished" not in name for _, name in self.safety_snapshots())

    def assert_only_disks_changed(self, before: Objects) -> None:
        """Fail if more of the pool is otherwise than that ``p`` is kept, and has a snapshot."""
        new = self.objects()
        vm = self.vm()
        taken = {ref for ref, record in new["VM"].items() if record["snapshot_of"] == vm}
        disks = {vbd["VDI"] for vbd in new["VBD"].values() if vbd["VM"] in taken}
        hidden = {
            "VM": taken,
            "VDI": {ref for ref in new["VDI"] if ref in disks},
            "VBD": {ref for ref, vbd in new["VBD"].items() if vbd["VM"] in taken},
            "VIF": {ref for ref, vif in new["VIF"].items() if vif["VM"] in taken},
            "SR": set[str](),
        }
        assert len(taken) <= 1, "more than one snapshot"
        kept = {
            kind: {
                ref: {**record, **({"blocked_operations": {}} if ref == vm else {})}
                for ref, record in records.items()
                if ref not in hidden[kind]
            }
            for kind, records in new.items()
        }
        self.assert_same(before, kept)
        blocked = new["VM"][vm]["blocked_operations"]
        assert isinstance(blocked, dict)
        assert blocked.keys() <= {"start", "start_on"}

    def assert_told(self, done: Done) -> None:
        """Fail unless an interrupted restore in place says how to go on, and how to go back."""
        taken = [uuid for uuid, _ in self.safety_snapshots()]
        if done.status == 130:
            assert "run the command again" in done.err
            for uuid in taken:
                assert f"xe snapshot-revert snapshot-uuid={uuid}" in done.err

    def assert_can_start(self) -> None:
        """Fail if ``p`` is kept from starting."""
        record = self.small.api.call("VM.get_record", self.vm())
        assert isinstance(record, dict)
        assert record["blocked_operations"] == {}
        assert "start" in record["allowed_operations"]

    def undo(self) -> None:
        """Go back to the safety snapshot, and remove it as a user would."""
        api = self.small.api
        ((uuid, _),) = self.safety_snapshots()
        ref = api.text("VM.get_by_uuid", uuid)
        api.call("VM.revert", ref)
        disks = self.disks_of(ref).values()
        api.call("VM.destroy", ref)
        for vdi in disks:
            api.call("VDI.destroy", vdi)

    def safety_snapshots(self) -> list[tuple[str, str]]:
        """Return uuid and name of each snapshot of ``p`` that a restore took."""
        return [
            (str(record["uuid"]), str(record["name_label"]))
            for record in self.small.api.records("VM").values()
            if record["is_a_snapshot"] and str(record["name_label"]).startswith("cbtfs before")
        ]

    # ── A new VM ─────────────────────────────────────────────────────────────────────────────

    def _after_new_vm(self, before: Objects, wanted: Content) -> None:
        if self.is_there():
            self.run_well("clean")
            self.assert_restored(before, wanted)
            self.remove_new()
            return
        self.assert_clean_removes_exactly(before)
        again = self.restore("new VM")
        assert again.status == 0, f"the next restore: {again.status}, {again.err}"
        self.assert_restored(before, wanted)
        self.remove_new()
        self.assert_same(before, self.objects())

    def is_there(self) -> bool:
        """Tell whether the VM is the user's: it has its name, and no tag."""
        vms = self.small.api.records("VM").values()
        return any(v["name_label"] == NEW and TAG_OWNER not in str(v["other_config"]) for v in vms)

    def assert_clean_removes_exactly(self, before: Objects) -> None:
        """Fail unless ``clean`` finds what is new in the pool, and all is as before then.

        Now and then one is killed before: the next one does the rest.
        """
        if self.rng.random() < KILLED_CLEAN:
            self.run("clean", point=Point(self.rng.randrange(60)), mode="kill")
        now = self.objects()
        uuids = {
            self.small.api.text(f"{kind}.get_uuid", ref)
            for kind in ("VM", "VDI")
            for ref in now[kind].keys() - before[kind].keys()
        }
        dry = msgspec.json.decode(self.run_well("--json", "clean", "-n").out, type=_Cleaned)
        assert self.objects() == now, "clean -n changed something"
        assert {t.name for t in dry.removed if t.what != "task"} == uuids, (dry, uuids)
        assert [thing for thing in dry.left if thing.name in uuids] == []
        told = msgspec.json.decode(self.run_well("--json", "clean").out, type=_Cleaned)
        assert told == dry
        self.assert_same(before, self.objects())
        assert self.our_tasks() == []

    def assert_restored(self, before: Objects, wanted: Content) -> None:
        """Fail unless the new VM is all that is new, has the point's disks, and is the user's."""
        api = self.small.api
        (vm,) = (r for r, v in api.records("VM").items() if v["name_label"] == NEW)
        places = self.disks_of(vm)
        assert places.keys() == {"0", "3"}
        for number, vdi in places.items():
            record = api.call("VDI.get_record", vdi)
            assert isinstance(record, dict)
            assert record["name_label"] == f"p {number}"
            assert record["other_config"] == {}
            assert content_of(self.small, str(record["uuid"])) == wanted[f"p {number}"]
        assert TAG_OWNER not in str(api.call("VM.get_other_config", vm))
        now = self.objects()
        assert now["VM"].keys() - before["VM"].keys() == {vm}
        assert now["VDI"].keys() - before["VDI"].keys() == set(places.values())
        assert len(now["VIF"].keys() - before["VIF"].keys()) == 2
        assert self.our_tasks() == []

    def remove_new(self) -> None:
        """Remove the restored VM with its disks."""
        api = self.small.api
        (vm,) = (r for r, v in api.records("VM").items() if v["name_label"] == NEW)
        disks = self.disks_of(vm).values()
        api.call("VM.destroy", vm)
        for vdi in disks:
            api.call("VDI.destroy", vdi)

    # ── What there is ────────────────────────────────────────────────────────────────────────

    def begin_afresh(self) -> None:
        """Remove from the pool all that was not there in the beginning, and make ``p`` anew."""
        api = self.small.api
        for key in ("start", "start_on", "destroy"):
            api.call("VM.remove_from_blocked_operations", self.vm(), key)
        for kind in ("VM", "VDI"):
            for ref in api.records(kind).keys() - self.first[kind].keys():
                with suppress(Failure):
                    api.call(f"{kind}.destroy", ref)
        for ref, task in api.records("task").items():
            if read_task(str(task["name_description"])):
                with suppress(Failure):
                    api.call("task.destroy", ref)
        self._synced = ""
        self.make_p()

    def make_p(self) -> None:
        """Make ``p``, whose first disk has data here and there."""
        p = replace(self.small, vm=add_vm(self.small, "p", disks=0))
        p.add_disk("p 0", 0, size=LARGE)
        p.add_disk("p 3", 3, size=2 * units.MiB)
        for _ in range(3):
            self.change()

    def vm(self) -> str:
        """Return the ref of ``p``."""
        return self.small.api.named("VM", "p")

    def disks_of(self, vm: str) -> dict[str, str]:
        """Return the refs of a VM's disks by device number."""
        vbds = devices_of(self.small, vm, "VBD").items()
        return {number: str(vbd["VDI"]) for number, vbd in vbds if vbd["type"] == "Disk"}

    def content(self) -> Content:
        """Return what the disks of ``p`` hold."""
        names = ("p 0", "p 3")
        return {name: content_of(self.small, self.small.uuid(name)) for name in names}

    def wanted(self) -> Content:
        """Return what the point of ``p`` holds."""
        folder = self.store / "by-name/p/latest"
        return {f"p {n}": (folder / f"xvd{d}.raw").read_bytes() for n, d in ((0, "a"), (3, "d"))}

    def objects(self) -> Objects:
        """Return the pool's objects; without what its hosts attach to themselves."""
        found: dict[str, dict[str, dict[str, object]]] = {}
        with self.small.pool.proxy() as proxy:  # one connection for all
            for kind in _STABLE:
                answer = getattr(proxy, f"{kind}.get_all_records")(self.small.api.session)
                found[kind] = msgspec.convert(answer["Value"], dict[str, dict[str, object]])
        dom0 = {ref for ref, vm in found["VM"].items() if vm["is_control_domain"]}
        found["VBD"] = {r: v for r, v in found["VBD"].items() if v["VM"] not in dom0}
        found["VDI"] = {r: v for r, v in found["VDI"].items() if v["managed"]}
        return {
            kind: {ref: {f: record[f] for f in _STABLE[kind]} for ref, record in records.items()}
            for kind, records in found.items()
        }

    def assert_same(self, before: Objects, now: Objects) -> None:
        """Fail, with what differs, unless nothing does; the bystanders' disks are read, too."""
        for kind, records in before.items():
            gone, new = records.keys() - now[kind].keys(), now[kind].keys() - records.keys()
            assert not gone, (kind, [records[ref] for ref in gone])
            assert not new, (kind, [now[kind][ref] for ref in new])
            for ref, record in records.items():
                assert now[kind][ref] == record, kind
        for uuid, content in self.bystanders.items():
            assert content_of(self.small, uuid) == content

    def assert_point_is_whole(self) -> None:
        """Fail unless the store's point is as it was."""
        with stores.open_store(self.store, create=False) as opened:
            assert opened.problems == ()
            assert not opened.verify(opened.catalogue().resolve("p/latest")).damaged

    def our_tasks(self) -> list[str]:
        """Return the tasks that are ours by what they say, and all that have not ended."""
        return [
            str(task["name_label"])
            for task in self.small.api.records("task").values()
            if read_task(str(task["name_description"])) or task["status"] == "pending"
        ]

    def settle(self) -> None:
        """Wait until the pool has noticed that its client is gone."""
        deadline = time.monotonic() + SETTLING
        while self._is_busy():
            assert time.monotonic() < deadline, "the pool does not let go"
            time.sleep(0.05)

    def _is_busy(self) -> bool:
        api = self.small.api
        dom0 = {ref for ref, vm in api.records("VM").items() if vm["is_control_domain"]}
        tasks = [task for task in api.records("task").values() if task["status"] == "pending"]
        running = [t for t in tasks if str(t["name_label"]).startswith("Async.")]
        return bool(running) or any(vbd["VM"] in dom0 for vbd in api.records("VBD").values())


@contextmanager
def open_trial(place: Path, *, seed: int) -> Generator[Trial]:
    """Start a pool and a runner in ``place``, where the store will be, too."""
    rng = random.Random(seed)
    with (
        running_small(place / "pool", sizes=[units.MiB]) as small,
        open_runner(place / "work") as runner,
    ):
        trial = Trial(small, runner, place / "work", rng)
        _populate(trial)
        yield trial


def _populate(trial: Trial) -> None:
    """Make ``p``, and what only looks as if it were a restore's."""
    small, rng = trial.small, trial.rng
    other = small.add_disk("cbtfs 20261122T020000Z 0123456789abcdef", 5)
    tagged = small.add_disk("v 6", 6)
    owned = Owned(self_uuid=small.uuid("v 0"), role="restored")
    small.api.call("VDI.add_to_other_config", tagged, TAG_OWNER, write_owner(owned))
    for ref in (other, tagged):
        small.detach(ref)
        patch(small, ref, {BLOCK: rng.randbytes(BLOCK)})
        uuid = small.api.text("VDI.get_uuid", ref)
        trial.bystanders[uuid] = content_of(small, uuid)
    trial.first = trial.objects()
    trial.make_p()


def try_points(trial: Trial, kind: Kind, points: Sequence[Point], *, how: str) -> Result:
    """Let a restore of this kind be hit at each of ``points``; after a failure begin afresh.

    Args:
        trial: where.
        kind: of restore.
        points: of it.
        how: ``kill`` or ``int``.
    """
    result = Result()
    for point in points:
        try:
            done = (trial.spoil if how == "kill" else trial.interrupt)(kind, point)
        except (AssertionError, Failure, CbtfsError) as exc:
            told = "".join(traceback.format_exception(exc))
            result.failures.append(f"{kind}, {how} at {point}: {told}")
            trial.begin_afresh()
            continue
        result.tried[point.call_in(done.trace)] += 1
    return result
