"""``open`` and ``close`` of disks as guests make them: the real command, tools and kernel."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from cbtfs import contents

from . import disks_made
from .commands import Shell, items
from .disks_made import FILES, MadeStore, MiB, blank, file_system, partitioned, put, run, tree
from .program import Program, untouched_process
from .simulated import RunningPool

RECIPES = Path(__file__).parent.parent / "contrib/docs/restore-files.md"
SYSTEM = "/usr/sbin:/sbin:/usr/bin:/bin"
TOOLS = ("sfdisk", "mkfs.xfs", "mkfs.btrfs", "mkfs.vfat", "mkntfs")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount")

TWO_AND_SWAP = """label: dos
start=2048, size=24576, type=83
start=26624, size=40000, type=5
start=28672, size=24576, type=83
start=55296, size=4096, type=82
"""
"""Partitions 1, 5 and 6: the second is an extended one, which holds the others."""

FOUR = """label: gpt
start=2048, size=32768
start=34816, size=614400
start=649216, size=262144
start=911360, size=20480
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> MadeStore:
    missing = [tool for tool in TOOLS if not shutil.which(tool, path="/usr/sbin:/sbin:/usr/bin")]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: contrib/setup --test installs them")
    return MadeStore(tmp_path_factory.mktemp("made") / "store")


@pytest.fixture(scope="module")
def linux(store: MadeStore, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A point: one disk with two ext4 and swap, another that is an ext4 itself."""
    scratch = tmp_path_factory.mktemp("linux")
    disk = partitioned(scratch / "xvda", size=40 * MiB, table=TWO_AND_SWAP)
    ext4 = file_system(scratch / "ext4", "ext4", size=12 * MiB)
    swap = blank(scratch / "swap", size=2 * MiB)
    run("mkswap", "-q", swap)
    for piece, sector in ((ext4, 2048), (ext4, 28672), (swap, 55296)):
        put(disk, piece, at=sector * 512)
    return store.add({"xvda": disk, "xvdb": ext4})


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory that does not exist yet; nothing stays mounted there."""
    path = tmp_path / "opened here"
    yield path
    subprocess.run(["umount", "--recursive", path], check=False, capture_output=True)


def test_open_shows_the_files_and_close_leaves_nothing(
    store: MadeStore, linux: str, place: Path
) -> None:
    image = store.image(linux)
    before = image.stat()

    done = store.run("open", linux, place, environ={})

    assert sorted(p.name for p in place.iterdir()) == ["xvda1", "xvda5", "xvdb"]
    for name in ("xvda1", "xvda5", "xvdb"):
        assert {**FILES}.items() <= tree(place / name).items()
    assert f"{place}/xvda5" in done.stdout
    assert 'xvda6 is swap space; see "' in done.stderr
    assert place.stat().st_mode & 0o777 == 0o700
    assert all(line.startswith("1 1 ") for line in store.loops())  # read-only, and autoclear
    assert len(store.loops()) == 3

    closed = store.run("close", place, environ={})

    assert closed.stderr.count("+ umount ") == 4
    assert store.is_untouched(place)
    assert place.is_dir()
    after = image.stat()
    assert (before.st_mtime_ns, before.st_blocks) == (after.st_mtime_ns, after.st_blocks)
    store.run("verify", linux)


@pytest.mark.parametrize(("point", "folder"), [("linux", "xvda5"), ("spread", "xvda-fast")])
def test_commands_that_are_told_can_be_pasted(
    store: MadeStore, place: Path, request: pytest.FixtureRequest, point: str, folder: str
) -> None:
    made = str(request.getfixturevalue(point))
    told = [
        line.removeprefix("+ ")
        for line in store.run("open", made, place).stderr.splitlines()
        if line.startswith("+ ")
    ]
    undone = [
        line.removeprefix("+ ")
        for line in store.run("close", place).stderr.splitlines()
        if line.startswith("+ ")
    ]
    place.rmdir()

    await_end_of_joiners(store)
    # without -e: blkid fails where it finds nothing
    run("sh", given="\n".join(told))

    assert {**FILES}.items() <= tree(place / folder).items()
    run("sh", "-e", given="\n".join(undone))
    assert store.is_untouched(place)


def test_nothing_can_be_written_or_run(store: MadeStore, linux: str, place: Path) -> None:
    store.run("open", linux, place)

    mounts = [m.split() for m in Path("/proc/self/mountinfo").read_text().splitlines()]
    options = {m[4].rpartition("/")[2]: set(m[5].split(",")) for m in mounts if "opened" in m[4]}
    assert {"ro", "nodev", "nosuid", "noexec"} <= options["xvda1"] & options["xvdb"]
    with pytest.raises(OSError, match="Read-only"):
        (place / "xvda1/new").touch()

    store.run("close", place)


def test_disk_with_one_file_system_is_the_directory_itself(
    store: MadeStore, linux: str, place: Path
) -> None:
    document = store.json("open", f"{linux}/xvdb", place)

    (mount,) = items(document, "mounts")
    assert mount["where"] == str(place)
    assert (mount["device"], mount["partition"], mount["fstype"]) == ("xvdb", None, "ext4")
    assert mount["source"] == str(store.image(linux, "xvdb"))
    assert {**FILES}.items() <= tree(place).items()
    closed = store.json("close", place)
    assert closed["unmounted"] == [str(place)]
    assert store.is_untouched(place)


def test_every_file_system_that_this_machine_knows(
    store: MadeStore, place: Path, tmp_path: Path
) -> None:
    disk = partitioned(tmp_path / "disk", size=456 * MiB, table=FOUR)
    kinds = {"ntfs": 2048, "xfs": 34816, "btrfs": 649216, "vfat": 911360}
    sizes = {"ntfs": 16, "xfs": 300, "btrfs": 128, "vfat": 10}
    for kind, sector in kinds.items():
        put(disk, file_system(tmp_path / kind, kind, size=sizes[kind] * MiB), at=sector * 512)
    point = store.add({"xvda": disk})

    document = store.json("open", point, place)

    shown = {str(m["fstype"]): Path(str(m["where"])) for m in items(document, "mounts")}
    left = {str(s["fstype"]): str(s["why"]) for s in items(document, "skipped")}
    known = Path("/proc/filesystems").read_text().split()
    assert {"xfs", "btrfs", "ntfs"} <= shown.keys()
    assert {**FILES}.items() <= tree(shown["xfs"]).items()
    assert {**FILES}.items() <= tree(shown["btrfs"]).items()
    assert tree(shown["ntfs"])["big"] == FILES["var/big"]
    if "vfat" not in known:
        assert left == {"vfat": "holds vfat, which this machine cannot mount"}
        assert not (place / "xvda4").exists()
    store.run("close", place)
    assert store.is_untouched(place)
    store.run("verify", point)


def test_volumes_of_lvm_over_two_disks(store: MadeStore, spread: str, place: Path) -> None:
    """``root`` and ``small`` are in one piece each, the others not."""
    document = store.json("open", spread, place)

    volumes = {m["volume"]: (m["partition"], m["devices"]) for m in items(document, "mounts")}
    assert volumes == {
        "vg/root": (1, ["xvda"]),
        "vg/small": (None, ["xvdb"]),
        "vg/span": (None, ["xvda", "xvdb"]),
        "vg/fast": (None, ["xvda", "xvdb"]),
        "one/grown": (None, ["xvdc"]),
    }
    for name in ("xvda-root", "xvdb-small", "xvda-span", "xvda-fast", "xvdc-grown"):
        assert {**FILES}.items() <= tree(place / name).items()
    (left,) = items(document, "skipped")
    assert left["name"] == "xvdc-fence"
    assert len(joiners(store)) == 1
    store.run("close", place)
    assert store.is_untouched(place)
    await_end_of_joiners(store)
    store.run("verify", spread)

    alone = store.json("open", f"{spread}/xvdb", place)
    assert [m["volume"] for m in items(alone, "mounts")] == ["vg/small"]
    assert {str(s["why"]) for s in items(alone, "skipped")} == {
        "is a volume of LVM on another disk, or on one of two disks that are copies"
    }
    store.run("close", place)


def test_volume_in_pieces_alone_on_its_disk(store: MadeStore, spread: str, place: Path) -> None:
    done = store.run("open", f"{spread}/xvdc", place)

    assert "xvdc, volume one/grown" in done.stdout
    assert {**FILES}.items() <= tree(place).items()
    with pytest.raises(OSError, match="Read-only"):
        (place / "new").touch()
    run("umount", place)  # by hand
    await_end_of_joiners(store)
    assert store.is_untouched(place)


def test_volumes_in_pieces_keep_their_point_open(
    store: MadeStore, spread: str, place: Path
) -> None:
    store.add({"xvda": store.image(spread, "xvdc")})
    store.run("open", f"{spread}/xvdc", place)
    before = reasons(store, spread)
    store.run("close", place)
    await_end_of_joiners(store)

    assert "open" in " ".join(before)
    assert "open" not in " ".join(reasons(store, spread))


def test_process_that_died_can_be_closed(store: MadeStore, spread: str, place: Path) -> None:
    store.run("open", f"{spread}/xvdc", place)
    (joiner,) = joiners(store)
    os.kill(joiner, signal.SIGKILL)
    await_end_of_joiners(store)
    Path("/proc/sys/vm/drop_caches").write_text("3")

    with pytest.raises(OSError, match="Input/output error"):
        tree(place)
    store.run("close", place)

    assert store.is_untouched(place)


@pytest.mark.parametrize("step", [3, 6])
def test_killed_open_of_a_volume_in_pieces_is_closed(
    store: MadeStore, spread: str, place: Path, tmp_path: Path, step: int
) -> None:
    """SIGKILL hits before ``grown`` is looked at, and when it is mounted, before its file goes.

    (The two before are blkid of the disk and of ``fence``; the place for the files is there.)
    """
    Path("/run/cbtfs/volumes").mkdir(mode=0o700, parents=True, exist_ok=True)
    names = ("mkdir", "mount", "umount", "blkid")
    environ = saboteur(tmp_path, step=step, send="KILL", names=names)

    done = store.run("open", f"{spread}/xvdc", place, status=None, environ=environ)
    assert done.status in {0, -signal.SIGKILL}
    closed = store.run("close", place, status=None, environ={})

    assert closed.status in {0, 1}
    assert closed.status == 0 or "is not open" in closed.stderr
    assert store.is_untouched(place)
    await_end_of_joiners(store)
    assert "/run/cbtfs/volumes" not in Path("/proc/self/mountinfo").read_text()


def test_without_fuse_the_others_are_opened(
    store: MadeStore, spread: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")

    document = store.json("open", spread, place)
    refused = store.run("open", f"{spread}/xvdc", place.with_name("other"), status=1)

    assert {m["volume"] for m in items(document, "mounts")} == {"vg/root", "vg/small"}
    assert "is a volume of LVM in 3 pieces, which cannot be joined here" in refused.stderr
    assert f'see "LVM" in {contents.RECIPES}' in refused.stderr
    store.run("close", place)
    assert store.is_untouched(place)


@pytest.fixture(scope="module")
def spread(store: MadeStore, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A point: volumes over two disks, linear and striped, and in three pieces of a third.

    LVM's own tools made them, and tell where each extent lies.
    """
    if shutil.which("lvcreate", path="/usr/sbin:/sbin:/usr/bin") is None:
        pytest.skip("needs lvm2: contrib/setup --test installs it")
    scratch = tmp_path_factory.mktemp("spread")
    first = partitioned(scratch / "a", size=201 * MiB, table="label: gpt\nstart=2048\n")
    disks = {"xvda": first, "xvdb": blank(scratch / "b", size=200 * MiB)}
    disks["xvdc"] = blank(scratch / "c", size=40 * MiB)
    with disks_made.loops(disks.values(), offsets=[MiB, 0, 0]) as (one, two, three):
        make = "lvcreate -an -Zn -Wn -y"
        disks_made.lvm(
            [one, two, three],
            f"pvcreate {one} {two} {three}",
            f"vgcreate -s 4M vg {one} {two}",
            f"{make} -L 16M -n root vg {one}",
            f"{make} -L 16M -n small vg {two}",
            f"{make} -L 304M -i 2 -I 64k -n fast vg",
            f"{make} -l 100%FREE -n span vg",
            f"vgcreate -s 1M one {three}",
            f"{make} -L 4M -n grown one {three}:20-",
            f"{make} -L 2M -n fence one {three}:24-",
            f"lvextend -L +3M one/grown {three}:3-",
            f"lvextend -L +9M one/grown {three}:28-",
        )
        layouts = disks_made.layouts([one, two, three])
    names = {one: first, two: disks["xvdb"], three: disks["xvdc"]}
    starts = {one: MiB, two: 0, three: 0}
    assert {name: len(layout) for name, layout in layouts.items()} == {
        "root": 1, "small": 1, "fast": 1, "span": 2, "grown": 3, "fence": 1
    }  # fmt: skip
    for name, layout in layouts.items():
        if name != "fence":
            kind = "xfs" if name == "fast" else "ext4"
            size = sum(segment.size for segment in layout)
            disks_made.lay(file_system(scratch / name, kind, size=size), layout, names, starts)
    return store.add(disks)


def joiners(store: MadeStore) -> list[int]:
    """Return the processes that show volumes of this store in one piece."""
    found: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes()
            if b"cbtfs.joined" in words and os.fsencode(store.path) in words:
                found.append(int(process.name))
    return found


def await_end_of_joiners(store: MadeStore) -> None:
    """Wait until there are none; they end by themselves."""
    until = time.monotonic() + 5
    while joiners(store):
        assert time.monotonic() < until
        time.sleep(0.01)


# ── Refusals ──


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("zeros", 'xvda holds nothing that blkid recognises; see "A whole disk or anything else"'),
        ("noise", "xvda holds nothing that blkid recognises; see"),
        ("luks", 'xvda is encrypted (LUKS); see "Encrypted disks" in contrib/docs/restore-files'),
        ("swap", "xvda is swap space; see"),
        ("two", "xvda looks like several things at once; see"),
        ("lvm", 'xvda is a physical volume of LVM, but its LVM metadata are damaged; see "LVM"'),
        ("beyond", "xvda1 lies beyond the end of its disk; see"),
    ],
)
def test_what_it_does_not_know_is_refused_with_the_recipe(
    store: MadeStore, place: Path, tmp_path: Path, kind: str, words: str
) -> None:
    point = store.add({"xvda": unknown_disk(tmp_path / "disk", kind)})

    done = store.run("open", f"{point}/xvda", place, status=1)

    assert f"cbtfs: nothing here can be mounted: {words}" in done.stderr
    assert done.stdout == ""
    assert not place.exists()
    assert not store.loops()


def unknown_disk(path: Path, kind: str) -> Path:
    blank(path, size=4 * MiB)
    match kind:
        case "noise":
            path.write_bytes(os.urandom(4 * MiB))
        case "luks":
            header = b"LUKS\xba\xbe\x00\x01" + b"aes\0".ljust(32, b"\0") + b"xts-plain64\0"
            path.write_bytes(header.ljust(4 * MiB, b"\0"))
        case "swap":
            run("mkswap", "-q", path)
        case "two":
            file_system(path, "ext4", size=4 * MiB)
            with path.open("r+b") as file:  # as mkswap leaves it
                file.seek(4086)
                file.write(b"SWAPSPACE2")
                file.seek(1024)
                file.write(b"\1\0\0\0\xff\3\0\0")
        case "lvm":
            loop = run("losetup", "--find", "--show", path).strip()
            disks_made.lvm([loop], f"pvcreate {loop}")
            run("losetup", "--detach", loop)
            with path.open("r+b") as file:
                file.seek(4096)
                file.write(b"\xff" * 512)
        case "beyond":
            partitioned(path, size=8 * MiB, table="label: dos\nstart=2048, size=14336\n")
            os.truncate(path, 4 * MiB)
        case _:
            pass
    return path


def test_directory_must_be_empty_and_elsewhere(
    store: MadeStore, linux: str, place: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").touch()

    assert "is not empty" in store.run("open", linux, tmp_path, status=1).stderr
    assert "is in the store" in store.run("open", linux, store.path / "x", status=2).stderr
    assert "cannot create" in store.run("open", linux, place / "a/b", status=1).stderr
    store.run("open", "web1/20270101", place, status=10)
    assert store.is_untouched(place)


def test_open_twice_and_close_twice(store: MadeStore, linux: str, place: Path) -> None:
    twin = place.with_name("twin")
    store.run("open", linux, place)
    store.run("open", linux, twin)

    again = store.run("open", linux, place, status=1)
    store.run("close", place)

    assert f"is open already; run: cbtfs close {place}" in again.stderr
    assert {**FILES}.items() <= tree(twin / "xvda1").items()
    store.run("close", twin)
    assert store.is_untouched(place)
    assert f"{place} is not open" in store.run("close", place, status=1).stderr


def test_open_point_is_kept_by_prune_until_it_is_closed(
    store: MadeStore, place: Path, tmp_path: Path
) -> None:
    disk = file_system(tmp_path / "disk", "ext4", size=12 * MiB)
    point, _ = store.add({"xvda": disk}), store.add({"xvda": disk})

    store.run("open", f"{point}/xvda", place)
    before = reasons(store, point)
    store.run("close", place)

    assert "open" in " ".join(before)
    assert "open" not in " ".join(reasons(store, point))


def reasons(store: MadeStore, point: str) -> list[str]:
    """Return why prune would keep a point."""
    (vm,) = items(store.json("prune", "-n", "--keep-last", "1"), "vms")
    (told,) = [p for p in items(vm, "points") if p["time"] == point.rpartition("/")[2]]
    found = told["reasons"]
    assert isinstance(found, list)
    return list(map(str, found))


def test_close_leaves_alone_what_others_mounted(store: MadeStore, linux: str, place: Path) -> None:
    place.mkdir()
    run("mount", "-t", "tmpfs", "none", place)
    assert "by another program; use: umount" in store.run("close", place, status=1).stderr
    run("umount", place)

    store.run("open", linux, place)
    run("mount", "-t", "tmpfs", "none", place / "xvda1/var")
    done = store.run("close", place, status=1)
    assert f"unmount that first: umount {place}/xvda1/var" in done.stderr
    assert (place / "xvda5/etc").is_dir()
    run("umount", place / "xvda1/var")
    store.run("close", place)


def test_needs_root(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with untouched_process():
        result = Program(capsys)("open", "web1/latest", str(tmp_path))

    assert result.status == 1
    assert "cbtfs open needs root" in result.err
    assert f'see "Without root" in {contents.RECIPES}' in result.err


# ── What goes wrong ──


def test_use_of_a_file_is_named_and_the_next_close_goes_on(
    store: MadeStore, linux: str, place: Path
) -> None:
    store.run("open", linux, place)

    with subprocess.Popen(["sleep", "60"], cwd=place / "xvda1/etc") as user:
        done = store.run("close", place, status=1)
        user.kill()

    assert f"is in use by sleep ({user.pid}); end that, and run the command again" in done.stderr
    store.run("close", place)
    assert store.is_untouched(place)


def test_broken_file_system_undoes_the_others(
    store: MadeStore, linux: str, place: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    run("cp", "--sparse=always", store.image(linux), disk)
    with disk.open("r+b") as file:
        file.seek(28672 * 512 + 1024 + 1024)  # the group descriptors of the second
        file.write(os.urandom(4096))
    point = store.add({"xvda": disk})

    done = store.run("open", point, place, status=1)

    assert "xvda5 (ext4) cannot be mounted, so nothing is open" in done.stderr
    assert f"+ umount '{place}/xvda1'" in done.stderr
    assert not place.exists()
    assert not store.loops()


def test_image_that_has_a_loop_device_already_is_told(
    store: MadeStore, linux: str, place: Path
) -> None:
    loop = run("losetup", "--find", "--show", "--read-only", store.image(linux)).strip()
    done = store.run("open", linux, place, status=1)
    run("losetup", "--detach", loop)

    assert f"see which with losetup -j {store.image(linux)}" in done.stderr
    assert not place.exists()


def test_known_damage_is_told(store: MadeStore, place: Path, tmp_path: Path) -> None:
    point = store.add({"xvda": file_system(tmp_path / "disk", "ext4", size=12 * MiB)})
    with store.image(point).open("r+b") as file:
        file.seek(11 * MiB)
        file.write(b"rot")
    store.run("verify", point, status=4)

    done = store.run("open", point, place)

    assert f"warning: {point}: xvda is damaged" in done.stderr
    store.run("close", place)


def test_journal_that_is_not_replayed_is_told(
    store: MadeStore, place: Path, tmp_path: Path
) -> None:
    source = file_system(tmp_path / "source", "ext4", size=12 * MiB)
    with disks_made.mounted(source) as used:
        (used / "late").write_bytes(b"late\n")
        os.sync()
        run("cp", source, tmp_path / "disk")
    point = store.add({"xvda": tmp_path / "disk"})
    digest = run("sha256sum", store.image(point))

    document = store.json("open", f"{point}/xvda", place)

    assert "xvda was in use when its snapshot was taken" in str(document["warnings"])
    store.run("close", place)
    assert run("sha256sum", store.image(point)) == digest


# ── Ends in between ──


@pytest.mark.parametrize("step", range(1, 9))
def test_killed_open_is_closed(
    store: MadeStore, linux: str, place: Path, tmp_path: Path, step: int
) -> None:
    """SIGKILL hits before each mkdir and mount, which runs all the same, unwatched.

    They are: mkdir of the place, its tmpfs, and a folder and a mount for each of three.
    """
    environ = saboteur(tmp_path, step=step, send="KILL")

    store.run("open", linux, place, status=-signal.SIGKILL, environ=environ)
    done = store.run("close", place, status=1 if step == 1 else 0)

    assert ("is not open" in done.stderr) == (step == 1)
    assert store.is_untouched(place)
    assert place.is_dir()


@pytest.mark.parametrize("step", [3, 6])
def test_interrupted_open_undoes_itself(
    store: MadeStore, linux: str, place: Path, tmp_path: Path, step: int
) -> None:
    environ = saboteur(tmp_path, step=step, send="TERM")

    store.run("open", linux, place, status=128 + signal.SIGTERM, environ=environ)

    assert not place.exists()
    assert not store.loops()


def test_close_waits_for_a_mount_that_outlives_its_open(
    store: MadeStore, linux: str, place: Path, tmp_path: Path
) -> None:
    environ = saboteur(tmp_path, step=4, send="KILL", pause=0.5)

    store.run("open", linux, place, status=-signal.SIGKILL, environ=environ)
    store.run("close", place)

    assert store.is_untouched(place)


def saboteur(
    folder: Path,
    *,
    step: int,
    send: str,
    pause: float = 0,
    names: Sequence[str] = ("mkdir", "mount"),
) -> dict[str, str]:
    """Return an environment in which the ``step``-th of these tools sends its parent a signal.

    It then goes on, after ``pause`` seconds.
    """
    tools = folder / "tools"
    tools.mkdir()
    for name in names:
        lines = [
            "#!/bin/sh",
            f"echo >>{tools}/count",
            f"if [ $(wc -l <{tools}/count) = {step} ]; then",
            f"    kill -{send} $PPID",
            f"    sleep {pause}",
            "fi",
            f'exec {shutil.which(name, path=SYSTEM)} "$@"',
        ]
        (tools / name).write_text("\n".join(lines) + "\n")
        (tools / name).chmod(0o755)
    return {"PATH": f"{tools}:{os.environ['PATH']}"}


# ── The recipes ──


def test_every_recipe_that_is_named_is_there() -> None:
    headings = {
        line.strip("# \n") for line in RECIPES.read_text().splitlines() if line.startswith("#")
    }

    named = {recipe for _, recipe in contents.LEFT_ALONE.values()}
    assert named | {contents.UNTABLED, contents.DRIVERLESS, contents.BROKEN} <= headings
    assert {"LVM", "Without root"} <= headings


# ── A disk of a pool, served ──


def test_restored_disk_that_is_served_is_the_original(started: RunningPool, tmp_path: Path) -> None:
    """An ext4 in a partition, and one in a volume of LVM: by nbdkit, by qemu-nbd, and open."""
    shell = Shell(started, tmp_path / "store")
    shell.run("sync", "--vm", "web1", "--vm", "db1")

    for vm, size in (("web1", 511 * MiB), ("db1", 160 * MiB)):
        served = ("file", shell.image(vm, "xvda"), f"offset={MiB}", f"range={size}")
        part, files = tmp_path / vm, tmp_path / f"{vm} files"
        run("nbdkit", "-r", "-U-", "--filter=offset", *served, "--run", f'nbdcopy "$uri" {part}')
        run("fsck.ext4", "-f", "-n", part)
        files.mkdir()
        run("debugfs", "-R", f'rdump / "{files}"', part)
        check_sums(files)
        shell.run("open", f"{vm}/latest", str(tmp_path / f"open {vm}"))
        for folder in (tmp_path / f"open {vm}").iterdir():
            check_sums(folder)
        shell.run("close", str(tmp_path / f"open {vm}"))

    socket, whole = tmp_path / "socket", tmp_path / "whole"
    image = shell.image("db1", "xvda")
    with subprocess.Popen(["qemu-nbd", "-r", "-f", "raw", "-k", socket, image]) as nbd:
        run("sh", "-c", f"until [ -S {socket} ]; do sleep 0.02; done")
        run("nbdcopy", f"nbd+unix:///?socket={socket}", whole)
    run("nbdcopy", started.guest("db1", "xvda"), tmp_path / "guest")
    run("cmp", whole, tmp_path / "guest")
    assert nbd.returncode == 0


def check_sums(folder: Path) -> None:
    """Compare the files in a folder with the sums that the simulated guest wrote beside them."""
    run("sh", "-c", f"cd '{folder}' && sha256sum --quiet -c SHA256SUMS")
