"""Opened: the file systems of a restore point, mounted read-only in a directory, and their end.

::

    DIR             a tmpfs whose source says of which point, "cbtfs-open:VM-UUID/TIME", mode 0700
    ├── xvda1       mount -o ro,…,loop,offset=…,sizelimit=… IMAGE DIR/xvda1
    ├── xvda-root   a volume of LVM, the same way
    └── xvda-data   one in several pieces, from the file that joined.py makes of them
    DIR             or the one file system itself

    /run/cbtfs/volumes      joined.py's files, as long as an open looks for file systems and mounts

There is no record of what is open beside the kernel's own list of mounts. ``mount -o loop`` makes
a read-only loop device that the kernel takes away with its mount, and the tmpfs takes the folders
with it. So whatever comes in between - SIGKILL, ``umount`` by hand - leaves nothing that ``close``
does not find.

The files of joined.py are unmounted lazily once what is in them is mounted: then their process
lives as long as a loop device has one of them. What a killed ``open`` left of that goes with the
next ``open`` or ``close``, for only one runs at a time.

Rules of this file:

1. Nothing is written to an image: its loop device is read-only, and no journal is replayed.
2. One opens or closes at a time. The lock is a descriptor that the tools inherit as their standard
   input, so that ``close`` waits for a mount that outlived the one who asked for it.
"""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from . import contents, errors, lock, mountpoint, programs, sparse, volumes
from .contents import Found, Image, Region, Skipped, Spread, Way
from .folder import Folder, told
from .mountpoint import Mounted
from .programs import Programs

SOURCE = "cbtfs-open:"
"""What the source of the tmpfs begins with."""

STATE = Path("/run/cbtfs")

VOLUMES = STATE / "volumes"
"""Where the volumes are shown that are in several pieces, until they are mounted."""

DETACH_LIMIT = 5.0
"""Seconds that the kernel gets to take a loop device away; udev may hold it for a moment."""

_LOOP = re.compile(r"/dev/(loop[0-9]+)")
_IMAGE = re.compile(r".*/(?:vdi-)?[0-9a-f-]{36}/[^/]+/[^/]+\.raw(?: \(deleted\))?")
_JOINED = re.compile(rf"(?:.*/)?{SOURCE}[^/]+")  # no longer below VOLUMES, once that is unmounted
_AMBIVALENT = 8  # blkid(8), exit status
_UNKNOWN = "unknown filesystem type"
_OVERLAP = "overlapping loop device"


@dataclass(frozen=True, slots=True)
class Mount:
    """A file system that is open at ``where``."""

    region: Region
    type: str
    where: str


@dataclass(slots=True)
class Opened:
    """What ``open_images`` did."""

    where: str
    commands: list[str]
    mounts: list[Mount] = field(default_factory=list[Mount])
    skipped: list[Skipped] = field(default_factory=list[Skipped])
    warnings: list[str] = field(default_factory=list[str])


@dataclass(frozen=True, slots=True)
class Closed:
    """What ``close`` did: the places it unmounted, and how."""

    where: str
    unmounted: list[str]
    commands: list[str]


def open_images(
    images: Sequence[Image],
    where: Path,
    *,
    point: str,
    is_disk: bool,
    tell: Callable[[str], None],
) -> Opened:
    """Mount what is in ``images`` at ``where``, an empty directory that is made if need be.

    Args:
        images: of one restore point.
        where: the directory.
        point: what to call the point in the kernel's list, without blanks.
        is_disk: whether the user named this one disk; if it holds but one file system, ``where`` is
            its root. Otherwise each has a folder there.
        tell: hears of each command before it runs.

    Raises:
        MountError: nothing could be mounted, or something that should be; nothing is open then.
    """
    with _tools(tell) as tools:
        survey = _Survey(tools)
        for image in images:
            survey.look(image)
        with _joined(survey.look_for_volumes(), tools) as (regions, skipped):
            survey.skipped += skipped
            survey.look_into(regions)
            if not survey.found:
                raise _nothing(survey.skipped)
            with _place(where, tools) as path:
                opened = Opened(str(path), tools.commands, skipped=survey.skipped)
                source = "" if is_disk and len(survey.found) == 1 else f"{SOURCE}{point}"
                _mount_all(survey.found, opened, tools, source=source)
    return opened


def close(where: Path, *, tell: Callable[[str], None]) -> Closed:
    """Unmount what ``open_images`` mounted at ``where``, whoever ran it and however it ended.

    Raises:
        MountError: nothing is open there, or something of it is in use: then the rest may be closed
            already, and a second call goes on.
    """
    path = mountpoint.located(where)
    with _tools(tell) as tools:
        _unjoin(tools)
        if not _ours(path):
            mounted = mountpoint.find(path)
            what = f"has {mounted.type} mounted on it, by another program" if mounted else "is not"
            hint = f"; use: umount {path}" if mounted else " open; 'mount' lists what is mounted"
            raise errors.MountError(f"{path} {what}{hint}")
        return Closed(str(path), _unwind(path, tools), tools.commands)


def check_root(verb: str) -> None:
    """Raise MountError with another way if this is not root."""
    if os.geteuid() != 0:
        raise errors.MountError(
            f"cbtfs {verb} needs root, because it mounts; use sudo, or guestmount or nbdkit, which"
            f' do not: see "Without root" in {contents.RECIPES}'
        )


@contextmanager
def _tools(tell: Callable[[str], None]) -> Generator[Programs]:
    with told("create", STATE):
        STATE.mkdir(mode=0o700, exist_ok=True)
    with Folder.open(STATE) as folder, lock.held(folder, wait=True) as held:
        yield Programs(tell, held)


# ── What there is ────────────────────────────────────────────────────────────────────────────


class _Survey:
    """What some disks hold: ``found`` is to be mounted, ``skipped`` is not."""

    def __init__(self, tools: Programs) -> None:
        self.found: list[Found] = []
        self.skipped: list[Skipped] = []
        self._tools = tools
        self._members: list[tuple[Region, volumes.Member]] = []

    def look(self, image: Image) -> None:
        """Look at a disk: it holds partitions, or is itself what it holds."""
        whole = Region(image, image.label, 0, image.size)
        probe = self._probe(whole)
        if probe.type or not probe.table:
            self._sort(Found(whole, probe.type))
            return
        columns = ("--raw", "--noheadings", "--output", "NR,START,SECTORS,TYPE")
        done = self._tools.run("partx", *columns, image.path)
        if done.returncode != 0:
            raise errors.MountError(f"partx cannot read {image.path}: {programs.said(done)}")
        regions, skipped = contents.partitions(done.stdout, image)
        self.skipped += skipped
        for region in regions:
            self._sort(Found(region, self._probe(region).type))

    def look_for_volumes(self) -> list[Spread]:
        """Look into what belongs to LVM, once all disks are known; return what is to be joined."""
        volumes = contents.volumes(self._members)
        self.skipped += volumes.skipped
        self.look_into(volumes.regions)
        return volumes.spread

    def look_into(self, regions: Sequence[Region]) -> None:
        """Look at volumes: there are no tables of partitions in them that would count."""
        for region in regions:
            self._sort(Found(region, self._probe(region).type))

    def _probe(self, region: Region) -> contents.Probe:
        extent = ("--offset", str(region.offset), "--size", str(region.size))
        done = self._tools.run("blkid", "-p", "-o", "export", *extent, region.image.path)
        if done.returncode == _AMBIVALENT:
            return contents.Probe(contents.AMBIVALENT)
        return contents.parse_probe(done.stdout if done.returncode == 0 else "")

    def _sort(self, found: Found) -> None:
        region = found.region
        if found.type == contents.LVM_MEMBER and not region.volume:
            self._remember(found)
            return
        skipped = contents.left_alone(found)
        if skipped:
            self.skipped.append(skipped)
        else:
            self.found.append(found)

    def _remember(self, found: Found) -> None:
        region = found.region
        try:
            member = volumes.member(lambda offset, length: read(region, offset, length))
        except errors.StoreError as exc:
            self.skipped.append(contents.damaged_member(found, str(exc)))
            return
        self._members.append((region, member))


def read(region: Region, offset: int, length: int) -> bytes:
    """Return bytes of a region; fewer than ``length`` where it ends.

    Raises:
        StoreError: the image cannot be read.
    """
    path = Path(region.image.path)
    length = min(length, region.size - offset)
    if length <= 0:
        return b""
    with told("read", path):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return sparse.read_all(fd, length, region.offset + offset)
        finally:
            os.close(fd)


def _nothing(skipped: Sequence[Skipped]) -> errors.MountError:
    return errors.MountError(f"nothing here can be mounted: {_reasons(skipped)}")


def _reasons(skipped: Sequence[Skipped]) -> str:
    shown = "; ".join(map(str, skipped[:5]))
    return f"{shown}; and {len(skipped) - 5} more" if len(skipped) > 5 else shown


# ── Volumes in several pieces ────────────────────────────────────────────────────────────────


@contextmanager
def _joined(
    spread: Sequence[Spread], tools: Programs
) -> Generator[tuple[list[Region], list[Skipped]]]:
    """Yield volumes as what files show that are there until this ends, and as long as mounted.

    Or why they are left alone: without FUSE all the others can be opened still.
    """
    _unjoin(tools)
    if not spread:
        yield [], []
        return
    if not VOLUMES.is_dir():
        _done(tools, "mkdir", str(VOLUMES))
    try:
        done = tools.run(*_join_command(spread))
        if done.returncode == 0:
            with suppress(OSError):  # a container; it is but slower then
                mountpoint.read_further(VOLUMES)
            yield [each.region(str(VOLUMES / _file(each))) for each in spread], []
        else:
            yield [], [contents.unjoined(each, programs.said(done)) for each in spread]
    finally:
        _unjoin(tools)


def _join_command(spread: Sequence[Spread]) -> list[str]:
    images = list(dict.fromkeys(image.path for each in spread for image in each.images))
    words = [sys.executable, "-m", "cbtfs.joined", str(VOLUMES)]
    words += (f"--image={path}" for path in images)
    for each in spread:
        numbers = [images.index(image.path) for image in each.images]
        words += (f"{_file(each)} {line}" for line in each.table.lines(numbers))
    return words


def _file(spread: Spread) -> str:
    return f"{SOURCE}{spread.label}"


def _unjoin(tools: Programs) -> None:
    """Unmount the files of volumes; those that a loop device has stay with it, till it goes."""
    if mountpoint.find(VOLUMES):
        _done(tools, "umount", "--lazy", str(VOLUMES))


# ── Mounting ─────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _place(where: Path, tools: Programs) -> Generator[Path]:
    """Yield where to mount: an empty directory. After an error all is as it was."""
    path = mountpoint.located(where)
    if _ours(path):
        raise errors.MountError(f"{path} is open already; run: cbtfs close {path}")
    is_new = not path.exists()
    try:
        if is_new:
            _done(tools, "mkdir", str(path))
        yield mountpoint.check(path)
    except BaseException:
        _unwind(path, tools)
        if is_new and path.is_dir():
            tools.run("rmdir", str(path))
        raise


def _mount_all(found: Sequence[Found], opened: Opened, tools: Programs, *, source: str) -> None:
    """Mount each in a folder of its own, in a tmpfs called ``source``; without one the only one."""
    if source:
        options = "size=1m,mode=0700,nodev,nosuid,noexec"
        _done(tools, "mount", "-t", "tmpfs", "-o", options, source, opened.where)
    for each in found:
        place = Path(opened.where, each.region.label) if source else Path(opened.where)
        if source:
            _done(tools, "mkdir", str(place))
        _mount(each, place, opened, tools)
    if not opened.mounts:
        raise _nothing(opened.skipped)


def _mount(found: Found, place: Path, opened: Opened, tools: Programs) -> None:
    region = found.region
    for way in contents.WAYS[found.type]:
        done = tools.run(*_mount_command(region, way, place))
        if done.returncode == 0:
            opened.mounts.append(Mount(region, found.type, str(place)))
            if contents.has_journal_to_replay(read(region, 0, 2048)):
                opened.warnings.append(contents.unreplayed(region))
            return
        if _UNKNOWN not in done.stderr:
            raise errors.MountError(_refusal(found, done))
    opened.skipped.append(contents.unknown_here(found))
    if str(place) != opened.where:
        _done(tools, "rmdir", str(place))


def _refusal(found: Found, done: subprocess.CompletedProcess[str]) -> str:
    region = found.region
    sentence = f"{region.label} ({found.type}) cannot be mounted, so nothing is open: {programs.said(done)}"
    if _OVERLAP in done.stderr:
        path = shlex.quote(region.image.path)
        return f"{sentence}; see which with losetup -j {path}, and detach it with losetup -d"
    return f'{sentence}; see "{contents.BROKEN}" in {contents.RECIPES}'


def _mount_command(region: Region, way: Way, place: Path) -> list[str]:
    extent = ("loop", f"offset={region.offset}", f"sizelimit={region.size}")
    options = ",".join((*contents.OPTIONS, *way.options, *extent))
    return ["mount", "-t", way.type, "-o", options, region.image.path, str(place)]


def _done(tools: Programs, *words: str) -> None:
    done = tools.run(*words)
    if done.returncode != 0:
        raise errors.MountError(f"{words[0]} failed: {programs.said(done)}")


# ── Unmounting ───────────────────────────────────────────────────────────────────────────────


def _ours(path: Path) -> list[Mounted]:
    """Return what is mounted at and below ``path`` since something was opened there, in order."""
    found = [m for m in mountpoint.mounts() if Path(m.path).is_relative_to(path)]
    roots = [i for i, m in enumerate(found) if m.path == str(path)]
    for index in roots:
        if _is_ours(found[index]):
            return found[index:]
    return []


def _is_ours(mounted: Mounted) -> bool:
    """Tell whether this is our tmpfs, or an image of a store or a volume through a loop device."""
    by_name = mounted.type == "tmpfs" and mounted.source.startswith(SOURCE)
    behind = _backing(mounted.source)
    return by_name or bool(_IMAGE.fullmatch(behind) or _JOINED.fullmatch(behind))


def _backing(source: str) -> str:
    """Return the file behind a loop device; "" if ``source`` is none, or is free."""
    loop = _LOOP.fullmatch(source)
    with suppress(OSError):
        if loop:
            file = Path(f"/sys/block/{loop[1]}/loop/backing_file")
            return os.fsdecode(file.read_bytes().removesuffix(b"\n"))
    return ""


def _unwind(path: Path, tools: Programs) -> list[str]:
    """Unmount everything at and below ``path``, the last first; return the places."""
    mounts = _ours(path)
    for mounted in mounts:
        if not _is_ours(mounted):
            raise errors.MountError(
                f"{mounted.path} has {mounted.type} mounted on it, by another program; unmount that"
                f" first: umount {mounted.path}"
            )
    behind = {m.source: _backing(m.source) for m in mounts if _backing(m.source)}
    for mounted in reversed(mounts):
        done = tools.run("umount", mounted.path)
        if done.returncode != 0:
            raise errors.MountError(_why_not(Path(mounted.path), programs.said(done)))
    _await_detached(behind)
    return [m.path for m in reversed(mounts)]


def _why_not(path: Path, complaint: str) -> str:
    users = _users(path)
    if not users and "busy" not in complaint:
        return f"{path} cannot be unmounted: {complaint}"
    who = ", ".join(users[:5]) or "somebody; see: fuser -vm " + str(path)
    return f"{path} is in use by {who}; end that, and run the command again"


def _users(path: Path) -> list[str]:
    """Return the processes that have a file or directory below ``path`` open: ``sh (4711)``."""
    found: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            links = [process / "cwd", process / "root", *(process / "fd").iterdir()]
            if any(_leads_into(link, path) for link in links):
                name = (process / "comm").read_text(errors="replace").strip()
                found.append(f"{name} ({process.name})")
    return found


def _leads_into(link: Path, path: Path) -> bool:
    with suppress(OSError):
        return link.readlink().is_relative_to(path)
    return False


def _await_detached(behind: dict[str, str]) -> None:
    """Wait until the kernel has let go of the images, unless a device of them is used elsewhere."""
    until = time.monotonic() + DETACH_LIMIT
    while time.monotonic() < until:
        used = {m.source for m in mountpoint.mounts()}
        if all(_backing(loop) != file or loop in used for loop, file in behind.items()):
            return
        time.sleep(0.02)
