"""Kill matrix: a sync that goes wrong at a chosen change of its store, and what must hold after it.

A ``Trial`` has one small VM and one store. Each trial of a point begins in the same state, which
depends on the kind of run only::

    full         no store yet
    incremental  one point; its base is in the pool; the guest has written since
    compare      one point; its base is lost; the guest has written since
    resume       no point; a full was killed after its first entries in the journal

and after it: what is listed is whole and right, the next sync makes a point that equals the guest's
disks, and nothing is left over in pool or store.
"""

import errno
import os
import random
import shutil
import traceback
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from cbtfs import store as stores, units, verified
from cbtfs.catalogue import Point
from cbtfs.errors import CbtfsError
from cbtfs.store import Store

from .commands import Leftovers, leftovers
from .killpoints import WRITES, Mode
from .killrun import Done, Runner, open_runner
from .simulated import Failure
from .smallvm import Small, running_small

Kind = Literal["full", "incremental", "compare", "resume"]
KINDS: tuple[Kind, ...] = ("full", "incremental", "compare", "resume")

SIZES = {"xvda": 16 * units.MiB, "xvdb": 4 * units.MiB}
"""Disks of the VM: of several requests, and of one."""

SETTINGS = {"FLUSH_BYTES": units.MiB}
"""So that entries in the journal fall into the copy of even a small disk."""

MODES: dict[str, tuple[Mode, ...]] = {
    "kill": ("kill", "half"),
    "eio": ("eio", "eio-on"),
    "enospc": ("enospc", "enospc-on"),
}

HALF = 0.5

_TIDYING = frozenset({"unlink", "rmdir", "fsync"})
"""Calls that tidying up makes too: if one of those fails, something may stay for the next run."""


JOURNALED = "/journal.json\n"
"""In the trace: the rename that puts an entry into the journal."""


class _Disk(msgspec.Struct):
    device: str
    method: str
    bytes_read: int


class _Vm(msgspec.Struct):
    disks: list[_Disk]


class _Told(msgspec.Struct):
    vms: list[_Vm]


Content = Mapping[str, bytes]
"""Of disks, by device."""


@dataclass
class Trial:
    """A VM and its store, on which run after run goes wrong."""

    small: Small
    runner: Runner
    store: Path
    rng: random.Random
    known: dict[str, Content] = field(default_factory=dict[str, Content])
    """What each point must hold, by time."""

    begun: dict[str, Content] = field(default_factory=dict[str, Content])
    """What each partial point must hold once it is a point, if it ever becomes one."""

    _traces: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])

    # ── One point ────────────────────────────────────────────────────────────────────────────

    def trace(self, kind: Kind) -> tuple[str, ...]:
        """Return all points that a run of this kind has, as one that ended well had them."""
        if kind not in self._traces:
            self._traces[kind] = self._end_well(kind).trace
        return self._traces[kind]

    def _end_well(self, kind: Kind) -> Done:
        self.prepare(kind)
        done = self.sync()
        assert done.status == 0, done.err
        self.assert_status_fits(done, self.look())
        if kind == "resume":
            assert self.known.keys() == self.begun.keys(), "it did not go on"
        else:
            assert {disk.method for disk in _disks(done)} == {kind}
        self.assert_tidy()
        return done

    def spoil(self, kind: Kind, mode: Mode, at: int) -> Done:
        """Let the ``at``-th change of a sync go wrong, and check everything that must hold then."""
        self.prepare(kind)
        done = self.sync(mode=mode, at=at)
        self.assert_ended_well(done, mode)
        new = self.look()
        if not (new and mode.endswith("-on") and _ends_commit(done, at)):
            self.assert_status_fits(done, new)
        if done.status >= 0 and not mode.endswith("-on"):
            self.assert_tidied_up(done, at)
        if done.killed:
            self.forget_tasks()
            if self.rng.random() < HALF:
                self.write()  # what goes on shows the disks as they were before
        self.assert_next_sync_is_right()
        return done

    def prepare(self, kind: Kind) -> None:
        """Make the state in which a run of this kind begins."""
        if kind in {"full", "resume"}:
            self.forget_all()
        else:
            self._keep_latest_only()
        self.write()
        if kind == "compare":
            self.lose_bases()
        elif kind == "resume":
            killed = self.sync(mode="kill", at=self.rng.randrange(2, 5), match=JOURNALED)
            assert killed.killed, killed
            self.look()
            self.forget_tasks()

    def write(self) -> None:
        """Be the guest: write a bit everywhere, zeros and what was there before among it."""
        for device, size in SIZES.items():
            guest = self.small.pool.open_guest("v", device)
            for length in (512, 4096, 70 * 1024, 2 * units.MiB):
                guest.pwrite(
                    self.rng.randbytes(length), self.rng.randrange((size - length) // 512) * 512
                )
            zeros = self.rng.randrange(size // units.MiB) * units.MiB
            guest.pwrite(bytes(units.MiB), zeros)
            guest.pwrite(guest.pread(4096, 0), 0)
            guest.shutdown()

    def content(self) -> Content:
        """Return what the guest has on its disks."""
        found: dict[str, bytes] = {}
        for device, size in SIZES.items():
            guest = self.small.pool.open_guest("v", device)
            found[device] = bytes(guest.pread(size, 0))
            guest.shutdown()
        return found

    def sync(self, *, mode: Mode = "count", at: int = 0, match: str = "") -> Done:
        """Run the command; see ``Runner.run``."""
        argv = ["--config", str(self.small.pool.config), "--store", str(self.store), "--json"]
        argv += ["sync", "--vm", "v"]
        return self.runner.run(argv, root=self.store, mode=mode, at=at, match=match)

    # ── What must hold ───────────────────────────────────────────────────────────────────────

    def assert_ended_well(self, done: Done, mode: Mode) -> None:
        """Fail unless the run was killed as it should be, or ended with a status and a sentence."""
        for bare in ("Traceback", os.strerror(errno.EIO), os.strerror(errno.ENOSPC)):
            assert bare not in done.err, done.err  # but a sentence that says what to do
        if mode in {"kill", "half"}:
            assert done.status in {0, -9}, done
        else:
            assert done.status in {0, 1, 3}, done
            assert done.status == 0 or done.err, done

    def look(self) -> list[str]:
        """Look at all points that are listed now: none is missing, and each is right.

        Returns:
            The states of those that are new.
        """
        listed = {point.time: point for point in self._listed()}
        assert self.known.keys() <= listed.keys(), "a committed point was lost"
        new = listed.keys() - self.known.keys()
        assert len(new) <= 1
        now = self.content()
        for time in new:
            content = self.begun.get(time, now)
            self.known[time] = {disk.device: content[disk.device] for disk in listed[time].disks}
        for time, content in self.known.items():
            self.assert_equal(time, content)
        for partial in self.store.glob(f"{self.vm()}/.partial-*"):
            self.begun.setdefault(partial.name.removeprefix(".partial-"), now)
        self.assert_links_lead_somewhere()
        return [listed[time].state for time in new]

    def assert_status_fits(self, done: Done, new: list[str]) -> None:
        """Fail unless the exit status tells of the points that are ``new``, by their states."""
        if done.status >= 0:
            expected = {0: ["complete"], 1: [], 3: ["partial"]}
            assert new == expected[done.status], (done.status, new, done.err)
        else:
            assert new in ([], ["complete"])

    def assert_equal(self, time: str, content: Content) -> None:
        """Fail unless the images of a point have this content."""
        folder = self.store / self.vm() / time
        assert {path.stem for path in folder.glob("*.raw")} == content.keys()
        for device, expected in content.items():
            assert (folder / f"{device}.raw").read_bytes() == expected, f"{time}/{device} differs"

    def assert_links_lead_somewhere(self) -> None:
        """Fail if a link of the store dangles."""
        links = [*self.store.glob("*/latest"), *self.store.glob("by-name/[!.]*")]
        assert all(link.exists() for link in links), links

    def assert_tidied_up(self, done: Done, at: int) -> None:
        """Fail if a run left something though it could have tidied up."""
        if at > len(done.trace) or done.trace[at - 1].split()[1] in _TIDYING:
            return
        if self.begun and not any("/.partial-" in line for line in done.trace[:at]):
            return  # it did not get as far as what an earlier run had begun
        left = leftovers(self.small.pool)
        assert (left.snapshots, left.snapshot_vms, left.dom0_vbds) == ([], [], []), left
        assert not list(self.store.glob("*/.partial*"))

    def assert_next_sync_is_right(self) -> None:
        """Fail unless a plain sync makes a point that equals the guest and leaves nothing over.

        If it went on with an older instant, it is the one after it that equals the guest.
        """
        done = self.sync()
        assert done.status == 0, f"the next sync: {done.status}, {done.err}"
        self.assert_status_fits(done, self.look())
        self.assert_tidy()
        if self.known[max(self.known)] != self.content():
            assert max(self.known) in self.begun
            self.begun.clear()
            self.assert_next_sync_is_right()

    def assert_tidy(self) -> None:
        """Fail if pool or store have more than a good sync leaves."""
        left = leftovers(self.small.pool)
        disks = sorted(self.small.disk(f"v {number}") for number in range(len(SIZES)))
        assert sorted(left.bases) == disks, left
        assert left == Leftovers(left.bases, [], [], [], []), left
        vm = self.store / self.vm()
        assert {path.name for path in vm.iterdir()} - {".link.new"} == {
            ".lock",
            "latest",
            *self.known,
        }
        latest = vm / max(self.known)
        images = {f"{device}{suffix}" for device in SIZES for suffix in (".raw", ".b3")}
        names = {path.name for path in latest.iterdir()}
        assert names - {verified.RECORD} == {"point.json", "vm.xml", *images}
        assert (vm / "latest").resolve() == latest.resolve()
        assert (self.store / "by-name/v").resolve() == vm.resolve()

    def _listed(self) -> tuple[Point, ...]:
        if not (self.store / "cbtfs.json").exists():
            return ()
        with stores.open_store(self.store, create=False) as opened:
            found = opened.catalogue().vms.get(self.vm())
            assert opened.problems == (), opened.problems
            points = found.points if found else ()
            for point in points:
                _verify(opened, self.vm(), point.time)
        return points

    def save(self, place: Path, why: Exception) -> Path:
        """Keep the store and what the last run said, in ``place``."""
        shutil.copytree(self.runner.directory, place / "run", dirs_exist_ok=True)
        if self.store.exists():
            shutil.copytree(self.store, place / "store", symlinks=True)
        shutil.copy(self.small.pool.directory / "log", place / "pool.log")
        told = "".join(traceback.format_exception(why))
        (place / "why.txt").write_text(told)
        return place

    # ── The state between two points ─────────────────────────────────────────────────────────

    def vm(self) -> str:
        """Return the name of the VM's folder."""
        return self.small.api.text("VM.get_uuid", self.small.vm)

    def _keep_latest_only(self) -> None:
        """Remove older points as a user may, by hand; make one if there is none."""
        if not self.known:
            self.assert_next_sync_is_right()
        self.begun.clear()
        for time in sorted(self.known)[:-1]:
            shutil.rmtree(self.store / self.vm() / time)
            del self.known[time]

    def lose_bases(self) -> None:
        """Destroy the bases in the pool, as anybody might."""
        api = self.small.api
        for ref, record in api.records("VDI").items():
            if record["type"] == "cbt_metadata":
                api.call("VDI.destroy", ref)

    def forget_tasks(self) -> None:
        """Drop the record of what a killed run had asked for, as xapi itself does in an hour."""
        api = self.small.api
        for ref in leftovers(self.small.pool).tasks:
            with suppress(Failure):  # gone by itself
                api.call("task.destroy", ref)

    def forget_all(self) -> None:
        """Remove the store, and from the pool all that is ours."""
        if self.store.exists():
            shutil.rmtree(self.store)
        self.known.clear()
        self.begun.clear()
        api = self.small.api
        for kind in ("VM", "VDI"):
            for ref, record in api.records(kind).items():
                if "cbtfs:owner" in str(record["other_config"]):
                    api.call(f"{kind}.destroy", ref)


def _ends_commit(done: Done, at: int) -> bool:
    """Tell whether a call is the one that makes the commit's rename last.

    Where neither that nor the way back is possible, there is a point though the run failed.
    """
    calls = [line.split()[1] for line in done.trace[:at][-2:]]
    return calls == ["renameat2", "fsync"]


def _verify(opened: Store, vm: str, time: str) -> None:
    found = opened.verify(opened.catalogue().resolve(f"{vm}/{time}"))
    assert not found.damaged, f"{time} is damaged"


def _disks(done: Done) -> list[_Disk]:
    (vm,) = msgspec.json.decode(done.out, type=_Told).vms
    return vm.disks


@contextmanager
def open_trial(directory: Path, store: Path, *, seed: int) -> Generator[Trial]:
    """Start a pool and a runner in ``directory``; ``store`` is where the store will be."""
    with (
        running_small(directory / "pool", sizes=list(SIZES.values())) as small,
        open_runner(directory / "run", SETTINGS) as runner,
    ):
        yield Trial(small, runner, store, random.Random(seed))


@dataclass
class Result:
    """What the points of one kind of run and of fault came to."""

    tried: Counter[str] = field(default_factory=Counter[str])
    """How many were tried, by the call that went wrong."""

    failures: list[str] = field(default_factory=list[str])

    def __str__(self) -> str:
        kinds = ", ".join(f"{name} {count}" for name, count in self.tried.most_common())
        return f"{self.tried.total()} points ({kinds}), {len(self.failures)} failures"


def try_points(
    trial: Trial, kind: Kind, modes: Sequence[Mode], *, every: int, evidence: Path
) -> Result:
    """Try every ``every``-th point of a kind of run, from a random one on, in all of ``modes``.

    After a failure its store, trace and messages are below ``evidence``, and all begins afresh.
    """
    points = list(_points(trial.trace(kind), modes))
    result = Result()
    for mode, at in points[trial.rng.randrange(every) :: every]:
        try:
            done = trial.spoil(kind, mode, at)
        except (AssertionError, Failure, CbtfsError) as exc:
            place = trial.save(evidence / f"{kind}-{mode}-{at}", exc)
            result.failures.append(f"{kind} {mode} {at}: {exc}\n  see {place}")
            trial.forget_all()
            continue
        if at <= len(done.trace):
            result.tried[done.trace[at - 1].split()[1]] += 1
    return result


def _points(trace: Sequence[str], modes: Sequence[Mode]) -> Iterator[tuple[Mode, int]]:
    """Yield what can go wrong with a run that has this trace."""
    for mode in modes:
        for at, line in enumerate(trace, 1):
            if mode != "half" or line.split()[1] in WRITES:
                yield mode, at
