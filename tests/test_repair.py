"""Repair: bit rot is found, named, and made whole from the points that have the block."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import blake3
import pytest

from cbtfs import damage, digests, errors, proof, repair as repairs, sparse, store as stores
from cbtfs.catalogue import Point, Reference
from cbtfs.damage import Damage
from cbtfs.extents import Extent
from cbtfs.proof import Dispute
from cbtfs.repair import Found
from cbtfs.store import Store

from .test_store import BLOCK, SECOND, VM, disk_point, noise, spoil

TAIL = 512
FLIPS = int(os.environ.get("CBTFS_FLIPS", "1000"))
"""Bits that rot in the test of that; contrib/soak/bitrot lets more do so."""


@pytest.fixture
def root(any_dir: Path) -> Path:
    return any_dir / "store"


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with stores.open_store(root) as opened:
        yield opened


def chain(store: Store, versions: list[bytes], *, first_day: int = 1) -> list[str]:
    """Make a point for each content, each a clone of the one before; return their times."""
    times: list[str] = []
    for number, content in enumerate(versions):
        time = f"202610{first_day + number:02}T020000Z"
        base = named(store, times[-1]).point.disks[0] if times else None
        with store.lock(VM), store.stage(VM, time=time) as stage:
            if base is None:
                image = stage.new_image("xvda.raw", size=len(content))
            else:
                image = stage.cloned_image(
                    "xvda.raw", base_time=times[-1], base=base, size=len(content)
                )
            image.merge(0, content)
            disk = disk_point(len(content), image.finish())
            stage.commit(Point(time=time, vm_uuid=VM, vm_name="web1", disks=(disk,)))
        times.append(time)
    return times


def named(store: Store, time: str) -> Reference:
    """Return the one disk of a point."""
    return store.catalogue().resolve(f"web1/{time}/xvda")


def repaired(store: Store, time: str) -> repairs.Repair:
    with store.lock(VM):
        return repairs.repair(store, named(store, time))


def found_in(store: Store, time: str) -> Damage:
    return store.verify(named(store, time)).disks[0].damage


def flip(path: Path, offset: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


# ── bit rot ──


@dataclass
class Rot:
    """Bits that were flipped, and which blocks that made wrong, by point."""

    blocks: dict[str, set[int]]

    def extents(self, time: str, size: int) -> list[Extent]:
        bounds = [Extent(b * BLOCK, min((b + 1) * BLOCK, size)) for b in sorted(self.blocks[time])]
        merged: list[Extent] = []
        for extent in bounds:
            if merged and merged[-1].stop == extent.start:
                merged[-1] = Extent(merged[-1].start, extent.stop)
            else:
                merged.append(extent)
        return merged


def rot(root: Path, times: list[str], size: int, *, flips: int, rng: random.Random) -> Rot:
    """Flip ``flips`` bits, each of another block of a point."""
    blocks = -(-size // BLOCK)
    places = [(time, block) for time in times for block in range(blocks)]
    found: dict[str, set[int]] = {time: set() for time in times}
    for time, block in rng.sample(places, flips):
        length = min(BLOCK, size - block * BLOCK)
        flip(root / VM / time / "xvda.raw", block * BLOCK + rng.randrange(length), rng.randrange(8))
        found[time].add(block)
    return Rot(found)


def test_a_thousand_flipped_bits_are_found_named_and_repaired(
    root: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each block some points have the same, some another; some rot in several points."""
    monkeypatch.setattr(damage, "KEPT_EXTENTS", max(damage.KEPT_EXTENTS, FLIPS))
    rng = random.Random(int(os.environ.get("CBTFS_SEED", "7")))
    blocks = max(20, FLIPS // 5)
    current = [noise(BLOCK, seed=n) if n % 5 else bytes(BLOCK) for n in range(blocks)]
    versions: list[list[bytes]] = []
    for number in range(10):
        for block in rng.sample(range(blocks), blocks // 10):
            current[block] = noise(BLOCK, seed=1000 * number + block)
        versions.append(list(current))
    tail = noise(TAIL, seed=5)
    size = blocks * BLOCK + TAIL
    times = chain(store, [b"".join(v) + tail for v in versions])
    rotten = rot(root, times, size, flips=FLIPS, rng=rng)

    for time in times:
        found = found_in(store, time)
        assert found.blocks == len(rotten.blocks[time])
        assert list(found.extents) == rotten.extents(time, size)
        assert store.damaged(VM, time) == {"xvda"}
        assert is_refused_as_base(store, time)

    wanted = {t: {b for b in rotten.blocks[t] if healthy(rotten, times, versions, t, b)}
              for t in times}  # fmt: skip
    for time in times:
        done = repaired(store, time)
        assert done.blocks >= len(wanted[time])
        lost = {e.start // BLOCK for e in blocks_of(done.left.extents)}
        assert not lost & wanted[time]

    for time, version in zip(times, versions, strict=True):
        left = {e.start // BLOCK for e in blocks_of(found_in(store, time).extents)}
        image = (root / VM / time / "xvda.raw").read_bytes()
        for block, content in enumerate([*version, tail]):
            same = image[block * BLOCK : (block + 1) * BLOCK] == content
            assert same == (block not in left)
        assert (store.damaged(VM, time) == {"xvda"}) == bool(left)


def is_refused_as_base(store: Store, time: str) -> bool:
    base = named(store, time).point.disks[0]
    with store.lock(VM):
        with store.stage(VM, time=SECOND) as stage:
            with pytest.raises(errors.ImageDamaged, match="no base"):
                stage.cloned_image("xvda.raw", base_time=time, base=base, size=base.size)
        for leftover in store.leftovers(VM):
            store.abandon(leftover)
    return True


def blocks_of(found: tuple[Extent, ...]) -> list[Extent]:
    return [Extent(at, at + BLOCK) for e in found for at in range(e.start, e.stop, BLOCK)]


def healthy(
    rotten: Rot, times: list[str], versions: list[list[bytes]], time: str, block: int
) -> bool:
    """Tell whether a block is zeros, or another point has it whole."""
    if block == len(versions[0]):  # the tail is the same in all
        return any(block not in rotten.blocks[t] for t in times)
    content = versions[times.index(time)][block]
    return not any(content) or any(
        versions[number][block] == content and block not in rotten.blocks[other]
        for number, other in enumerate(times)
    )


def test_what_reflinks_can_share_is_shared_again(reflink_dir: Path) -> None:
    with stores.open_store(reflink_dir / "store") as store:
        first, second = chain(store, [noise(8 * BLOCK)] * 2)
        image = reflink_dir / "store" / VM / second / "xvda.raw"
        flip(image, 3 * BLOCK, 0)
        found_in(store, second)
        os.sync()
        before = shared(image)
        done = repaired(store, second)

        assert done.found == (Found(Extent(3 * BLOCK, 4 * BLOCK), first),)
        assert before < 8 * BLOCK
        assert shared(image) == 8 * BLOCK


def shared(path: Path) -> int:
    """Return how many bytes of a file other files have, too."""
    done = subprocess.run(["filefrag", "-vb512", path], check=True, capture_output=True, text=True)
    rows = [line for line in done.stdout.splitlines() if "shared" in line]
    return sum(int(row.split(":")[3]) for row in rows) * 512


def test_where_reflinks_fail_blocks_are_copied(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: int, target: int, extent: Extent) -> bool:
        raise sparse.Unreadable(errno.EIO, "no")

    first, second = chain(store, [noise(4 * BLOCK)] * 2)
    flip(root / VM / first / "xvda.raw", BLOCK, 1)
    monkeypatch.setattr(sparse, "reflink_range", refuse)

    done = repaired(store, first)
    assert done.found == (Found(Extent(BLOCK, 2 * BLOCK), second),)
    assert not found_in(store, first).found
    assert (root / VM / first / "xvda.raw").read_bytes() == noise(4 * BLOCK)


def test_nothing_is_written_that_the_digest_does_not_prove(store: Store, root: Path) -> None:
    """The other point has the same digest on record, but its block has rotted, too."""
    first, second = chain(store, [noise(4 * BLOCK)] * 2)
    for time, bit in ((first, 0), (second, 1)):
        flip(root / VM / time / "xvda.raw", BLOCK, bit)
    before = (root / VM / first / "xvda.raw").read_bytes()

    done = repaired(store, first)
    assert not done.does_something
    assert done.left.extents == (Extent(BLOCK, 2 * BLOCK),)
    assert store.damaged(VM, first) == {"xvda"}
    assert (root / VM / first / "xvda.raw").read_bytes() == before


def test_zeros_need_no_other_point(store: Store, root: Path) -> None:
    (only,) = chain(store, [noise(BLOCK) + bytes(2 * BLOCK) + noise(TAIL)])
    flip(root / VM / only / "xvda.raw", 2 * BLOCK - 1, 7)

    assert repaired(store, only).found == (Found(Extent(BLOCK, 2 * BLOCK), repairs.ZEROS),)
    assert not found_in(store, only).found


def test_what_is_possible_is_told_and_nothing_written(store: Store, root: Path) -> None:
    times = chain(store, [noise(4 * BLOCK)] * 3)
    flip(root / VM / times[1] / "xvda.raw", 5, 0)
    before = (root / VM / times[1] / "xvda.raw").read_bytes()
    found = found_in(store, times[1])

    told = repairs.possible(store, named(store, times[1]), found)
    assert (told.blocks, told.left.found) == (1, False)
    assert (root / VM / times[1] / "xvda.raw").read_bytes() == before
    assert store.damaged(VM, times[1]) == {"xvda"}


def test_more_damage_than_is_held_at_a_time_takes_several_rounds(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repairs, "KEPT_EXTENTS", 3)
    first, _ = chain(store, [noise(20 * BLOCK)] * 2)
    for block in range(0, 20, 2):
        flip(root / VM / first / "xvda.raw", block * BLOCK, 0)

    done = repaired(store, first)
    assert (done.blocks, done.left.found) == (10, False)
    assert store.damaged(VM, first) == frozenset()


def test_a_lost_image_is_nothing_to_repair(store: Store, root: Path) -> None:
    first, _ = chain(store, [noise(4 * BLOCK)] * 2)
    reference = named(store, first)
    (root / VM / first / "xvda.raw").unlink()

    with store.lock(VM):
        done = repairs.repair(store, reference)
    assert done.left.problem == "xvda.raw is missing"
    assert not done.does_something


# ── digests ──


@pytest.mark.parametrize("others", [0, 2])
@pytest.mark.parametrize(
    ("entries", "blocks"), [([1], []), ([0, 3, 4], []), ([1], [3]), ([2], [2]), ([0, 1, 2], [3, 4])]
)
def test_digests_that_rotted_are_repaired_if_the_root_proves_them(
    store: Store, root: Path, others: int, entries: list[int], blocks: list[int]
) -> None:
    content = noise(5 * BLOCK)
    time = chain(store, [content] * (1 + others))[0]
    point = root / VM / time
    whole = (point / "xvda.b3").read_bytes()
    for entry in entries:
        flip(point / "xvda.b3", entry * 16, 3)
    for block in blocks:
        flip(point / "xvda.raw", block * BLOCK, 3)

    done = repaired(store, time)
    both = bool(set(entries) & set(blocks))
    if both and not others:  # neither the block nor its digest is anywhere
        assert not done.does_something
        return
    assert (point / "xvda.b3").read_bytes() == whole
    assert done.entries == len(entries)
    assert {b.start // BLOCK for b in blocks_of(done.left.extents)} == (
        set() if others else set(blocks)
    )
    assert ((point / "xvda.raw").read_bytes() == content) == (bool(others) or not blocks)


def test_digests_of_another_content_are_not_taken(store: Store, root: Path) -> None:
    """Image and digests are those of other contents, in accord: only the root tells."""
    (only,) = chain(store, [noise(4 * BLOCK)])
    other = noise(BLOCK, seed=9)
    spoil(root / VM / only / "xvda.raw", 0, other)
    spoil(root / VM / only / "xvda.b3", 0, blake3.blake3(other).digest(length=16))

    done = repaired(store, only)
    assert not done.does_something
    assert done.left.problem == "its digests changed"
    assert store.damaged(VM, only) == {"xvda"}


def test_the_root_decides_which_digests_are_right(tmp_path: Path) -> None:
    right = [blake3.blake3(n.to_bytes(4)).digest(length=16) for n in range(300_000)]
    wrong = digests.ZERO
    array = b"".join(right)
    path = tmp_path / "array"
    path.write_bytes(wrong + array[16:])
    fd = os.open(path, os.O_RDONLY)
    disputes = [
        Dispute(0, wrong, right[0]),
        Dispute(7, right[7], wrong),
        Dispute(299_999, right[-1], b""),
    ]
    try:
        root = blake3.blake3(array).hexdigest()
        found = proof.settled(fd, disputes, size=len(array), root=root)
        assert found == {0: right[0], 7: right[7], 299_999: right[-1]}
        assert proof.settled(fd, disputes, size=len(array), root="0" * 64) is None
    finally:
        os.close(fd)


# ── killed, and run again ──


@pytest.mark.parametrize("any_dir", ["reflink"], indirect=True)
def test_killed_at_any_change_and_run_again(store: Store, root: Path) -> None:
    """Killed right before its first, second, … change on disk; the next run finishes."""
    first, _ = chain(store, [noise(6 * BLOCK) + bytes(BLOCK)] * 2)
    content = (root / VM / first / "xvda.raw").read_bytes()
    array = (root / VM / first / "xvda.b3").read_bytes()
    for stop in range(1, 100):
        for offset in (0, 2 * BLOCK, 3 * BLOCK, 6 * BLOCK + 1):
            flip(root / VM / first / "xvda.raw", offset, 0)
        flip(root / VM / first / "xvda.b3", 5 * 16, 0)
        child = os.fork()
        if child == 0:
            die_at(stop)
            with stores.open_store(root, create=False) as mine:
                repaired(mine, first)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status)
        # the first few changes are those that put the damage on record
        if killed and (root / VM / first / "xvda.raw").read_bytes() != content and stop > 8:
            assert store.damaged(VM, first) == {"xvda"}
        repaired(store, first)
        assert not found_in(store, first).found
        assert store.damaged(VM, first) == frozenset()
        assert (root / VM / first / "xvda.raw").read_bytes() == content
        assert (root / VM / first / "xvda.b3").read_bytes() == array
        if not killed:
            break
    assert stop > 8


def die_at(stop: int) -> None:
    """Kill this process at the ``stop``-th change that it wants to make on disk."""
    left = stop

    def counted(name: str, module: object) -> None:
        whole = getattr(module, name)

        def call(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*args, **kwargs)

        setattr(module, name, call)

    for name in ("write", "pwrite", "fsync", "rename", "unlink", "ftruncate"):
        counted(name, os)
    for name in ("punch", "reflink_range"):
        counted(name, sparse)


def test_a_second_command_finds_it_locked(store: Store, root: Path) -> None:
    first, second = chain(store, [noise(4 * BLOCK)] * 2)
    flip(root / VM / first / "xvda.raw", 0, 0)
    config = root.parent / "cbtfs.toml"
    config.touch()
    command = [sys.executable, "-m", "cbtfs", "--config", str(config), "--store", str(root)]
    with store.lock(VM):
        done = subprocess.run(
            [*command, "verify", "--repair"], check=False, capture_output=True, text=True
        )
    assert done.returncode == 4
    assert f"web1/{first}/xvda is not repaired: " in done.stderr
    assert f"  damaged: bytes 0 to {BLOCK}, whole in {second}\n" in done.stdout

    done = subprocess.run(
        [*command, "--json", "verify", "--repair"], check=True, capture_output=True, text=True
    )
    told = json.loads(done.stdout)
    assert told["damaged"] is False
    assert told["points"][0]["disks"][0]["repaired"] == [[0, BLOCK, second]]


def test_neighbours_are_named_together() -> None:
    found = [Found(Extent(n, n + 1), "t" if n < 3 else "u") for n in range(5)]
    joined: list[Found] = []
    for one in found:
        repairs._add(joined, one)
    assert joined == [Found(Extent(0, 3), "t"), Found(Extent(3, 5), "u")]
    assert all(a.extent.stop <= b.extent.start for a, b in pairwise(joined))
