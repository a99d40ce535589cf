"""The kernel is given what lies around a read, of what never changes."""

import ctypes
import errno
import logging
import mmap
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from cbtfs import pages
from cbtfs.pages import Pages

from .test_mounted import LIVE, SNAPSHOT, User, pool, top, user

__all__ = ["pool", "top", "user"]

GRAIN = 64 << 10
PAGE = mmap.PAGESIZE


async def until(happened: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not happened():  # noqa: ASYNC110 - a thread does it
            await trio.sleep(0.01)


async def test_what_is_given_is_stored_in_order_as_it_was(nursery: trio.Nursery) -> None:
    stored: list[tuple[int, int, bytes]] = []
    given = Pages(lambda *piece: stored.append(piece))
    nursery.start_soon(given.run)

    data = bytearray(b"abc")
    given.give(7, 0, memoryview(data))
    data[:] = b"xyz"  # the buffer is used again
    given.give(7, 4096, memoryview(data))
    await until(lambda: len(stored) == 2)

    assert stored == [(7, 0, b"abc"), (7, 4096, b"xyz")]


async def test_what_the_kernel_takes_too_slowly_is_left_out(nursery: trio.Nursery) -> None:
    stored: list[int] = []
    gate = threading.Event()

    def slow(inode: int, *_: object) -> None:
        gate.wait(10)
        stored.append(inode)

    given = Pages(slow)
    nursery.start_soon(given.run)
    for inode in range(3 * pages.PENDING):
        given.give(inode, 0, memoryview(b"data"))
    gate.set()
    await until(lambda: len(stored) >= pages.PENDING)

    assert pages.PENDING <= len(stored) <= pages.PENDING + 1
    assert stored == list(range(len(stored)))


async def test_a_file_that_the_kernel_has_forgotten_is_no_matter(nursery: trio.Nursery) -> None:
    asked: list[int] = []

    def store(inode: int, *_: object) -> None:
        asked.append(inode)
        raise OSError(errno.ENOENT, "gone")

    given = Pages(store)
    nursery.start_soon(given.run)
    for inode in range(3):
        given.give(inode, 0, memoryview(b"data"))
    await until(lambda: len(asked) == 3)


async def test_a_kernel_that_cannot_is_not_asked_again(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    asked: list[int] = []

    def store(inode: int, *_: object) -> None:
        asked.append(inode)
        raise OSError(errno.ENOSYS, "no such thing")

    given = Pages(store)
    nursery.start_soon(given.run)
    given.give(1, 0, memoryview(b"data"))
    await until(lambda: "takes no pages" in caplog.text)
    given.give(2, 0, memoryview(b"data"))
    await trio.sleep(0.05)

    assert asked == [1]


async def test_it_ends_when_told_even_if_the_kernel_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pages, "GRACE", 0.05)
    asked, gate = threading.Event(), threading.Event()

    def stuck(*_: object) -> None:
        asked.set()
        gate.wait(10)

    given = Pages(stuck)
    try:
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(given.run)
                given.give(1, 0, memoryview(b"data"))
                await until(asked.is_set)
                nursery.cancel_scope.cancel()
    finally:
        gate.set()


# ── through the kernel ──


def resident(path: Path, start: int, length: int) -> list[bool]:
    """Tell of each page of a range whether the kernel has it (mincore(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
        *(ctypes.c_int, ctypes.c_int, ctypes.c_long),
    ]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    found = ctypes.create_string_buffer(-(-length // PAGE))
    with path.open("rb") as file:
        at = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), start)
        try:
            assert libc.mincore(at, length, found) == 0
        finally:
            libc.munmap(at, length)
    return [bool(page & 1) for page in found.raw[: -(-length // PAGE)]]


def wait_resident(path: Path, start: int, length: int) -> bool:
    """Wait until the kernel has all of a range; return False if it does not get it."""
    deadline = time.monotonic() + 5
    while not all(resident(path, start, length)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.fuse
@pytest.mark.timeout(120)
def test_around_a_small_read_of_a_snapshot_the_kernel_has_all_of_the_grain(top: Path) -> None:
    file = top / SNAPSHOT
    grain = 5 * GRAIN
    with file.open("rb", buffering=0) as disk:
        assert len(os.pread(disk.fileno(), 512, grain + 3 * PAGE)) == 512

        assert wait_resident(file, grain, GRAIN)
        assert not any(resident(file, grain + GRAIN, GRAIN))


@pytest.mark.fuse
@pytest.mark.timeout(120)
def test_a_live_disk_is_given_only_as_asked(top: Path) -> None:
    file = top / LIVE
    grain = 5 * GRAIN
    with file.open("rb", buffering=0) as disk:
        assert len(os.pread(disk.fileno(), 512, grain + 3 * PAGE)) == 512
        time.sleep(0.3)

        assert sum(resident(file, grain, GRAIN)) < GRAIN // PAGE


@pytest.mark.fuse
@pytest.mark.timeout(120)
@pytest.mark.parametrize("length", [512, 10_000])
def test_pieces_read_in_any_order_are_the_disk(user: User, tmp_path: Path, length: int) -> None:
    with user.mounted() as first:
        whole = (first / SNAPSHOT).read_bytes()
    with user.mounted() as top, (top / SNAPSHOT).open("rb", buffering=0) as disk:
        size = min(len(whole), 8 << 20)
        places = list(range(0, size, length))
        random.Random(length).shuffle(places)
        for at in places[:1500]:
            stop = min(at + length, size)
            assert os.pread(disk.fileno(), stop - at, at) == whole[at:stop]
