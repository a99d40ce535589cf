"""A partial point is gone on with: its journal, images and commit, and a power cut at any time."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from cbtfs import errors, store as stores, verified
from cbtfs.catalogue import DiskPoint, Point
from cbtfs.image import Image
from cbtfs.journal import DiskJournal
from cbtfs.stage import Stage, file_names
from cbtfs.store import Intent, Leftover, Store

from . import powercut
from .powercut import Machine

VM = "0f4f1b2e-0000-4000-8000-000000000001"
FIRST = "20261122T020000Z"
SECOND = "20261123T020000Z"
BLOCK = 64 << 10
SIZE = 40 * BLOCK + 512
HALF = 20 * BLOCK


def noise(length: int, *, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


CONTENT = noise(30 * BLOCK) + bytes(5 * BLOCK) + noise(SIZE - 35 * BLOCK, seed=2)
CHANGED = CONTENT[: 3 * BLOCK] + noise(30 * BLOCK, seed=3) + CONTENT[33 * BLOCK :]


def entry(device: str = "xvda", *, offset: int = HALF, size: int = SIZE) -> DiskJournal:
    return DiskJournal(
        device=device,
        vdi_uuid=f"v {device}",
        snapshot_uuid=f"s {device}",
        size=size,
        method="full",
        offset=offset,
    )


def record(root: str, device: str = "xvda", *, size: int = SIZE) -> DiskPoint:
    file, digests = file_names(device)
    return DiskPoint(
        device=device,
        file=file,
        digests=digests,
        digest_root=root,
        size=size,
        vdi_uuid=f"v {device}",
        snapshot_uuid=f"s {device}",
    )


def point(*disks: DiskPoint, time: str = FIRST) -> Point:
    return Point(time=time, vm_uuid=VM, vm_name="web1", disks=disks)


def intent(time: str = FIRST) -> Intent:
    return Intent(time=time, run="0123", snapshot_name=f"cbtfs {time} 0123", vm_uuid=VM)


def begin(stage: Stage, *, content: bytes = CONTENT) -> Image:
    """Copy the first half of ``xvda``, and put that on record."""
    stage.record(intent(stage.time))
    image = stage.new_image("xvda.raw", size=len(content))
    image.write(0, content[:HALF])
    image.flush()
    stage.journal(entry(size=len(content)))
    return image


def interrupt(store: Store, time: str = FIRST) -> Leftover:
    """Leave a partial point with a half-made image."""
    with store.lock(VM), store.stage(VM, time=time) as stage:
        begin(stage)
    (leftover,) = store.leftovers(VM)
    return leftover


def commit(store: Store, *, time: str = FIRST, content: bytes = CONTENT) -> DiskPoint:
    with store.lock(VM), store.stage(VM, time=time) as stage:
        image = stage.new_image("xvda.raw", size=len(content))
        image.write(0, content)
        disk = record(image.finish(), size=len(content))
        assert stage.commit(point(disk, time=time)) == ()
    return disk


def check(store: Store, time: str, content: bytes, device: str = "xvda") -> None:
    found = store.catalogue().resolve(f"{VM}/{time}")
    assert store.problems == ()
    assert not store.verify(found).damaged
    path = store.point_path(VM, time) / file_names(device)[0]
    assert path.read_bytes() == content


@pytest.fixture
def root(any_dir: Path) -> Path:
    return any_dir / "store"


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with stores.open_store(root) as opened:
        yield opened


# ── The journal ──────────────────────────────────────────────────────────────────────────────


def test_a_new_point_has_no_journal(store: Store) -> None:
    with store.lock(VM), store.stage(VM, time=FIRST) as stage:
        assert stage.journaled == {}

    assert store.leftovers(VM)[0].journal == {}


def test_the_journal_is_left_for_the_next_run(store: Store, root: Path) -> None:
    with store.lock(VM), store.stage(VM, time=FIRST) as stage:
        stage.journal(entry())
        stage.journal(entry("xvdb"))
        stage.journal(entry(offset=HALF + BLOCK))
        expected = {"xvda": entry(offset=HALF + BLOCK), "xvdb": entry("xvdb")}
        assert stage.journaled == expected

    assert store.leftovers(VM)[0].journal == expected
    document = json.loads((root / VM / f".partial-{FIRST}" / "journal.json").read_bytes())
    assert document["disks"]["xvda"]["offset"] == HALF + BLOCK


def test_several_disks_write_one_journal(store: Store) -> None:
    devices = [f"xvd{letter}" for letter in "abcdefgh"]
    with store.lock(VM), store.stage(VM, time=FIRST) as stage, ThreadPoolExecutor(8) as threads:

        def work(device: str) -> None:
            for block in range(6):
                stage.journal(entry(device, offset=block * BLOCK))

        list(threads.map(work, devices))

    expected = {device: entry(device, offset=5 * BLOCK) for device in devices}
    assert store.leftovers(VM)[0].journal == expected


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOSPC, errors.StoreFull, "remove restore points"),
        (errno.EIO, errors.StoreError, "see dmesg"),
        (errno.EROFS, errors.StoreError, "remount"),
    ],
)
def test_a_journal_that_cannot_be_written_stays_as_it_was(
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kind: type[errors.StoreError],
    words: str,
) -> None:
    def fail(fd: int, data: bytes) -> int:
        raise OSError(number, "no")

    with store.lock(VM), store.stage(VM, time=FIRST) as stage:
        stage.journal(entry())
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", fail)
            with pytest.raises(kind, match=rf"cannot write .*journal\.json: .*{words}"):
                stage.journal(entry(offset=HALF + BLOCK))
        assert stage.journaled == {"xvda": entry()}

    assert store.leftovers(VM)[0].journal == {"xvda": entry()}


@pytest.mark.parametrize("kind", ["text", "link", "pipe", "folder", "huge"])
def test_a_journal_that_is_none_is_no_journal(
    store: Store, root: Path, tmp_path: Path, kind: str
) -> None:
    interrupt(store)
    path = root / VM / f".partial-{FIRST}" / "journal.json"
    good = path.read_bytes()
    path.unlink()
    if kind == "text":
        path.write_bytes(good.replace(b'"xvda"', b'"../xvda"', 1))
    elif kind == "link":
        (tmp_path / "good").write_bytes(good)
        path.symlink_to(tmp_path / "good")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(good)
        os.truncate(path, 1 << 40)

    (leftover,) = store.leftovers(VM)
    assert leftover.journal == {}
    assert leftover.intent == intent()
    with store.lock(VM), store.resume(leftover) as stage:
        assert stage.journaled == {}


def test_metadata_cannot_be_called_journal(store: Store) -> None:
    with store.lock(VM), store.stage(VM, time=FIRST) as stage:
        with pytest.raises(errors.StoreError, match="cannot be the name of metadata"):
            stage.write_metadata("journal.json", b"")


# ── Going on ─────────────────────────────────────────────────────────────────────────────────


def test_an_interrupted_point_is_completed(store: Store, root: Path) -> None:
    leftover = interrupt(store)

    with store.lock(VM), store.resume(leftover) as stage:
        assert store.leftovers(VM) == []
        assert stage.journaled == {"xvda": entry()}
        image = stage.reopened_image("xvda.raw", size=SIZE)
        image.write(HALF, CONTENT[HALF:])
        disk = record(image.finish())
        stage.write_metadata("vm.xml", b"<vm/>")
        assert stage.commit(point(disk)) == ()

    check(store, FIRST, CONTENT)
    names = {path.name for path in (root / VM / FIRST).iterdir()}
    assert names == {"point.json", "vm.xml", "xvda.raw", "xvda.b3", verified.RECORD}
    assert store.leftovers(VM) == []


def test_a_point_can_be_interrupted_again(store: Store) -> None:
    leftover = interrupt(store)
    with store.lock(VM), store.resume(leftover) as stage:
        image = stage.reopened_image("xvda.raw", size=SIZE)
        image.write(HALF, CONTENT[HALF : HALF + BLOCK])
        image.flush()
        stage.journal(entry(offset=HALF + BLOCK))

    (leftover,) = store.leftovers(VM)
    assert leftover.journal == {"xvda": entry(offset=HALF + BLOCK)}
    with store.lock(VM), store.resume(leftover) as stage:
        image = stage.reopened_image("xvda.raw", size=SIZE)
        image.write(HALF + BLOCK, CONTENT[HALF + BLOCK :])
        stage.commit(point(record(image.finish())))
    check(store, FIRST, CONTENT)


def test_a_comparison_is_gone_on_with(store: Store) -> None:
    base = commit(store)
    with store.lock(VM), store.stage(VM, time=SECOND) as stage:
        stage.record(intent(SECOND))
        image = stage.cloned_image("xvda.raw", base_time=FIRST, base=base, size=SIZE)
        image.merge(0, CHANGED[:HALF])
        image.flush()
        stage.journal(entry())
        image.merge(HALF, CHANGED[HALF : HALF + 2 * BLOCK])

    with store.lock(VM), store.resume(store.leftovers(VM)[0]) as stage:
        image = stage.reopened_image("xvda.raw", size=SIZE)
        assert image.merge(HALF, CHANGED[HALF:]) < SIZE - HALF
        stage.commit(point(record(image.finish()), time=SECOND))
    check(store, FIRST, CONTENT)
    check(store, SECOND, CHANGED)


def test_a_finished_disk_is_taken_as_it_is(store: Store) -> None:
    with store.lock(VM), store.stage(VM, time=FIRST) as stage:
        image = stage.new_image("xvda.raw", size=SIZE)
        image.write(0, CONTENT)
        disk = record(image.finish())
        stage.journal(msgspec.structs.replace(entry(offset=SIZE), finished=disk))

    (leftover,) = store.leftovers(VM)
    finished = leftover.journal["xvda"].finished
    assert finished == disk
    with store.lock(VM), store.resume(leftover) as stage:
        with pytest.raises(errors.StoreError, match="not finished"):
            stage.commit(point(finished))
        assert stage.reopened_image("xvda.raw", size=SIZE).recheck() == disk.digest_root
        stage.commit(point(finished))
    check(store, FIRST, CONTENT)


def test_a_finished_disk_that_changed_is_not_committed(store: Store, root: Path) -> None:
    with store.lock(VM), store.stage(VM, time=FIRST) as stage:
        image = stage.new_image("xvda.raw", size=SIZE)
        image.write(0, CONTENT)
        disk = record(image.finish())
        stage.journal(msgspec.structs.replace(entry(offset=SIZE), finished=disk))
    with (root / VM / f".partial-{FIRST}" / "xvda.b3").open("r+b") as file:
        file.write(b"x")

    with store.lock(VM), store.resume(store.leftovers(VM)[0]) as stage:
        stage.reopened_image("xvda.raw", size=SIZE).recheck()
        with pytest.raises(errors.StoreError, match="not finished"):
            stage.commit(point(disk))


def test_what_belongs_to_no_disk_is_not_committed(store: Store, root: Path) -> None:
    leftover = interrupt(store)
    partial = root / VM / f".partial-{FIRST}"
    (partial / "vm.xml").write_bytes(b"of the earlier run")
    (partial / "xvdz.raw").touch()
    (partial / "deep").mkdir()
    (partial / "deep" / "way out").symlink_to(root)

    with store.lock(VM), store.resume(leftover) as stage:
        image = stage.reopened_image("xvda.raw", size=SIZE)
        image.write(HALF, CONTENT[HALF:])
        stage.commit(point(record(image.finish())))
    names = {path.name for path in (root / VM / FIRST).iterdir()}
    assert names == {"point.json", "xvda.raw", "xvda.b3"}


@pytest.mark.parametrize("kind", ["gone", "file", "link"])
def test_what_is_not_a_partial_point_is_not_gone_on_with(
    store: Store, root: Path, tmp_path: Path, kind: str
) -> None:
    leftover = interrupt(store)
    partial = root / VM / f".partial-{FIRST}"
    outside = tmp_path / "outside"
    shutil.copytree(partial, outside)
    shutil.rmtree(partial)
    if kind == "file":
        partial.touch()
    elif kind == "link":
        partial.symlink_to(outside)

    before = open_files()
    with pytest.raises(errors.StoreError, match="cannot open"):
        store.resume(leftover)
    assert open_files() == before


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_partial_point_of_a_committed_time_is_not_gone_on_with(store: Store, root: Path) -> None:
    leftover = interrupt(store)
    (root / VM / FIRST).mkdir()

    with pytest.raises(errors.StoreError, match="exists already"):
        store.resume(leftover)


def test_an_image_that_is_not_there_is_not_gone_on_with(store: Store) -> None:
    leftover = interrupt(store)

    with store.lock(VM), store.resume(leftover) as stage:
        for file, size in (("xvdb.raw", SIZE), ("xvda.raw", SIZE + 1)):
            with pytest.raises(errors.ImageDamaged, match="cannot be gone on with"):
                stage.reopened_image(file, size=size)
        with pytest.raises(errors.StoreError, match="cannot be the name of an image"):
            stage.reopened_image("../xvda.raw", size=SIZE)


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_a_disk_can_be_begun_anew(store: Store, root: Path, kind: str) -> None:
    leftover = interrupt(store)
    raw = root / VM / f".partial-{FIRST}" / "xvda.raw"
    if kind != "file":
        raw.unlink()
    if kind == "link":
        raw.symlink_to(root / "cbtfs.json")
    elif kind == "folder":
        raw.mkdir()

    with store.lock(VM), store.resume(leftover) as stage:
        image = stage.new_image("xvda.raw", size=SIZE)
        image.write(0, CHANGED)
        stage.commit(point(record(image.finish())))
    check(store, FIRST, CHANGED)


def test_an_image_can_be_replaced_by_a_clone(store: Store) -> None:
    base = commit(store)
    with store.lock(VM), store.stage(VM, time=SECOND) as stage:
        first = begin(stage)
        image = stage.cloned_image("xvda.raw", base_time=FIRST, base=base, size=SIZE)
        assert image is not first
        stage.commit(point(record(image.finish()), time=SECOND))

    check(store, SECOND, CONTENT)


def test_a_damaged_base_costs_no_image(store: Store) -> None:
    base = commit(store)
    (store.point_path(VM, FIRST) / "xvda.b3").unlink()
    with store.lock(VM), store.stage(VM, time=SECOND) as stage:
        begin(stage)
        with pytest.raises(errors.ImageDamaged, match=r"xvda\.b3 is missing"):
            stage.cloned_image("xvda.raw", base_time=FIRST, base=base, size=SIZE)
        assert stage.journaled == {"xvda": entry()}


def test_an_entry_does_not_outlive_its_image(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run killed now would be gone on with in an empty image."""

    def fail(name: str, *, dir_fd: int) -> None:
        raise OSError(errno.EIO, "no")

    leftover = interrupt(store)
    with store.lock(VM), store.resume(leftover) as stage:
        stage.journal(entry("xvdb"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", fail)
            with pytest.raises(errors.StoreError, match="cannot remove"):
                stage.discard_image("xvda.raw")
        assert (root / VM / f".partial-{FIRST}" / "xvda.raw").exists()

    assert store.leftovers(VM)[0].journal == {"xvdb": entry("xvdb")}


def test_an_image_is_discarded(store: Store, root: Path) -> None:
    leftover = interrupt(store)

    with store.lock(VM), store.resume(leftover) as stage:
        image = stage.reopened_image("xvda.raw", size=SIZE)
        stage.discard_image("xvda.raw")
        stage.discard_image("xvda.raw")
        with pytest.raises(errors.StoreError):
            image.write(0, CONTENT)
        with pytest.raises(errors.StoreError, match="not finished"):
            stage.commit(point(record("")))

    names = {path.name for path in (root / VM / f".partial-{FIRST}").iterdir()}
    assert names == {"intent.json", "journal.json"}


def test_a_run_killed_after_its_rename_leaves_a_point(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its intent and journal stay until the next commit, and nobody reads them."""

    class Killed(BaseException):
        pass

    def die(*arguments: object) -> None:
        raise Killed

    with store.lock(VM), store.stage(VM, time=FIRST) as stage:
        image = begin(stage)
        image.write(HALF, CONTENT[HALF:])
        disk = record(image.finish())
        with monkeypatch.context() as patch:
            patch.setattr(Stage, "_tidy", die)
            with pytest.raises(Killed):
                stage.commit(point(disk))

    left = {"intent.json", "journal.json"}
    assert left < {path.name for path in (root / VM / FIRST).iterdir()}
    assert store.leftovers(VM) == []
    check(store, FIRST, CONTENT)
    commit(store, time=SECOND, content=CHANGED)
    assert not left & {path.name for path in (root / VM / FIRST).iterdir()}
    check(store, FIRST, CONTENT)


def test_what_cannot_be_tidied_up_is_a_warning(store: Store, root: Path) -> None:
    commit(store)
    (root / VM / FIRST / "journal.json").mkdir()

    with store.lock(VM), store.stage(VM, time=SECOND) as stage:
        disk = record(stage.new_image("xvda.raw", size=SIZE).finish())
        (warning,) = stage.commit(point(disk, time=SECOND))
    assert "journal.json" in warning
    assert (root / VM / "latest").readlink() == Path(SECOND)


def test_a_failed_try_for_a_lock_leaves_nothing(store: Store, root: Path) -> None:
    with store.lock(VM):
        before = open_files(), (root / VM / ".lock").read_bytes()
        for _ in range(100):
            with pytest.raises(errors.StoreLocked, match=f"process {os.getpid()}"):
                store.lock(VM).__enter__()
        assert (open_files(), (root / VM / ".lock").read_bytes()) == before
        assert [path.name for path in (root / VM).iterdir()] == [".lock"]


def test_the_lock_of_a_killed_process_is_free(store: Store, root: Path) -> None:
    script = (
        "import sys, pathlib; from cbtfs import store\n"
        "with store.open_store(pathlib.Path(sys.argv[1])) as opened, opened.lock(sys.argv[2]):\n"
        "    print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(root), VM]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(errors.StoreLocked, match=f"process {holder.pid} on"):
            store.lock(VM).__enter__()
        holder.kill()
        holder.wait()

        with store.lock(VM):
            assert str(os.getpid()) in (root / VM / ".lock").read_text()


def test_a_full_store_can_be_locked(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """To tidy it up."""

    def fail(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, "no")

    monkeypatch.setattr(os, "pwrite", fail)
    with store.lock(VM):
        with pytest.raises(errors.StoreLocked, match="by another run"):
            with store.lock(VM):
                raise AssertionError


# ── A power cut ──────────────────────────────────────────────────────────────────────────────

patient = pytest.mark.timeout(180)
"""Making and mounting file systems takes long while others do the same."""


@pytest.fixture(params=powercut.KINDS)
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machine]:
    with powercut.machine(tmp_path, str(request.param)) as made:
        yield made


@patient
def test_what_is_in_the_journal_survives_a_power_cut(machine: Machine) -> None:
    root = machine.path / "store"
    with stores.open_store(root) as store, store.lock(VM), store.stage(VM, time=FIRST) as stage:
        image = begin(stage)
        image.write(HALF, CONTENT[HALF:])
    machine.cut_power()

    with stores.open_store(root) as store, store.lock(VM):
        (leftover,) = store.leftovers(VM)
        assert leftover.intent == intent()
        with store.resume(leftover) as stage:
            offset = stage.journaled["xvda"].offset
            assert offset == HALF
            image = stage.reopened_image("xvda.raw", size=SIZE)
            image.write(offset, CONTENT[offset:])
            assert stage.commit(point(record(image.finish()))) == ()
    machine.cut_power()

    with stores.open_store(root) as store:
        check(store, FIRST, CONTENT)
        assert (root / VM / "latest").readlink() == Path(FIRST)


@patient
@pytest.mark.parametrize("array_first", [False, True])
def test_a_comparison_survives_a_power_cut(machine: Machine, *, array_first: bool) -> None:
    root = machine.path / "store"
    with stores.open_store(root) as store:
        base = commit(store)
        with store.lock(VM), store.stage(VM, time=SECOND) as stage:
            stage.record(intent(SECOND))
            image = stage.cloned_image("xvda.raw", base_time=FIRST, base=base, size=SIZE)
            image.merge(0, CHANGED[:HALF])
            image.flush()
            stage.journal(entry())
            image.merge(HALF, CHANGED[HALF:])
            if array_first:  # the kernel writes back in whatever order it likes
                os.fsync(image._digest_fd)
    machine.cut_power()

    with stores.open_store(root) as store:
        with store.lock(VM), store.resume(store.leftovers(VM)[0]) as stage:
            image = stage.reopened_image("xvda.raw", size=SIZE)
            image.merge(HALF, CHANGED[HALF:])
            stage.commit(point(record(image.finish()), time=SECOND))
        check(store, FIRST, CONTENT)
        check(store, SECOND, CHANGED)


@patient
def test_a_finished_disk_survives_a_power_cut(machine: Machine) -> None:
    root = machine.path / "store"
    with stores.open_store(root) as store, store.lock(VM), store.stage(VM, time=FIRST) as stage:
        stage.record(intent())
        image = stage.new_image("xvda.raw", size=SIZE)
        image.write(0, CONTENT)
        disk = record(image.finish())
        stage.journal(msgspec.structs.replace(entry(offset=SIZE), finished=disk))
    machine.cut_power()

    with stores.open_store(root) as store:
        (leftover,) = store.leftovers(VM)
        finished = leftover.journal["xvda"].finished
        assert finished == disk
        with store.lock(VM), store.resume(leftover) as stage:
            stage.reopened_image("xvda.raw", size=SIZE).recheck()
            stage.commit(point(finished))
        check(store, FIRST, CONTENT)


# ── A file system that is full, read-only, or fails ──────────────────────────────────────────


@patient
def test_a_full_store_is_told_and_can_be_tidied_up(machine: Machine) -> None:
    root = machine.path / "store"
    with stores.open_store(root) as store, store.lock(VM):
        with store.stage(VM, time=FIRST) as stage:
            image = begin(stage)
            machine.fill()
            with pytest.raises(errors.StoreFull, match=r"xvda\.raw: no space left.*remove"):
                fill_up(image)
            with pytest.raises(errors.StoreFull, match=r"xvda\.raw: no space left.*remove"):
                image.finish()
            with pytest.raises(errors.StoreFull, match=r"journal\.json.*: no space left.*remove"):
                write_journals(stage)

        (leftover,) = store.leftovers(VM)
        assert leftover.journal["xvda"] == entry()
        store.abandon(leftover)
        assert store.leftovers(VM) == []


def fill_up(image: Image) -> None:
    image.merge(HALF, CONTENT[HALF:])
    image.flush()


def write_journals(stage: Stage) -> None:
    """The first ones find room that is left within blocks and folders."""
    for number in range(1000):
        stage.journal(entry(f"xvd{number}"))


@patient
def test_a_read_only_store_is_read_and_nothing_else(machine: Machine) -> None:
    root = machine.path / "store"
    with stores.open_store(root) as store:
        commit(store)
        leftover = interrupt(store, SECOND)
    machine.make_read_only()

    with stores.open_store(root) as store, store.resume(leftover) as stage:
        check(store, FIRST, CONTENT)
        assert stage.journaled == {"xvda": entry()}
        all_refused(
            store.lock(VM).__enter__,
            lambda: store.stage(VM, time="20261124T020000Z"),
            lambda: stage.reopened_image("xvda.raw", size=SIZE),
            lambda: stage.new_image("xvda.raw", size=SIZE),
            lambda: stage.journal(entry()),
            words="file system is read-only; see dmesg",
        )


def all_refused(*works: Callable[[], object], words: str) -> None:
    for work in works:
        with pytest.raises(errors.StoreError, match=words):
            work()


@patient
def test_a_store_that_fails_is_told(machine: Machine) -> None:
    """Nothing but our own errors, each with its remedy, and no listed point that is not whole."""
    root = machine.path / "store"
    with stores.open_store(root) as store:
        base = commit(store)
        with store.lock(VM), store.stage(VM, time=SECOND) as stage:
            image = begin(stage)
            disk = record(stage.new_image("xvdb.raw", size=SIZE).finish(), "xvdb")
            machine.fail()
            all_refused(
                lambda: image.write(HALF, CONTENT[HALF:]),
                image.flush,
                image.finish,
                lambda: stage.journal(entry(offset=HALF + BLOCK)),
                lambda: stage.record(intent(SECOND)),
                lambda: stage.reopened_image("xvda.raw", size=SIZE),
                lambda: stage.cloned_image("xvdc.raw", base_time=FIRST, base=base, size=SIZE),
                lambda: stage.commit(point(disk, time=SECOND)),
                lambda: store.stage(VM, time="20261124T020000Z"),
                words="see dmesg|cannot be read",
            )
    machine.cut_power()

    with stores.open_store(root) as store:
        check(store, FIRST, CONTENT)
        assert [p.time for p in store.catalogue().vms[VM].points] == [FIRST]
        assert store.leftovers(VM)[0].journal == {"xvda": entry()}
