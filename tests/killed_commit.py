"""Run by test_store: makes restore points and is killed at every change of a file in turn.

``tests.killed_commit STORE before|half`` forks a child for N = 1, 2, …, which makes one point and
gets SIGKILL at its N-th change: before it, or when it has written half of it. Then the store must
be whole. When a child gets through alive, it all happens once more with the store that
there is now and a new name for the VM each time, and again with children that clear leftovers away.
Prints how many were killed.
"""

import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cbtfs import catalogue, store
from cbtfs.catalogue import DiskPoint, Point
from cbtfs.store import Intent, Store

from .killpoints import Mode, Points

VM = "0f4f1b2e-0000-4000-8000-000000000001"
BLOCK = 64 << 10
SIZE = 4 * BLOCK + 512
START = datetime(2026, 11, 22, 2, tzinfo=UTC)
KEPT = 3
MODES: dict[str, Mode] = {"before": "kill", "half": "half"}


def change(content: bytes, number: int) -> bytes:
    at = number % 4 * BLOCK
    return content[:at] + random.Random(number).randbytes(BLOCK) + content[at + BLOCK :]


def disk(root: str) -> DiskPoint:
    return DiskPoint(
        device="xvda",
        file="xvda.raw",
        digests="xvda.b3",
        digest_root=root,
        size=SIZE,
        vdi_uuid="v",
    )


def make_point(opened: Store, time: str, *, name: str, base: str, content: bytes) -> None:
    with opened.lock(VM):
        with opened.stage(VM, time=time) as stage:
            stage.record(Intent(time=time, run="r", snapshot_name=f"s {time}", vm_uuid=VM))
            if base:
                older = opened.catalogue().resolve(f"{VM}/{base}").point.disks[0]
                image = stage.cloned_image("xvda.raw", base_time=base, base=older, size=SIZE)
            else:
                image = stage.new_image("xvda.raw", size=SIZE)
            image.write(0, content)
            root = image.finish()
            stage.write_metadata("vm.xml", b"<vm/>")
            warnings = stage.commit(Point(time=time, vm_uuid=VM, vm_name=name, disks=(disk(root),)))
            assert warnings == ()


def clear(opened: Store) -> None:
    with opened.lock(VM):
        for leftover in opened.leftovers(VM):
            opened.abandon(leftover)


def leave_partial(opened: Store, time: str) -> None:
    with opened.lock(VM), opened.stage(VM, time=time) as stage:
        stage.record(Intent(time=time, run="r", snapshot_name="s", vm_uuid=VM))
        stage.new_image("xvda.raw", size=SIZE)


class Trial:
    """A store, and what it must hold: the content of every listed point."""

    def __init__(self, path: Path, mode: str) -> None:
        self.path = path
        self.mode = mode
        self.model: dict[str, bytes] = {}
        self.times: list[str] = []
        self.clock = START
        self.links: set[str] = set()

    def make_points(self, *, renaming: bool) -> int:
        for number in range(1, 1000):
            self.clock += timedelta(seconds=1)
            time = catalogue.format_time(self.clock)
            name = f"web {number}" if renaming else "web"
            base = self.times[-1] if self.times else ""
            content = change(self.model[base] if base else bytes(SIZE), number)
            self.model[time] = content

            def make(opened: Store) -> None:
                make_point(opened, time, name=name, base=base, content=content)  # noqa: B023

            alive = self.survives(make, number)
            self.check(time)
            # not by the next child: its N-th change would then be another one
            with store.open_store(self.path) as opened:
                clear(opened)
            if alive:
                assert (self.path / VM / "latest").readlink() == Path(time)
                assert [p.name for p in self.path.glob("by-name/*")] == [name]
                return number - 1
        raise AssertionError("no child survived")

    def clear_leftovers(self) -> int:
        for number in range(1, 1000):
            self.clock += timedelta(seconds=1)
            time = catalogue.format_time(self.clock)
            with store.open_store(self.path) as opened:
                clear(opened)
                leave_partial(opened, time)
                alive = self.survives(clear, number)
                self.check(time)
                if alive:
                    assert opened.leftovers(VM) == []
                    return number - 1
        raise AssertionError("no child survived")

    def survives(self, work: Callable[[Store], None], number: int) -> bool:
        """Tell whether a child to be killed at change ``number`` got through ``work`` before."""
        child = os.fork()
        if child == 0:
            Points(self.path, mode=MODES[self.mode], at=number).install()
            with store.open_store(self.path) as opened:
                work(opened)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL)
        return status == 0

    def check(self, time: str) -> None:
        """Fail unless every listed point is as it must be, and none is lost."""
        with store.open_store(self.path) as opened:
            history = opened.catalogue().vms.get(VM)
            points = history.points if history else ()
            assert opened.problems == (), opened.problems
            if points:
                found = opened.catalogue().resolve(f"{VM}/{points[-1].time}")
                assert not opened.verify(found).damaged
        now = [point.time for point in points]
        assert now in (self.times, [*self.times, time]), "a committed point was lost"
        for listed in now:
            point = self.path / VM / listed
            assert (point / "xvda.raw").read_bytes() == self.model[listed]
            assert (point / "vm.xml").read_bytes() == b"<vm/>"
        self.check_links()
        self.times = now
        self.prune()

    def check_links(self) -> None:
        """Fail if a link dangles, or a kind of link that there was is gone."""
        links = [*self.path.glob("*/latest"), *self.path.glob("by-name/[!.]*")]
        links = [link for link in links if link.is_symlink()]
        assert all(link.exists() for link in links)
        assert self.links <= {link.parent.name for link in links}
        self.links |= {link.parent.name for link in links}

    def prune(self) -> None:
        """Remove all but a few points, which may happen at any time."""
        latest = self.path / VM / "latest"
        named = latest.readlink().name if latest.is_symlink() else ""
        for time in self.times[:-KEPT]:
            if time != named:
                shutil.rmtree(self.path / VM / time)
                self.times.remove(time)


def main(path: Path, mode: str) -> int:
    trial = Trial(path, mode)
    killed = trial.make_points(renaming=False)
    killed += trial.make_points(renaming=True)
    return killed + trial.clear_leftovers()


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), sys.argv[2]))  # noqa: T201 - the answer to test_store
