"""Contents of disks: layers, snapshots of them, and how little an empty one costs."""

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from cbtfs.simulator import layers
from cbtfs.simulator.disk import Disk
from cbtfs.simulator.layers import BLOCK, CHUNK, Layer
from cbtfs.simulator.storage import Storage

MiB = 1 << 20
TiB = 1 << 40


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path)


def snapshot(storage: Storage, uuid: str, name: str) -> Disk:
    storage.snapshot(uuid, name, hidden=f"hidden of {name}", active=False, track=True)
    return storage.disks[name]


SIZE = 3 * CHUNK + 5 * 512

ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "discard", "snapshot", "drop"]),
        st.integers(0, SIZE - 1),
        st.sampled_from([1, 512, 4096, BLOCK, BLOCK + 1, 300_000, CHUNK, 2 * CHUNK]),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(actions=ACTIONS)
def test_a_disk_reads_what_was_written_whatever_its_layers(
    actions: list[tuple[str, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    storage = Storage(tmp_path_factory.mktemp("disks"))
    disk = storage.create("live", size=SIZE, sector=512)
    model = bytearray(SIZE)
    taken: dict[str, bytes] = {}

    for number, (action, offset, length) in enumerate(actions):
        length = min(length, SIZE - offset)
        if action == "write":
            disk.write(offset, bytes([number + 1]) * length)
            model[offset : offset + length] = bytes([number + 1]) * length
        elif action == "discard":
            disk.discard(offset, length)
            model[offset : offset + length] = bytes(length)
        elif action == "snapshot":
            snapshot(storage, "live", f"s{number}")
            taken[f"s{number}"] = bytes(model)
        elif taken:
            gone = sorted(taken)[offset % len(taken)]
            storage.destroy(gone)
            del taken[gone]

        assert disk.pread(0, SIZE) == model
        for name, image in taken.items():
            assert storage.disks[name].pread(0, SIZE) == image
    everything = bytearray(SIZE)
    for start, stop in disk.allocated():
        everything[start:stop] = disk.pread(start, min(stop, SIZE) - start)
    assert everything[:SIZE] == model


def test_16_tib_of_nothing_cost_nothing(storage: Storage, tmp_path: Path) -> None:
    disk = storage.create("huge", size=16 * TiB, sector=512)
    storage.enable_cbt("huge", active=False)
    disk.write(0, b"first")
    disk.write(16 * TiB - 4, b"last")

    assert list(disk.allocated()) == [(0, BLOCK), (16 * TiB - BLOCK, 16 * TiB)]
    assert disk.pread(16 * TiB - 5, 5) == b"\0last"
    assert disk.pread(5 * TiB, 4) == bytes(4)
    assert sum(p.stat().st_blocks * 512 for p in tmp_path.iterdir()) <= 4 * BLOCK
    assert len(storage.disks["huge"].chain()[0].masks) == 2


def test_a_long_run_is_one_read_of_a_file(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = storage.create("live", size=8 * MiB, sector=512)
    disk.write(0, os.urandom(8 * MiB))
    frozen = snapshot(storage, "live", "taken")
    reads: list[int] = []
    preadv = os.preadv

    def counted(file: int, buffers: list[memoryview], offset: int) -> int:
        reads.append(len(buffers[0]))
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    frozen.pread(0, 8 * MiB)

    assert reads == [8 * MiB]


def test_spans_tell_who_holds_what(tmp_path: Path) -> None:
    base = Layer(tmp_path, "base")
    base.mark(0, 8)
    leaf = Layer(tmp_path, "leaf", parent=base)
    leaf.mark(2, 4)

    found = list(layers.spans(leaf.chain(), 100, CHUNK + 5))

    assert found == [
        (base, 100, 2 * BLOCK),
        (leaf, 2 * BLOCK, 4 * BLOCK),
        (base, 4 * BLOCK, 8 * BLOCK),
        (None, 8 * BLOCK, CHUNK + 5),
    ]


def test_chains_are_shortened_when_a_snapshot_goes(storage: Storage) -> None:
    disk = storage.create("live", size=8 * MiB, sector=512)
    for number in range(60):
        disk.write(number * 1000, b"x" * 1000)
        snapshot(storage, "live", f"s{number}")
        if number:
            storage.destroy(f"s{number - 1}")

    assert len(disk.chain()) == 2
    assert disk.pread(0, 61_000) == b"x" * 60_000 + bytes(1000)


def test_an_unwritten_disk_shares_its_parent_with_the_next_snapshot(storage: Storage) -> None:
    disk = storage.create("live", size=8 * MiB, sector=512)
    disk.write(0, b"x")
    for number in range(40):
        snapshot(storage, "live", f"s{number}")

    assert len(disk.chain()) == 2
    assert list(storage.hidden) == ["hidden of s0"]


def test_a_snapshot_is_one_instant_of_a_busy_disk(storage: Storage) -> None:
    disk = storage.create("live", size=4 * MiB, sector=512)
    stop = threading.Event()

    def guest() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            for place in (0, MiB, 3 * MiB):
                disk.write(place, number.to_bytes(8, "big"))

    writer = threading.Thread(target=guest)
    writer.start()
    images = []
    for number in range(20):
        taken = snapshot(storage, "live", f"s{number}")
        images.append([int.from_bytes(taken.pread(p, 8), "big") for p in (0, MiB, 3 * MiB)])
    stop.set()
    writer.join()

    for number, values in enumerate(images):
        taken = storage.disks[f"s{number}"]
        assert [int.from_bytes(taken.pread(p, 8), "big") for p in (0, MiB, 3 * MiB)] == values
        first, second, third = values
        assert first >= second >= third >= first - 1


def test_readers_of_snapshots_do_not_mind_writers_and_merges(storage: Storage) -> None:
    disk = storage.create("live", size=8 * MiB, sector=512)
    image = os.urandom(8 * MiB)
    disk.write(0, image)
    kept = snapshot(storage, "live", "kept")
    wrong: list[int] = []
    stop = threading.Event()

    def reader() -> None:
        while not stop.is_set():
            if kept.pread(0, 8 * MiB) != image:
                wrong.append(1)

    threads = [threading.Thread(target=reader) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(30):
        disk.write(number * 100_000, b"!" * 90_000)
        snapshot(storage, "live", f"s{number}")
        storage.destroy(f"s{number}")
    stop.set()
    for thread in threads:
        thread.join()

    assert not wrong


def test_a_destroyed_disk_takes_no_writes(storage: Storage) -> None:
    disk = storage.create("live", size=MiB, sector=512)
    storage.data_destroy("live")

    with pytest.raises(ValueError, match="has no data"):
        disk.write(0, b"x")
    assert disk.pread(0, 4) == bytes(4)


@pytest.mark.parametrize(("offset", "length"), [(MiB, 1), (-1, 2), (MiB - 1, 2)])
def test_nothing_is_read_or_written_outside(storage: Storage, offset: int, length: int) -> None:
    disk = storage.create("live", size=MiB, sector=512)

    with pytest.raises(ValueError, match="not within"):
        disk.pread(offset, length)
    with pytest.raises(ValueError, match="not within"):
        disk.write(offset, bytes(length))


def test_differences_cover_what_differs_from_a_base(storage: Storage) -> None:
    disk = storage.create("live", size=8 * MiB, sector=512)
    disk.write(0, b"x" * MiB)
    base = snapshot(storage, "live", "base")
    disk.write(2 * MiB, b"y")
    newer = snapshot(storage, "live", "newer")

    assert list(newer.differences(base)) == [(2 * MiB, 2 * MiB + BLOCK)]


def test_an_unplayed_state_removes_files_nobody_knows(tmp_path: Path) -> None:
    first = Storage(tmp_path)
    first.create("live", size=MiB, sector=512).write(0, b"kept")
    dump = first.dump()
    (tmp_path / "stray.raw").write_bytes(b"left by a crash")

    second = Storage(tmp_path)
    second.restore(dump)

    assert second.disks["live"].pread(0, 5) == b"kept\0"
    assert not (tmp_path / "stray.raw").exists()
