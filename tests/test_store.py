"""Store: points appear whole or not at all, and nothing leads out of it."""

import ctypes
import errno
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import blake3
import msgspec
import pytest

from cbtfs import catalogue, damage, digests, errors, folder as folders, store as stores
from cbtfs.catalogue import DiskPoint, Point, Reference
from cbtfs.damage import Damage
from cbtfs.extents import Extent
from cbtfs.folder import Folder
from cbtfs.store import Intent, Leftover, Store

VM = "0f4f1b2e-0000-4000-8000-000000000001"
OTHER = "0f4f1b2e-0000-4000-8000-000000000002"
FIRST = "20261122T020000Z"
SECOND = "20261123T020000Z"
BLOCK = 64 << 10
SIZE = 40 * BLOCK + 512


def noise(length: int, *, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


CONTENT = noise(8 * BLOCK) + bytes(16 * BLOCK) + noise(SIZE - 24 * BLOCK)


def commit(
    store: Store,
    *,
    vm: str = VM,
    name: str = "web1",
    time: str = FIRST,
    content: bytes = CONTENT,
    base: DiskPoint | None = None,
) -> tuple[str, ...]:
    """Make a point with one disk; its base, if any, is of ``FIRST``."""
    with store.lock(vm), store.stage(vm, time=time) as stage:
        stage.record(intent(time, vm=vm))
        if base is None:
            image = stage.new_image("xvda.raw", size=len(content))
        else:
            image = stage.cloned_image("xvda.raw", base_time=FIRST, base=base, size=len(content))
        image.write(0, content)
        disk = disk_point(len(content), image.finish())
        stage.write_metadata("vm.xml", b"<vm/>")
        return stage.commit(Point(time=time, vm_uuid=vm, vm_name=name, disks=(disk,)))


def disk_point(size: int, root: str) -> DiskPoint:
    return DiskPoint(
        device="xvda",
        file="xvda.raw",
        digests="xvda.b3",
        digest_root=root,
        size=size,
        vdi_uuid="v",
    )


def intent(time: str, *, vm: str = VM) -> Intent:
    return Intent(time=time, run="0123", snapshot_name=f"cbtfs {time} 0123", vm_uuid=vm)


def only(store: Store, text: str = "web1/latest") -> Reference:
    return store.catalogue().resolve(text)


@pytest.fixture
def root(any_dir: Path) -> Path:
    return any_dir / "store"


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with stores.open_store(root) as opened:
        yield opened


# ── Opening ──────────────────────────────────────────────────────────────────────────────────


def test_a_new_store_says_what_it_is(root: Path) -> None:
    with stores.open_store(root) as store:
        marker = json.loads((root / "cbtfs.json").read_bytes())

    assert marker.keys() == {"format", "uuid", "created", "tool"}
    assert (marker["format"], marker["uuid"]) == (1, store.uuid)
    assert root.stat().st_mode & 0o777 == 0o700


def test_a_store_keeps_its_identity(root: Path) -> None:
    with stores.open_store(root) as first, stores.open_store(root, create=False) as second:
        assert first.uuid == second.uuid


def test_stores_made_at_once_are_one(root: Path) -> None:
    def open_it(_: int) -> str:
        with stores.open_store(root) as store:
            return store.uuid

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(open_it, range(8)))) == 1


def test_a_directory_with_other_things_becomes_no_store(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()

    with pytest.raises(errors.StoreError, match="not empty"):
        with stores.open_store(tmp_path):
            pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "thesis.tex"]


def test_a_fresh_ext4_becomes_a_store(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()

    with stores.open_store(tmp_path) as store:
        assert store.catalogue().vms == {}


@pytest.mark.parametrize(
    ("marker", "words"),
    [
        (None, "is no store"),
        (b"{", "cannot be read"),
        (b'{"format": 1}', "cannot be read"),
        (b'{"format": 2, "uuid": "", "created": "", "tool": ""}', "newer"),
        (b"[" * 100_000, "cannot be read"),
    ],
)
def test_what_is_no_store_is_not_opened(tmp_path: Path, marker: bytes | None, words: str) -> None:
    if marker is not None:
        (tmp_path / "cbtfs.json").write_bytes(marker)

    with pytest.raises(errors.StoreError, match=words):
        with stores.open_store(tmp_path, create=False):
            pass


def test_a_missing_parent_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(errors.StoreError, match=r"cannot create the store .*does not exist"):
        with stores.open_store(tmp_path / "not-mounted" / "store"):
            pass


# ── Commit ───────────────────────────────────────────────────────────────────────────────────


def test_a_point_has_the_documented_files(store: Store, root: Path) -> None:
    assert commit(store) == ()

    point = root / VM / FIRST
    assert sorted(p.name for p in point.iterdir()) == [
        "point.json",
        "vm.xml",
        "xvda.b3",
        "xvda.raw",
    ]
    assert (point / "xvda.raw").read_bytes() == CONTENT
    assert (point / "point.json").read_bytes() == catalogue.encode(only(store).point)
    assert (root / VM / "latest").readlink() == Path(FIRST)
    assert (root / "by-name" / "web1").readlink() == Path("..") / VM
    assert {p.name for p in root.iterdir()} == {"cbtfs.json", ".lock", "by-name", VM}
    assert {p.name for p in (root / VM).iterdir()} == {FIRST, "latest", ".lock"}


def test_only_the_owner_can_read_a_point(store: Store, root: Path) -> None:
    commit(store)

    for path in (root / VM).rglob("*"):
        assert path.is_symlink() or path.stat().st_mode & 0o077 == 0


def test_a_second_point_builds_on_the_first(store: Store, root: Path) -> None:
    commit(store)
    grown = noise(BLOCK, seed=2) + CONTENT[BLOCK:] + bytes(BLOCK)
    commit(store, time=SECOND, content=grown, base=only(store).point.disks[0])

    assert [p.time for p in only(store).history.points] == [FIRST, SECOND]
    assert (root / VM / FIRST / "xvda.raw").read_bytes() == CONTENT
    assert (root / VM / SECOND / "xvda.raw").read_bytes() == grown
    assert (root / VM / "latest").readlink() == Path(SECOND)


def test_the_history_of_one_vm_is_that_of_the_catalogue(store: Store) -> None:
    assert store.history(VM) is None

    commit(store)

    assert store.history(VM) == store.catalogue().vms[VM]


def test_latest_is_the_newest_whatever_the_order(store: Store, root: Path) -> None:
    commit(store, time=SECOND)
    commit(store, time=FIRST)

    assert (root / VM / "latest").readlink() == Path(SECOND)


def test_nothing_is_listed_before_the_commit(store: Store, root: Path) -> None:
    with store.lock(VM), store.stage(VM, time=FIRST) as stage:
        stage.new_image("xvda.raw", size=SIZE).finish()
        stage.write_metadata("vm.xml", b"")

        assert store.catalogue().vms == {}
        assert store.problems == ()


def test_an_existing_point_is_never_touched(store: Store, root: Path) -> None:
    commit(store)

    with store.lock(VM), pytest.raises(errors.StoreError, match="exists already"):
        store.stage(VM, time=FIRST)
    assert (root / VM / FIRST / "xvda.raw").read_bytes() == CONTENT


@pytest.mark.parametrize("renameat2", [True, False])
def test_a_point_that_appears_meanwhile_is_never_touched(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch, renameat2: bool
) -> None:
    if not renameat2:
        monkeypatch.setattr(folders, "renameat2", lambda *arguments: False)
    with store.lock(VM), store.stage(VM, time=FIRST) as stage:
        disk = disk_point(BLOCK, stage.new_image("xvda.raw", size=BLOCK).finish())
        (root / VM / FIRST).mkdir()
        with pytest.raises(errors.StoreError, match="exists already"):
            stage.commit(Point(time=FIRST, vm_uuid=VM, disks=(disk,)))

        assert list((root / VM / FIRST).iterdir()) == []
        (root / VM / FIRST).rmdir()
        assert stage.commit(Point(time=FIRST, vm_uuid=VM, disks=(disk,))) == ()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, 0])
def test_old_kernels_rename_too(store: Store, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    class Old:
        if number:

            @staticmethod
            def renameat2(*arguments: object) -> int:
                ctypes.set_errno(number)
                return -1

    monkeypatch.setattr(folders, "_libc", Old)
    assert commit(store) == ()
    assert only(store).point.time == FIRST


def test_a_failed_disk_leaves_no_file_in_a_partial_point(store: Store, root: Path) -> None:
    with store.lock(VM), store.stage(VM, time=FIRST) as stage:
        good = stage.new_image("xvda.raw", size=BLOCK)
        stage.new_image("xvdb.raw", size=BLOCK)
        disk = disk_point(BLOCK, good.finish())
        stage.commit(Point(time=FIRST, vm_uuid=VM, disks=(disk,), state="partial"))

    assert {p.name for p in (root / VM / FIRST).iterdir()} == {"point.json", "xvda.raw", "xvda.b3"}


def test_only_what_is_finished_is_committed(store: Store) -> None:
    with store.lock(VM), store.stage(VM, time=FIRST) as stage:
        image = stage.new_image("xvda.raw", size=BLOCK)
        root = image.finish()
        disk = disk_point(BLOCK, root)
        image.write(0, noise(BLOCK))
        wrong = [
            Point(time=FIRST, vm_uuid=VM, disks=(disk,)),
            Point(time=SECOND, vm_uuid=VM, disks=(disk,)),
            Point(time=FIRST, vm_uuid=OTHER, disks=(disk,)),
            Point(time=FIRST, vm_uuid=VM),
            Point(time=FIRST, vm_uuid=VM, disks=(msgspec.structs.replace(disk, file="b.raw"),)),
        ]
        for point in wrong:
            with pytest.raises(errors.StoreError, match="cannot commit"):
                stage.commit(point)
        disk = disk_point(2 * BLOCK, image.finish())
        with pytest.raises(errors.StoreError, match="not as told"):
            stage.commit(Point(time=FIRST, vm_uuid=VM, disks=(disk,)))
    assert store.catalogue().vms == {}


@pytest.mark.parametrize("vm", ["../../etc", "", ".", "vdi-", VM.upper(), f"{VM}\n", f"x{VM}"])
def test_only_uuids_name_a_vm(store: Store, root: Path, vm: str) -> None:
    with pytest.raises(errors.StoreError, match="is no uuid"):
        with store.lock(vm):
            pass
    with pytest.raises(errors.StoreError, match="is no uuid"):
        store.stage(vm, time=FIRST)


def test_only_times_name_a_point(store: Store) -> None:
    with store.lock(VM):
        for time in ("latest", "../x", "", "20261322T020000Z"):
            with pytest.raises(errors.StoreError, match="cannot be the name"):
                store.stage(VM, time=time)


@pytest.mark.parametrize("name", ["../x", ".x", "a/b", "point.json", "xvda.raw", "xvda.b3", ""])
def test_metadata_stays_in_its_place(store: Store, name: str) -> None:
    with store.lock(VM), store.stage(VM, time=FIRST) as stage:
        with pytest.raises(errors.StoreError, match="cannot be the name of metadata"):
            stage.write_metadata(name, b"")


@pytest.mark.parametrize("file", ["../x.raw", ".raw", "xvda", "a/b.raw", "xvda.b3", ""])
def test_images_stay_in_their_place(store: Store, file: str) -> None:
    with store.lock(VM), store.stage(VM, time=FIRST) as stage:
        with pytest.raises(errors.StoreError, match="cannot be the name of an image"):
            stage.new_image(file, size=BLOCK)


def test_every_device_has_its_file_names() -> None:
    devices = ["xvda", "xvd/a", "xvd_a", "../../etc", "", ".", "-rf", "XVDA", "a" * 300, "\udcff"]
    names = [stores.file_names(device) for device in devices]

    assert names[0] == ("xvda.raw", "xvda.b3")
    assert len(set(names)) == len(devices)
    for raw, array in names:
        assert "/" not in raw
        assert raw[0] not in ".-"
        assert len(array) < 100


# ── Names ────────────────────────────────────────────────────────────────────────────────────


def test_a_renamed_vm_moves_its_link(store: Store, root: Path) -> None:
    commit(store, name="web1")
    commit(store, name="web2", time=SECOND)

    assert [p.name for p in (root / "by-name").iterdir()] == ["web2"]


def test_twins_get_a_link_each(store: Store, root: Path) -> None:
    commit(store)
    commit(store, vm=OTHER)
    commit(store, vm=OTHER, time=SECOND)

    targets = {p.name: p.readlink() for p in (root / "by-name").iterdir()}
    assert set(targets.values()) == {Path("..") / VM, Path("..") / OTHER}
    assert all(name.startswith("web1~") for name in targets)


@pytest.mark.parametrize("name", ["../../etc/passwd", "", ".", "..", "a\nb\x1b[2J", "x" * 300])
def test_hostile_names_stay_in_by_name(store: Store, root: Path, name: str) -> None:
    assert commit(store, name=name) == ()

    (link,) = (root / "by-name").iterdir()
    assert link.resolve() == (root / VM).resolve()
    assert link.name.isprintable()


def test_what_is_not_our_link_is_left_alone(store: Store, root: Path) -> None:
    names = root / "by-name"
    names.mkdir()
    (names / "web1").mkdir()
    (names / "mine").symlink_to("/etc")
    (names / "gone").symlink_to(f"../{OTHER}")

    (warning,) = commit(store)
    assert "in the way" in warning
    assert {p.name for p in names.iterdir()} == {"web1", "mine"}


def test_a_by_name_that_leads_elsewhere_is_not_followed(
    store: Store, root: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (root / "by-name").symlink_to(outside)

    (warning,) = commit(store)
    assert "by-name" in warning
    assert list(outside.iterdir()) == []
    assert only(store).point.time == FIRST


def test_a_latest_that_is_a_directory_is_a_warning(store: Store, root: Path) -> None:
    (root / VM / "latest").mkdir(parents=True)

    (warning,) = commit(store)
    assert "latest" in warning
    assert only(store).point.time == FIRST


# ── Locks and leftovers ──────────────────────────────────────────────────────────────────────


def test_a_held_lock_names_its_owner(store: Store, root: Path) -> None:
    with store.lock(VM), stores.open_store(root) as second:
        with pytest.raises(errors.StoreLocked) as caught:
            with second.lock(VM):
                pass
        with second.lock(OTHER):
            pass

    assert f"process {os.getpid()} on {socket.gethostname()} since 20" in str(caught.value)


def test_a_lock_is_free_again(store: Store, root: Path) -> None:
    for _ in range(2):
        with store.lock(VM):
            pass
    assert (root / VM / ".lock").read_bytes() == b""


def test_a_lock_without_a_readable_owner_is_a_lock(store: Store, root: Path) -> None:
    with store.lock(VM):
        (root / VM / ".lock").write_bytes(b"\x00{")
        with pytest.raises(errors.StoreLocked, match="another run"):
            with store.lock(VM):
                pass


def test_a_lock_is_not_taken_outside(store: Store, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "victim"
    outside.write_bytes(b"precious")
    (root / VM).mkdir()
    (root / VM / ".lock").symlink_to(outside)

    with pytest.raises(errors.StoreError, match="symbolic link"):
        with store.lock(VM):
            pass
    assert outside.read_bytes() == b"precious"


def test_a_dead_run_leaves_its_intent(store: Store, root: Path) -> None:
    with store.lock(VM), store.stage(VM, time=FIRST) as stage:
        stage.record(intent(FIRST))
        stage.new_image("xvda.raw", size=BLOCK)
        assert store.leftovers(VM) == []

    (leftover,) = store.leftovers(VM)
    assert leftover == Leftover(VM, FIRST, root / VM / f".partial-{FIRST}", intent(FIRST))
    store.abandon(leftover)
    assert store.leftovers(VM) == []
    assert {p.name for p in (root / VM).iterdir()} == {".lock"}


def test_a_vm_never_seen_has_no_leftovers(store: Store) -> None:
    assert store.leftovers(OTHER) == []


def test_a_leftover_blocks_its_time_only(store: Store) -> None:
    with store.lock(VM):
        store.stage(VM, time=FIRST).close()
        with pytest.raises(errors.StoreError, match="exists already"):
            store.stage(VM, time=FIRST)
        store.stage(VM, time=SECOND).close()
    assert [left.time for left in store.leftovers(VM)] == [FIRST, SECOND]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"time": 1}'])
def test_an_unreadable_intent_is_none(store: Store, root: Path, content: bytes) -> None:
    with store.lock(VM):
        store.stage(VM, time=FIRST).close()
    (root / VM / f".partial-{FIRST}" / "intent.json").write_bytes(content)

    assert store.leftovers(VM)[0].intent is None


@pytest.mark.parametrize("kind", ["link", "file", "tree"])
def test_a_strange_leftover_is_removed_and_nothing_else(
    store: Store, root: Path, tmp_path: Path, kind: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    partial = root / VM / f".partial-{FIRST}"
    partial.parent.mkdir()
    if kind == "link":
        partial.symlink_to(outside)
    elif kind == "file":
        partial.touch()
    else:
        (partial / "deep").mkdir(parents=True)
        (partial / "deep" / "way out").symlink_to(outside)

    for leftover in store.leftovers(VM):
        store.abandon(leftover)
    assert list(partial.parent.iterdir()) == []
    assert (outside / "precious").exists()


@pytest.mark.parametrize("mode", ["before", "half"])
def test_a_kill_at_any_change_loses_and_corrupts_no_point(root: Path, mode: str) -> None:
    """Each run makes some 50 changes on files; it is killed before, or half through, each."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed_commit", root, mode],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40


def test_a_full_disk_at_commit_leaves_a_partial_point(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "no")

    with store.lock(VM), store.stage(VM, time=FIRST) as stage:
        disk = disk_point(BLOCK, stage.new_image("xvda.raw", size=BLOCK).finish())
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(errors.StoreFull, match=r"point\.json: no space left"):
                stage.commit(Point(time=FIRST, vm_uuid=VM, disks=(disk,)))
        assert store.catalogue().vms == {}
        stage.commit(Point(time=FIRST, vm_uuid=VM, disks=(disk,)))
    assert FIRST in [p.time for p in store.catalogue().vms[VM].points]


# ── A store that was tampered with ───────────────────────────────────────────────────────────


def test_junk_is_no_problem(store: Store, root: Path) -> None:
    commit(store)
    for junk in (root / "notes.txt", root / VM / "junk", root / VM / FIRST / "junk"):
        junk.touch()
    (root / "lost+found").mkdir()
    (root / os.fsdecode(b"\xff")).mkdir()
    (root / VM / FIRST.lower()).mkdir()

    assert list(store.catalogue().vms) == [VM]
    assert store.problems == ()


@pytest.mark.parametrize("level", ["", VM, f"{VM}/{FIRST}", "file", "image"])
def test_links_are_not_followed(store: Store, root: Path, tmp_path: Path, level: str) -> None:
    """Whatever is moved away and replaced by a link to it is not listed; others are."""
    commit(store)
    commit(store, vm=OTHER, name="db1")
    places = {"file": f"{VM}/{FIRST}/point.json", "image": f"{VM}/{FIRST}/xvda.raw"}
    place = root / places.get(level, level or VM)
    moved = shutil.move(place, tmp_path / "elsewhere")
    place.symlink_to(moved)

    assert list(store.catalogue().vms) == [OTHER]
    assert len(store.problems) == 1
    assert VM in store.problems[0]


@pytest.mark.parametrize(
    "change",
    [
        {"time": SECOND},
        {"vm_uuid": OTHER},
        {"schema": 2},
        {"disks": 1},
        {"file": "../x"},
        {"file": "/etc/passwd"},
        {"file": "missing.raw"},
        {"digests": ""},
        {"size": SIZE + 1},
    ],
)
def test_a_wrong_record_is_not_listed(
    store: Store, root: Path, change: dict[str, str | int]
) -> None:
    commit(store)
    path = root / VM / FIRST / "point.json"
    record = json.loads(path.read_bytes())
    target = record["disks"][0] if change.keys() & {"file", "digests", "size"} else record
    target.update(change)
    path.write_text(json.dumps(record))

    assert store.catalogue().vms == {}
    assert len(store.problems) == 1
    assert FIRST in store.problems[0]


@pytest.mark.parametrize("kind", ["missing", "pipe", "folder", "broken", "deep", "huge"])
def test_an_unreadable_record_is_not_listed(store: Store, root: Path, kind: str) -> None:
    commit(store)
    path = root / VM / FIRST / "point.json"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes({"broken": b"\xff{", "deep": b"[" * 100_000}.get(kind, b""))
        os.truncate(path, 1 << 40 if kind == "huge" else path.stat().st_size)

    assert store.catalogue().vms == {}
    assert len(store.problems) == 1


def test_a_directory_that_cannot_be_read_is_told(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(store)
    commit(store, vm=OTHER, name="db1")
    inode = (root / VM).stat().st_ino
    whole = os.listdir

    def listdir(fd: int) -> list[str]:
        if os.fstat(fd).st_ino == inode:
            raise PermissionError(errno.EACCES, "no")
        return whole(fd)

    monkeypatch.setattr(os, "listdir", listdir)
    assert list(store.catalogue().vms) == [OTHER]
    assert "permission denied" in store.problems[0]


def test_what_the_disk_cannot_tell_of_is_not_missing(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.stat

    def stat(path: str, *, dir_fd: int | None = None, follow_symlinks: bool = True) -> object:
        if path == "xvda.b3":
            raise OSError(errno.EIO, "no")
        return whole(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks)

    commit(store)
    found = only(store)
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat)
        assert store.catalogue().vms == {}
        assert store.unlisted[0].why == "xvda.b3 cannot be read"
        (disk,) = store.verify(found).disks
    assert disk.damage.problem == "xvda.b3 cannot be read"
    assert store.damaged(VM, FIRST) == {"xvda"}


def test_a_base_that_was_removed_is_not_used(store: Store, root: Path) -> None:
    commit(store)
    disk = only(store).point.disks[0]
    shutil.rmtree(root / VM / FIRST)

    with pytest.raises(errors.ImageDamaged, match="is gone"):
        commit(store, time=SECOND, base=disk)


def test_a_base_outside_is_not_used(store: Store, root: Path, tmp_path: Path) -> None:
    commit(store)
    disk = only(store).point.disks[0]
    image = root / VM / FIRST / "xvda.raw"
    image.symlink_to(shutil.move(image, tmp_path / "elsewhere"))

    with pytest.raises(errors.ImageDamaged):
        commit(store, time=SECOND, base=disk)


# ── Verify ───────────────────────────────────────────────────────────────────────────────────


def spoil(path: Path, offset: int, data: bytes = b"\xee") -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_good_point_is_found_whole(store: Store, root: Path) -> None:
    commit(store)
    steps: list[int] = []

    result = store.verify(only(store), advanced=steps.append)
    assert not result.damaged
    assert result.disks[0].damage == Damage(checked=SIZE)
    assert sum(steps) == SIZE
    assert not (root / VM / FIRST / "damaged.json").exists()


@pytest.mark.parametrize(
    ("offsets", "extents"),
    [
        ([0], [Extent(0, BLOCK)]),
        ([BLOCK - 1, BLOCK], [Extent(0, 2 * BLOCK)]),
        ([10 * BLOCK + 5], [Extent(10 * BLOCK, 11 * BLOCK)]),
        ([SIZE - 1], [Extent(40 * BLOCK, SIZE)]),
        ([0, 23 * BLOCK, 39 * BLOCK], [Extent(n * BLOCK, (n + 1) * BLOCK) for n in (0, 23, 39)]),
    ],
    ids=["first", "neighbours", "hole", "last", "several"],
)
def test_damage_is_found_where_it_is(
    store: Store, root: Path, offsets: list[int], extents: list[Extent]
) -> None:
    commit(store)
    for offset in offsets:
        spoil(root / VM / FIRST / "xvda.raw", offset)

    result = store.verify(only(store))
    assert result.damaged
    assert list(result.disks[0].damage.extents) == extents
    assert result.disks[0].damage.problem == ""


def test_data_that_became_a_hole_is_damage(store: Store, root: Path) -> None:
    commit(store)
    subprocess.run(
        ["fallocate", "-p", "-o", "0", "-l", str(8 * BLOCK), root / VM / FIRST / "xvda.raw"],
        check=True,
    )

    (disk,) = store.verify(only(store)).disks
    assert disk.damage.blocks == 8
    assert disk.damage.extents == (Extent(0, 8 * BLOCK),)


def test_changed_digests_are_damage(store: Store, root: Path) -> None:
    commit(store)
    spoil(root / VM / FIRST / "xvda.b3", 16)

    (disk,) = store.verify(only(store)).disks
    assert disk.damage.problem == "its digests changed"
    assert disk.damage.extents == (Extent(BLOCK, 2 * BLOCK),)


def test_image_and_digests_changed_together_are_damage(store: Store, root: Path) -> None:
    commit(store)
    spoil(root / VM / FIRST / "xvda.raw", 0, noise(BLOCK, seed=9))
    spoil(root / VM / FIRST / "xvda.b3", 0, blake3.blake3(noise(BLOCK, seed=9)).digest(length=16))

    assert store.verify(only(store)).damaged


@pytest.mark.parametrize("file", ["xvda.raw", "xvda.b3"])
def test_a_lost_file_is_damage(store: Store, root: Path, file: str) -> None:
    commit(store)
    found = only(store)
    os.truncate(root / VM / FIRST / file, 16)
    assert "16 bytes instead of" in store.verify(found).disks[0].damage.problem
    (root / VM / FIRST / file).unlink()
    assert store.verify(found).disks[0].damage.problem == f"{file} is missing"


@pytest.mark.parametrize("bad", [0, 24 * BLOCK])
def test_blocks_that_cannot_be_read_are_damage(
    store: Store, monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    commit(store)
    whole = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset <= bad < offset + len(buffers[0]):
            raise OSError(errno.EIO, "no")
        return whole(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    (disk,) = store.verify(only(store)).disks
    assert disk.damage.extents == (Extent(bad, bad + BLOCK),)


def test_digests_that_cannot_be_read_are_damage(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pread(fd: int, length: int, offset: int) -> bytes:
        raise OSError(errno.EIO, "no")

    commit(store)
    found = only(store)
    monkeypatch.setattr(os, "pread", pread)
    assert store.verify(found).disks[0].damage.problem == "its digests cannot be read"


def test_a_file_cut_meanwhile_is_damage(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(store)
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: 0)

    assert store.verify(only(store)).disks[0].damage.extents == (Extent(0, SIZE),)


def test_another_failure_is_no_verdict(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EACCES, "no")

    commit(store)
    found = only(store)
    for name in ("preadv", "pread"):
        monkeypatch.setattr(os, name, preadv)
        with pytest.raises(errors.StoreError, match=r"cannot read .*xvda\.raw"):
            store.verify(found)


def test_a_stopped_check_leaves_nothing_open(store: Store) -> None:
    def stop(length: int) -> None:
        raise KeyboardInterrupt

    commit(store)
    found = only(store)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(KeyboardInterrupt):
        store.verify(found, advanced=stop)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_only_so_many_extents_are_named(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(damage, "KEPT_EXTENTS", 2)
    commit(store)
    for block in (0, 2, 4, 6):
        spoil(root / VM / FIRST / "xvda.raw", block * BLOCK)

    (disk,) = store.verify(only(store)).disks
    assert (disk.damage.blocks, len(disk.damage.extents)) == (4, 2)


def test_a_huge_sparse_disk_is_checked_at_once(store: Store, root: Path) -> None:
    size = 1 << 40
    with store.lock(VM), store.stage(VM, time=FIRST) as stage:
        image = stage.new_image("xvda.raw", size=size)
        image.write(size // 2, noise(BLOCK))
        disk = disk_point(size, image.finish())
        stage.commit(Point(time=FIRST, vm_uuid=VM, vm_name="web1", disks=(disk,)))

    assert not store.verify(only(store)).damaged
    spoil(root / VM / FIRST / "xvda.raw", size - 1)
    assert store.verify(only(store)).disks[0].damage.blocks == 1


# ── Damage on record ─────────────────────────────────────────────────────────────────────────


def test_a_damaged_disk_is_never_a_base_again(store: Store, root: Path) -> None:
    commit(store)
    disk = only(store).point.disks[0]
    spoil(root / VM / FIRST / "xvda.raw", 0)
    store.verify(only(store))

    assert store.damaged(VM, FIRST) == {"xvda"}
    with pytest.raises(errors.ImageDamaged, match="no base"):
        commit(store, time=SECOND, base=disk)
    record = json.loads((root / VM / FIRST / "damaged.json").read_bytes())
    assert record["disks"]["xvda"]["extents"] == [[0, BLOCK]]


def test_a_disk_found_whole_again_loses_its_record(store: Store, root: Path) -> None:
    commit(store)
    spoil(root / VM / FIRST / "xvda.raw", 0)
    store.verify(only(store))
    spoil(root / VM / FIRST / "xvda.raw", 0, CONTENT[:1])
    store.verify(only(store, "web1/latest/xvda"))

    assert store.damaged(VM, FIRST) == frozenset()
    assert not (root / VM / FIRST / "damaged.json").exists()


def test_the_record_of_another_disk_stays(any_dir: Path) -> None:
    with Folder.open(any_dir) as point:
        damage.record(point, "xvda", Damage(blocks=1), now="then")
        damage.record(point, "xvdb", Damage(problem="gone"), now="now")
        damage.record(point, "xvda", Damage(), now="now")

        assert damage.recorded(point) == {"xvdb"}


@pytest.mark.parametrize("content", [b"", b"{", b'{"disks": 1}', b"[" * 100_000])
def test_a_broken_record_says_damage(store: Store, root: Path, content: bytes) -> None:
    commit(store)
    disk = only(store).point.disks[0]
    (root / VM / FIRST / "damaged.json").write_bytes(content)

    assert store.damaged(VM, FIRST) == {"xvda"}
    with pytest.raises(errors.ImageDamaged):
        commit(store, time=SECOND, base=disk)


def test_damage_is_told_even_if_it_cannot_be_recorded(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, data: bytes) -> int:
        raise OSError(errno.EROFS, "no")

    commit(store)
    spoil(root / VM / FIRST / "xvda.raw", 0)
    found = only(store)
    monkeypatch.setattr(os, "write", refuse)
    result = store.verify(found)
    assert result.damaged
    assert "read-only" in result.warnings[0]


# ── Facts ────────────────────────────────────────────────────────────────────────────────────


def test_free_space_is_what_df_says(store: Store, root: Path) -> None:
    assert abs(store.free_space() - shutil.disk_usage(root).free) < 64 << 20


def test_reflinks_are_tried(store: Store, reflink_dir: Path) -> None:
    with stores.open_store(reflink_dir / "other") as other:
        assert other.reflink_supported()
        assert repr(other) == f"<Store {reflink_dir / 'other'}>"


def test_a_point_has_a_path(store: Store, root: Path) -> None:
    assert store.point_path(VM, FIRST) == root / VM / FIRST


def test_the_digest_of_a_block_is_b3sum_of_it(store: Store, root: Path) -> None:
    """As the documentation says one can check by hand."""
    commit(store)
    array = (root / VM / FIRST / "xvda.b3").read_bytes()

    assert array[:16] == blake3.blake3(CONTENT[:BLOCK]).digest()[:16]
    assert array[8 * 16 : 24 * 16] == bytes(256)
    assert len(array) == digests.array_length(SIZE)
    assert only(store).point.disks[0].digest_root == blake3.blake3(array).hexdigest()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "x" * 256])
def test_a_name_is_one_component(any_dir: Path, name: str) -> None:
    with Folder.open(any_dir) as folder:
        with pytest.raises(errors.StoreError, match="no file name"):
            folder.read(name)
