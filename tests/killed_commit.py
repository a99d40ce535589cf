"""Run by test_store: makes restore points and is killed at every change of a file in turn.

``killed_commit.py STORE before|after`` forks a child for N = 1, 2, …, which makes one point and
gets SIGKILL at its N-th change: before it, or after it (after half of it, if it writes). Then the
store must be whole. It ends when a child gets through alive, and prints how many were killed.
"""

import fcntl
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ParamSpec, TypeVar

from cbtfs import catalogue, folder, store
from cbtfs.catalogue import DiskPoint, Point
from cbtfs.store import Intent, Store

VM = "0f4f1b2e-0000-4000-8000-000000000001"
BLOCK = 64 << 10
SIZE = 4 * BLOCK + 512
START = datetime(2026, 11, 22, 2, tzinfo=UTC)
KEPT = 3
CALLS = (
    "open", "mkdir", "write", "pwrite", "ftruncate", "fsync", "rename", "unlink", "rmdir",
    "symlink", "copy_file_range",
)  # fmt: skip

P = ParamSpec("P")
R = TypeVar("R")


class Killer:
    """Counts changes, and kills at the ``limit``-th."""

    def __init__(self, limit: int, mode: str) -> None:
        self.count = 0
        self.limit = limit
        self.mode = mode

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self.wrap(getattr(os, name), name))
        for module, name in ((fcntl, "ioctl"), (fcntl, "flock"), (folder, "renameat2")):
            setattr(module, name, self.wrap(getattr(module, name), name))

    def wrap(self, call: Callable[P, R], name: str) -> Callable[P, R]:
        def counted(*args: P.args, **kwargs: P.kwargs) -> R:
            if name == "open" and not int(str(args[1])) & os.O_CREAT:
                return call(*args, **kwargs)
            self.count += 1
            if self.count < self.limit:
                return call(*args, **kwargs)
            if self.mode == "after" and name in {"write", "pwrite"}:
                half(*args)
            elif self.mode == "after":
                call(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

        def half(fd: object, data: object, offset: object = None) -> None:
            assert isinstance(fd, int)
            assert isinstance(data, bytes | memoryview)
            if isinstance(offset, int):
                os.lseek(fd, offset, os.SEEK_SET)
            with os.fdopen(fd, "wb", buffering=0, closefd=False) as file:
                file.write(data[: len(data) // 2])

        return counted


def change(content: bytes, number: int) -> bytes:
    at = number % 4 * BLOCK
    return content[:at] + random.Random(number).randbytes(BLOCK) + content[at + BLOCK :]


def disk(root: str = "") -> DiskPoint:
    return DiskPoint(
        device="xvda",
        file="xvda.raw",
        digests="xvda.b3",
        digest_root=root,
        size=SIZE,
        vdi_uuid="v",
    )


def make_point(opened: Store, time: str, *, base: str, content: bytes) -> None:
    with opened.lock(VM):
        for leftover in opened.leftovers(VM):
            opened.abandon(leftover)
        with opened.stage(VM, time=time) as stage:
            stage.record(Intent(time=time, run="r", snapshot_name=f"s {time}", vm_uuid=VM))
            if base:
                image = stage.cloned_image("xvda.raw", base_time=base, base=disk(), size=SIZE)
            else:
                image = stage.new_image("xvda.raw", size=SIZE)
            image.write(0, content)
            root = image.finish()
            stage.write_metadata("vm.xml", b"<vm/>")
            warnings = stage.commit(
                Point(time=time, vm_uuid=VM, vm_name="web1", disks=(disk(root),))
            )
            assert warnings == ()


def check(path: Path, model: dict[str, bytes]) -> list[str]:
    """Fail unless every listed point is the one of ``model``; return their times."""
    with store.open_store(path) as opened:
        history = opened.catalogue().vms.get(VM)
        assert opened.problems == (), opened.problems
        points = history.points if history else ()
        for point in points:
            folder_path = opened.point_path(VM, point.time)
            assert (folder_path / "xvda.raw").read_bytes() == model[point.time]
            assert (folder_path / "vm.xml").read_bytes() == b"<vm/>"
        if points:
            found = opened.catalogue().resolve(f"web1/{points[-1].time}")
            assert not opened.verify(found).damaged
        for link in (path / VM / "latest", path / "by-name" / "web1"):
            assert not link.is_symlink() or link.exists(), f"{link} dangles"
    return [point.time for point in points]


def main(path: Path, mode: str) -> int:
    model: dict[str, bytes] = {}
    times: list[str] = []
    for number in range(1, 1000):
        time = catalogue.format_time(START + timedelta(seconds=number))
        model[time] = change(model[times[-1]] if times else bytes(SIZE), number)
        child = os.fork()
        if child == 0:
            Killer(number, mode).install()
            with store.open_store(path) as opened:
                make_point(opened, time, base=times[-1] if times else "", content=model[time])
            os._exit(0)
        _, status = os.waitpid(child, 0)
        now = check(path, model)
        assert now in (times, [*times, time]), "a committed point was lost"
        times = now[-KEPT:]
        for old in now[:-KEPT]:
            shutil.rmtree(path / VM / old)  # any point can go at any time
        if not os.WIFSIGNALED(status):
            assert status == 0
            assert times[-1] == time
            assert (path / VM / "latest").readlink() == Path(time)
            return number - 1
    raise AssertionError("no child survived")


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), sys.argv[2]))  # noqa: T201 - the answer to test_store
