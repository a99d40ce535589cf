"""Disks made with the tools that guests use, and a store to put them in."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cbtfs import cli, image as images, store as stores
from cbtfs.catalogue import DiskPoint, Point

from .program import untouched_process
from .test_store import intent

VM = "0f4f1b2e-0000-4000-8000-000000000009"
MiB = 1 << 20
FILES = {"etc/hostname": b"web1\n", "var/big": os.urandom(300_000), "empty": b""}


def run(*words: str | Path, given: str = "") -> str:
    """Run a tool; it must succeed."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    environment = os.environ | {"PATH": path, "LVM_SUPPRESS_FD_WARNINGS": "1", "LC_ALL": "C"}
    done = subprocess.run(
        list(map(str, words)), input=given, capture_output=True, text=True, env=environment
    )  # fmt: skip
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def tree(folder: Path) -> dict[str, bytes]:
    """Return the files below ``folder`` that ``FILES`` could name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def file_system(path: Path, kind: str, *, size: int) -> Path:
    """Make a file system that holds ``FILES``, as far as that needs no driver of this kernel."""
    source = path.with_name("files")
    for name, content in FILES.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    blank(path, size=size)
    match kind:
        case "ext4":
            run("mkfs.ext4", "-q", "-F", "-d", source, path)
        case "btrfs":
            run("mkfs.btrfs", "-q", "--rootdir", source, path)
        case "xfs":
            run("mkfs.xfs", "-q", path)
            with mounted(path) as place:
                shutil.copytree(source, place, dirs_exist_ok=True)
        case "ntfs":
            run("mkntfs", "-q", "-F", "-f", path)
            for name in ("empty", "big"):
                run("ntfscp", "-q", path, source / ("var/big" if name == "big" else name), name)
        case _:
            run(f"mkfs.{kind}", path)
    return path


@contextlib.contextmanager
def mounted(path: Path) -> Iterator[Path]:
    """Mount a file system to be written."""
    place = path.with_name("place")
    place.mkdir(exist_ok=True)
    run("mount", "-o", "loop", path, place)
    try:
        yield place
    finally:
        run("umount", place)


def blank(path: Path, *, size: int) -> Path:
    """Make a file of zeros."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def put(disk: Path, piece: Path, *, at: int) -> None:
    """Write ``piece`` into ``disk``, leaving holes where it has zeros."""
    run("dd", f"if={piece}", f"of={disk}", "bs=1M", f"seek={at}", "oflag=seek_bytes",
        "conv=notrunc,sparse", "status=none")  # fmt: skip


def partitioned(path: Path, *, size: int, table: str) -> Path:
    """Make a disk with a table of partitions, a script of sfdisk."""
    run("sfdisk", "-q", blank(path, size=size), given=table)
    return path


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it printed."""

    status: int
    stdout: str
    stderr: str


def in_process(*arguments: str) -> Done:
    """Run ``cbtfs`` in this process, which is quicker."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    out, err = streams
    with untouched_process(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(arguments)
    for stream in streams:
        stream.seek(0)
    return Done(status, out.read(), err.read())


@dataclass
class MadeStore:
    """A store, its command, and the points that were put in."""

    path: Path
    times: list[str] = field(default_factory=list[str])

    def add(self, disks: Mapping[str, Path]) -> str:
        """Put a point with these disks in; return what to call it."""
        time = f"202611{len(self.times) + 1:02}T020000Z"
        self.times.append(time)
        with stores.open_store(self.path) as store:
            with store.lock(VM), store.stage(VM, time=time) as stage:
                stage.record(intent(time, vm=VM))
                records: list[DiskPoint] = []
                for device, source in disks.items():
                    size = source.stat().st_size
                    image = stage.new_image(f"{device}.raw", size=size)
                    fill(image, source)
                    root = image.finish()
                    records.append(
                        DiskPoint(device=device, file=f"{device}.raw", digests=f"{device}.b3",
                                  digest_root=root, size=size, vdi_uuid="v")
                    )  # fmt: skip
                stage.commit(Point(time=time, vm_uuid=VM, vm_name="web1", disks=tuple(records)))
        return f"web1/{time}"

    def image(self, point: str, device: str = "xvda") -> Path:
        """Return the image of a disk."""
        return self.path / VM / point.rpartition("/")[2] / f"{device}.raw"

    def command(self, *arguments: str) -> list[str]:
        """Return a whole command line."""
        return [sys.executable, "-m", "cbtfs", "--store", str(self.path), *arguments]

    def run(
        self,
        *arguments: str | Path,
        status: int | None = 0,
        environ: Mapping[str, str] | None = None,
    ) -> Done:
        """Run the command; fail unless it ends with ``status``, if that is said.

        With an environment of its own that is a process of its own, too.
        """
        if environ is None:
            done = in_process("--store", str(self.path), *map(str, arguments))
        else:
            words = self.command(*map(str, arguments))
            environment = {**os.environ, **environ}
            ended = subprocess.run(words, capture_output=True, text=True, env=environment)
            done = Done(ended.returncode, ended.stdout, ended.stderr)
        assert status in {None, done.status}, f"{arguments}: {done.status}\n{done.stderr}"
        return done

    def json(self, *arguments: str | Path) -> dict[str, object]:
        """Run the real command; return its document."""
        found: object = json.loads(self.run("--json", *arguments).stdout)
        assert isinstance(found, dict)
        return found

    def loops(self) -> list[str]:
        """Return the images of this store that a loop device has, and how: ``1 1 IMAGE``."""
        listed = run("losetup", "--list", "--noheadings", "--output", "RO,AUTOCLEAR,BACK-FILE")
        return [" ".join(li.split()) for li in listed.splitlines() if str(self.path) in li]

    def is_untouched(self, place: Path) -> bool:
        """Tell whether nothing is left of an open at ``place``."""
        mounts = Path("/proc/self/mountinfo").read_text()
        return not self.loops() and f" {place}" not in mounts and not any(place.glob("*"))


def fill(image: images.Image, source: Path) -> None:
    """Copy a sparse file into an image."""
    step = 1 << 20
    with source.open("rb") as file:
        for at in range(0, source.stat().st_size, step):
            data = file.read(step)
            if data.strip(b"\0"):
                image.write(at, data)


def lvm(loops: Sequence[str], *commands: str) -> None:
    """Run commands of LVM that see nothing but ``loops``, and no device-mapper."""
    accepted = ",".join(f'"a|^{loop}$|"' for loop in loops)
    config = (
        f'devices{{filter=[{accepted},"r|.*|"] use_devicesfile=0}} backup{{backup=0 archive=0}}'
    )
    for command in commands:
        verb, *rest = command.split()
        run(verb, "--driverloaded", "n", "--config", config, "-qq", *rest)


@contextlib.contextmanager
def loops(disks: Iterable[Path], *, offsets: Sequence[int]) -> Iterator[list[str]]:
    """Give each disk a loop device, from an offset on."""
    made: list[str] = []
    try:
        for disk, offset in zip(disks, offsets, strict=True):
            made.append(run("losetup", "--find", "--show", "--offset", str(offset), disk).strip())
        yield made
    finally:
        run("losetup", "--detach", *made)


@dataclass(frozen=True)
class Laid:
    """A segment of a volume: the loop device and the offset of each column."""

    size: int
    columns: list[tuple[str, int]]
    chunk: int


def layouts(loops: Sequence[str]) -> dict[str, list[Laid]]:
    """Return where LVM says that volumes lie."""
    accepted = ",".join(f'"a|^{loop}$|"' for loop in loops)
    only = f'devices{{filter=[{accepted},"r|.*|"] use_devicesfile=0}}'
    common = ("--driverloaded", "n", "--config", only, "--noheadings", "--units", "b", "--nosuffix")
    told = run("pvs", *common, "-o", "pv_name,pe_start,vg_extent_size")
    starts = {
        name: (int(start), int(size)) for name, start, size in map(str.split, told.splitlines())
    }
    columns = "lv_name,seg_start,seg_size,stripe_size,seg_pe_ranges"
    told = run("lvs", *common, "--segments", "-O", "lv_name,seg_start", "-o", columns)
    found: dict[str, list[Laid]] = {}
    for name, _, size, chunk, *ranges in map(str.split, told.splitlines()):
        places: list[tuple[str, int]] = []
        for loop, _, extents in (each.partition(":") for each in ranges):
            start, extent = starts[loop]
            places.append((loop, start + int(extents.split("-")[0]) * extent))
        found.setdefault(name, []).append(Laid(int(size), places, int(chunk) or int(size)))
    return found


def lay(
    source: Path, layout: Sequence[Laid], disks: Mapping[str, Path], starts: Mapping[str, int]
) -> None:
    """Write a volume into the disks behind loop devices that begin at ``starts`` of them."""
    with source.open("rb") as file:
        for loop, at, count in _in_order(layout):
            data = file.read(count)
            if not data.strip(b"\0"):
                continue
            with disks[loop].open("r+b") as disk:
                disk.seek(starts[loop] + at)
                disk.write(data)


def _in_order(layout: Sequence[Laid]) -> Iterator[tuple[str, int, int]]:
    for segment in layout:
        for number in range(segment.size // segment.chunk):
            row, column = divmod(number, len(segment.columns))
            loop, first = segment.columns[column]
            yield loop, first + row * segment.chunk, segment.chunk
