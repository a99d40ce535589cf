"""ext4 file systems with known files, equal to the last bit each time they are made.

``mke2fs -d`` fills the file system and needs no root. Two things in it would differ from one run
to the next: the time, fixed by E2FSPROGS_FAKE_TIME, and each inode's ctime and owner, which mke2fs
copies from the source files; debugfs sets them afterwards.
"""

import hashlib
import os
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from cbtfs import errors

EPOCH = 1_760_000_000
"""The time on all files, in seconds since 1970: 2025-10-09."""

BLOCK = 64 * 1024
_FEATURES = (
    "has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,"
    "huge_file,dir_nlink,extra_isize,metadata_csum"
)

Tree = Mapping[str, bytes | str]
"""Paths without a leading slash; bytes are a file's content, a str is a symbolic link's target."""


def noise(seed: str, length: int) -> bytes:
    """Return ``length`` bytes that don't compress and depend on ``seed`` alone."""
    return hashlib.shake_128(seed.encode()).digest(length)


def with_checksums(tree: Tree) -> dict[str, bytes | str]:
    """Return ``tree`` and a file SHA256SUMS that ``sha256sum -c`` accepts."""
    lines = [
        f"{hashlib.sha256(content).hexdigest()}  {path}\n"
        for path, content in sorted(tree.items())
        if isinstance(content, bytes)
    ]
    return {**tree, "SHA256SUMS": "".join(lines).encode()}


def make_ext4(image: Path, *, size: int, label: str, seed: uuid.UUID, tree: Tree) -> None:
    """Write an ext4 file system of ``size`` bytes that holds ``tree`` to the new file ``image``.

    A folder ``image`` + ``.files`` beside it is filled on the way and left behind.

    Raises:
        CbtfsError: mke2fs or debugfs is missing or failed.
    """
    source = image.with_name(image.name + ".files")
    paths = _write_tree(source, tree)
    with image.open("wb") as file:
        file.truncate(size)
    _run(
        *("mke2fs", "-q", "-F", "-b", "4096", "-I", "256", "-J", "size=4", "-m", "1"),
        *("-O", f"none,{_FEATURES}", "-U", str(seed), "-L", label, "-d", str(source)),
        *("-E", f"hash_seed={seed},lazy_itable_init=0,nodiscard,root_owner=0:0", str(image)),
    )
    commands = [
        f'sif "/{path}" {field} {value}\n'
        for path in ["lost+found", *paths]
        for field, value in (("ctime", f"@{EPOCH}"), ("uid", "0"), ("gid", "0"))
    ]
    _run("debugfs", "-w", "-f", "-", str(image), given="".join(commands))


def runs(image: Path, *, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of the blocks of ``image`` that are not zero, shifted by ``offset``."""
    with image.open("rb") as file:
        descriptor = file.fileno()
        for start, stop in _data(descriptor, os.fstat(descriptor).st_size):
            blocks = ((at, os.pread(descriptor, BLOCK, at)) for at in range(start, stop, BLOCK))
            yield from ((offset + at, data) for at, data in blocks if data.count(0) != len(data))


def _data(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the half-open ranges of a sparse file that hold data, widened to whole blocks."""
    stop = 0
    while stop < size:
        try:
            start = os.lseek(descriptor, stop, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole follows
            return
        start = max(stop, start // BLOCK * BLOCK)
        hole = os.lseek(descriptor, start, os.SEEK_HOLE)
        stop = max(start + BLOCK, -(-hole // BLOCK) * BLOCK)
        yield start, min(stop, size)


def _write_tree(source: Path, tree: Tree) -> list[str]:
    source.mkdir()
    paths: set[str] = set()
    for name, content in tree.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.symlink_to(content)
        else:
            path.write_bytes(content)
            path.chmod(0o644)
        paths.update({name, *(str(up) for up in Path(name).parents if up.name)})
    for name in sorted(paths, reverse=True):  # a folder after what lies in it
        path = source / name
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
        os.utime(path, (EPOCH, EPOCH), follow_symlinks=False)
    source.chmod(0o755)
    os.utime(source, (EPOCH, EPOCH))
    return sorted(paths)


def _run(*command: str, given: str = "") -> None:
    environment = {
        **os.environ,
        "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
        "E2FSPROGS_FAKE_TIME": str(EPOCH),
        "SOURCE_DATE_EPOCH": str(EPOCH),
        "MKE2FS_CONFIG": "/dev/null",  # the same file system on every distribution
        "LC_ALL": "C",
    }
    try:
        done = subprocess.run(
            command, input=given, env=environment, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise errors.CbtfsError(
            f"the simulated pool needs the command {command[0]}; install the package e2fsprogs"
        ) from None
    if done.returncode:
        raise errors.CbtfsError(f"{command[0]} failed: {done.stderr.strip()}")
