"""``restore --to``: files and devices that equal the image, or nothing; killed, it is gone on with.

``contrib/soak/kill-restore`` kills it at every change that it makes; here it is some of them.
"""

import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from cbtfs import digests, errors, imagecopy, restorefile, sparse, store as stores, units
from cbtfs.catalogue import DiskPoint, Point
from cbtfs.extents import Extent
from cbtfs.imagecopy import ImageCopy
from cbtfs.partialfile import PartialFile
from cbtfs.restorefile import Wish
from cbtfs.simulator import default_scenario
from cbtfs.simulator.lvm import LogicalVolume

from . import powercut
from .commands import Shell, items
from .killpoints import WRITES, Mode
from .killrun import Runner, open_runner
from .program import Program, untouched_process
from .simulated import RunningPool
from .test_mounted import loop_device as partitioned
from .test_simulator_scenario import check_files
from .test_store import FIRST, SECOND, VM, disk_point, intent, noise

BLOCK = digests.BLOCK
EVERY = int(os.environ.get("CBTFS_KILL_EVERY", "24"))
SEED = int(os.environ.get("CBTFS_SEED", str(time.time_ns())))

pytestmark = pytest.mark.timeout(120 + 5000 // EVERY)

HOLES = noise(3 * units.MiB) + bytes(5 * units.MiB) + noise(3 * units.MiB + 512, seed=2)
"""Two MiB multiples and a sector, with a hole."""

needs_loop = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for loop devices")


def add_point(
    root: Path, contents: Mapping[str, bytes], *, vm: str = VM, time: str = FIRST
) -> None:
    """Make a store, or go on with one, whose VM ``web1`` has a point with these disks."""
    with stores.open_store(root) as store, store.lock(vm), store.stage(vm, time=time) as stage:
        stage.record(intent(time, vm=vm))
        disks: list[DiskPoint] = []
        for device, content in contents.items():
            image = stage.new_image(f"{device}.raw", size=len(content))
            for at in range(0, len(content), units.MiB):
                image.write(at, content[at : at + units.MiB])
            disks.append(
                DiskPoint(
                    device=device,
                    file=f"{device}.raw",
                    digests=f"{device}.b3",
                    digest_root=image.finish(),
                    size=len(content),
                    vdi_uuid=device,
                )
            )
        assert stage.commit(Point(time=time, vm_uuid=vm, vm_name="web1", disks=tuple(disks))) == ()


def image_of(root: Path, device: str = "xvda", *, time: str = FIRST) -> Path:
    return root / VM / time / f"{device}.raw"


def spoil(path: Path, offset: int) -> None:
    """Change a byte of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def partials(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.cbtfs-partial"))


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with one point of one disk, on a file system that may have no reflinks."""
    path = tmp_path / "store"
    add_point(path, {"xvda": HOLES})
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    return path


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make reflinks impossible, wherever the tests run."""
    monkeypatch.setattr(sparse, "reflink", lambda source, target: False)


@pytest.fixture
def cbtfs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Program]:
    for name in [name for name in os.environ if name.startswith("CBTFS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    with untouched_process():
        yield Program(capsys, "--store", str(tmp_path / "store"))


# ── Files ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("verify", ["sample", "full"])
@pytest.mark.parametrize(
    "content",
    [HOLES, b"", noise(512), bytes(3 * units.MiB), noise(BLOCK) + bytes(7 * units.MiB)],
    ids=["holes", "empty", "a sector", "zeros", "a tail of zeros"],
)
def test_a_file_equals_the_image(
    cbtfs: Program, tmp_path: Path, out: Path, copying: None, content: bytes, verify: str
) -> None:
    add_point(tmp_path / "store", {"xvda": content})

    told = cbtfs.json("restore", "web1/latest", "--to", str(out / "a.raw"), "--verify", verify)

    assert (out / "a.raw").read_bytes() == content
    assert (out / "a.raw").stat().st_mode & 0o777 == 0o600
    assert allocated(out / "a.raw") <= allocated(image_of(tmp_path / "store")) + 64 * units.KiB
    assert os.listdir(out) == ["a.raw"]  # noqa: PTH208 - hidden files too
    assert told["bytes_written"] == sum(
        len(content[at : at + BLOCK])
        for at in range(0, len(content), BLOCK)
        if any(content[at : at + BLOCK])
    )
    assert (told["reflinked"], told["resumed"]) == (False, False)
    assert told["verified_bytes"] == len(content) or verify == "sample"
    assert {"point", "device", "target", "size", "seconds"} <= told.keys()
    assert told["point"] == f"web1/{FIRST}"


@pytest.mark.reflink
def test_a_file_beside_the_store_shares_its_extents(
    capsys: pytest.CaptureFixture[str], reflink_dir: Path
) -> None:
    add_point(reflink_dir / "store", {"xvda": HOLES})
    free = shutil.disk_usage(reflink_dir).free
    with untouched_process():
        cbtfs = Program(capsys, "--store", str(reflink_dir / "store"))
        target = reflink_dir / "a.raw"
        plan = cbtfs.json("restore", "web1/latest", "--to", str(target), "-n")
        assert not target.exists()
        told = cbtfs.json("restore", "web1/latest", "--to", str(target), "--verify", "full")

    assert (plan["how"], plan["bytes_to_write"]) == ("reflink", 0)
    assert (told["reflinked"], told["bytes_written"]) == (True, 0)
    assert target.read_bytes() == HOLES
    assert free - shutil.disk_usage(reflink_dir).free < units.MiB
    assert partials(reflink_dir) == []


@pytest.mark.reflink
def test_damage_that_would_be_shared_is_found_as_it_is_read_back(
    capsys: pytest.CaptureFixture[str], reflink_dir: Path
) -> None:
    add_point(reflink_dir / "store", {"xvda": HOLES})
    spoil(image_of(reflink_dir / "store"), 3 * BLOCK)
    with untouched_process():
        cbtfs = Program(capsys, "--store", str(reflink_dir / "store"))
        words = ["restore", "web1/latest", "--verify", "full", "--to", str(reflink_dir / "a.raw")]
        refused = cbtfs(*words)
        assert not (reflink_dir / "a.raw").exists()
        assert partials(reflink_dir) == []
        forced = cbtfs(*words, "--force")

    assert refused.status == 4
    assert f"bytes {3 * BLOCK} to {4 * BLOCK} differ" in refused.err
    assert forced.status == 0
    assert f"bytes {3 * BLOCK} to {4 * BLOCK}" in forced.err
    assert (reflink_dir / "a.raw").read_bytes() == image_of(reflink_dir / "store").read_bytes()


def test_an_existing_file_stays_unless_forced(
    cbtfs: Program, root: Path, out: Path, copying: None
) -> None:
    target = out / "a.raw"
    target.write_bytes(b"precious")

    refused = cbtfs("restore", "web1/latest", "--to", str(target))
    assert target.read_bytes() == b"precious"
    with target.open("rb") as reader:
        forced = cbtfs("restore", "web1/latest", "--to", str(target), "--force")
        assert reader.read() == b"precious"  # whoever has it open keeps it

    assert refused.status == 2
    assert "exists already; --force replaces it" in refused.err
    assert forced.status == 0
    assert target.read_bytes() == HOLES


def test_a_file_that_appears_meanwhile_is_left_alone(
    cbtfs: Program, root: Path, out: Path, copying: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sampled(copy: ImageCopy) -> list[Extent]:
        (out / "a.raw").write_bytes(b"precious")
        return [Extent(0, BLOCK)]

    monkeypatch.setattr(ImageCopy, "sampled", sampled)
    result = cbtfs("restore", "web1/latest", "--to", str(out / "a.raw"))

    assert result.status == 1
    assert "it exists already" in result.err
    assert (out / "a.raw").read_bytes() == b"precious"


def test_a_link_to_a_file_is_followed(cbtfs: Program, root: Path, out: Path, copying: None) -> None:
    (out / "link").symlink_to("a.raw")

    assert cbtfs("restore", "web1/latest", "--to", str(out / "link")).status == 0

    assert (out / "link").is_symlink()
    assert (out / "a.raw").read_bytes() == HOLES


def test_all_disks_go_into_a_directory(
    cbtfs: Program, tmp_path: Path, out: Path, copying: None
) -> None:
    disks = {"xvda": HOLES, "xvdb": noise(BLOCK, seed=3)}
    add_point(tmp_path / "store", disks)

    alone = cbtfs("restore", "web1/latest", "--to", str(out / "a.raw"))
    told = cbtfs.json("restore", "web1/latest", "--to", str(out))
    named = cbtfs("restore", "web1/latest/xvdb", "--to", str(out / "b.raw"))

    assert alone.status == 2
    assert "xvda, xvdb" in alone.err
    assert isinstance(told["disks"], list)
    assert [disk["device"] for disk in told["disks"]] == ["xvda", "xvdb"]
    assert named.status == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        "xvda.raw": HOLES,
        "xvdb.raw": disks["xvdb"],
        "b.raw": disks["xvdb"],
    }


def test_a_directory_is_gone_on_with_too(
    cbtfs: Program, tmp_path: Path, out: Path, copying: None
) -> None:
    store, disks = tmp_path / "store", {"xvda": HOLES, "xvdb": noise(4 * BLOCK, seed=3)}
    add_point(store, disks)
    spoil(image_of(store, "xvdb"), 0)
    words = ["restore", "web1/latest", "--to", str(out)]

    first = cbtfs(*words)
    assert first.status == 3
    assert "xvdb.raw is damaged" in first.err
    assert [path.name for path in out.glob("*")] == ["xvda.raw"]

    spoil(image_of(store, "xvdb"), 0)
    told = cbtfs.json(*words)
    assert isinstance(told["disks"], list)
    assert [disk["bytes_written"] for disk in told["disks"]] == [0, 4 * BLOCK]
    assert (out / "xvdb.raw").read_bytes() == disks["xvdb"]

    for path, offset in ((out / "xvda.raw", 0), (out / "xvdb.raw", BLOCK)):
        before = path.read_bytes()
        spoil(path, offset)
        assert cbtfs(*words).status == 3
        assert path.read_bytes() != before
        spoil(path, offset)
    assert cbtfs(*words).status == 0


@pytest.mark.parametrize("where", ["a.raw", f"{VM}/a.raw", f"{VM}/{FIRST}/xvda.raw"])
def test_nothing_is_restored_into_the_store(
    cbtfs: Program, root: Path, tmp_path: Path, where: str
) -> None:
    (tmp_path / "alias").symlink_to(root)
    before = image_of(root).read_bytes()

    for place in (root, tmp_path / "alias"):
        result = cbtfs("restore", "web1/latest", "--to", str(place / where), "--force")
        assert result.status == 2
        assert "in the store itself" in result.err
    assert image_of(root).read_bytes() == before


@pytest.mark.parametrize(
    ("target", "status", "words"),
    [
        ("missing/a.raw", 1, "it does not exist"),
        ("pipe", 2, "neither a file nor a block device"),
        ("/dev/null", 2, "neither a file nor a block device"),
        ("a" * 300, 1, "too long"),
    ],
)
def test_targets_that_are_none(
    cbtfs: Program, root: Path, out: Path, target: str, status: int, words: str
) -> None:
    os.mkfifo(out / "pipe")

    result = cbtfs("restore", "web1/latest", "--to", str(out / target), "--force")

    assert result.status == status
    assert words in result.err


def test_long_names_have_partial_files_too(
    cbtfs: Program, root: Path, out: Path, copying: None
) -> None:
    assert cbtfs("restore", "web1/latest", "--to", str(out / ("a" * 255))).status == 0


def test_a_plan_changes_nothing(cbtfs: Program, root: Path, out: Path) -> None:
    told = cbtfs.json("restore", "web1/latest/xvda", "--to", str(out / "a.raw"), "-n")
    line = cbtfs("restore", "web1/latest/xvda", "--to", str(out / "a.raw"), "-n")

    assert told["source"] == str(image_of(root))
    assert told["target"] == str(out / "a.raw")
    assert told["how"] in {"copy", "reflink"}
    assert "to write" in line.out
    assert list(out.iterdir()) == []


def test_progress_is_told_as_sync_does(
    cbtfs: Program, root: Path, out: Path, copying: None
) -> None:
    result = cbtfs("restore", "web1/latest", "--to", str(out / "a.raw"), "--json-progress")

    events = [json.loads(line) for line in result.err.splitlines()]
    assert [event["event"] for event in events] == [
        "disk_started",
        "disk_started",
        "disk_finished",
    ]
    assert [e["method"] for e in events] == ["restore", "read back", "restore"]
    assert events[0]["total"] == 6 * units.MiB + 512


def test_a_disk_that_is_not_in_the_point_is_told(
    cbtfs: Program, tmp_path: Path, out: Path, copying: None
) -> None:
    add_point(tmp_path / "store", {"xvda": HOLES})
    path = tmp_path / "store" / VM / FIRST / "point.json"
    record = json.loads(path.read_text())
    record["failures"] = [{"device": "xvdb", "vdi_uuid": "v", "error": "lost"}]
    path.write_text(json.dumps(record))

    result = cbtfs("restore", "web1/latest", "--to", str(out))

    assert result.status == 0
    assert "xvdb is not in this point: lost" in result.err


# ── Damage ───────────────────────────────────────────────────────────────────────────────────


def test_a_damaged_image_is_refused_and_copied_if_forced(
    cbtfs: Program, root: Path, out: Path, copying: None
) -> None:
    spoil(image_of(root), 20 * BLOCK + 5)
    target = out / "a.raw"

    refused = cbtfs("restore", "web1/latest", "--to", str(target))
    assert refused.status == 4
    assert f"bytes {20 * BLOCK} to {21 * BLOCK} differ from their digests" in refused.err
    assert not target.exists()

    forced = cbtfs("restore", "web1/latest", "--to", str(target), "--force", "--verify", "full")
    assert forced.status == 0
    assert f"bytes {20 * BLOCK} to {21 * BLOCK} are not as they were backed up" in forced.err
    assert target.read_bytes() == image_of(root).read_bytes()

    quiet = cbtfs("-q", "restore", "web1/latest", "--to", str(target), "--force")
    assert quiet.err.count("are not as they were backed up") == 1


def test_damage_on_record_is_refused_before_anything_is_copied(
    cbtfs: Program, root: Path, out: Path, copying: None
) -> None:
    spoil(image_of(root), 20 * BLOCK)
    assert cbtfs("verify").status == 4

    assert cbtfs("restore", "web1/latest", "--to", str(out / "a.raw"), "-n").status == 4
    assert cbtfs("restore", "web1/latest", "--to", str(out / "a.raw")).status == 4

    assert list(out.iterdir()) == []

    spoil(image_of(root), 20 * BLOCK)  # right again, but for what no digest may tell
    forced = cbtfs("-q", "restore", "web1/latest", "--to", str(out / "a.raw"), "--force")
    assert forced.status == 0
    assert forced.err.endswith("is on record as damaged, and restored all the same\n")


def test_digests_that_changed_are_no_proof(
    cbtfs: Program, root: Path, out: Path, copying: None
) -> None:
    spoil(image_of(root).with_suffix(".b3"), 0)

    refused = cbtfs("restore", "web1/latest", "--to", str(out / "a.raw"))
    forced = cbtfs("restore", "web1/latest", "--to", str(out / "a.raw"), "--force")

    assert refused.status == 4
    assert "is not as committed" in refused.err
    assert forced.status == 0
    assert (out / "a.raw").read_bytes() == HOLES


def test_an_older_point_does_not_pass_for_the_latest(
    cbtfs: Program, root: Path, out: Path, copying: None
) -> None:
    add_point(root, {"xvda": HOLES}, time=SECOND)
    os.truncate(image_of(root, time=SECOND), len(HOLES) - 512)

    for text in ("web1/latest", "web1/latest/xvda"):
        result = cbtfs("restore", text, "--to", str(out / "a.raw"), "--force")
        assert result.status == 4
        assert f"{SECOND} is newer and damaged" in result.err
    assert cbtfs("restore", f"web1/{FIRST}", "--to", str(out / "a.raw")).status == 0


def test_an_image_that_became_shorter_is_refused_always(
    cbtfs: Program, root: Path, out: Path, copying: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = restorefile.check_target

    def shortening(path: Path, *, store: Path, wish: Wish) -> None:
        check(path, store=store, wish=wish)
        os.truncate(image_of(root), len(HOLES) - 512)

    monkeypatch.setattr(restorefile, "check_target", shortening)
    result = cbtfs("restore", "web1/latest", "--to", str(out / "a.raw"), "--force")

    assert result.status == 4
    assert "bytes instead of" in result.err


def test_blocks_that_cannot_be_read_become_zeros_if_forced(
    cbtfs: Program, root: Path, out: Path, copying: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv
    image = image_of(root).stat().st_ino

    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        bad = range(5 * BLOCK, 6 * BLOCK)
        overlaps = offset < bad.stop and offset + len(buffers[0]) > bad.start
        if overlaps and os.fstat(fd).st_ino == image:
            raise OSError(5, "")
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    refused = cbtfs("restore", "web1/latest", "--to", str(out / "a.raw"))
    forced = cbtfs("restore", "web1/latest", "--to", str(out / "a.raw"), "--force")

    assert refused.status == 4
    assert forced.status == 0
    expected = HOLES[: 5 * BLOCK] + bytes(BLOCK) + HOLES[6 * BLOCK :]
    assert (out / "a.raw").read_bytes() == expected


def test_what_reads_back_otherwise_is_no_restore(
    cbtfs: Program, root: Path, out: Path, copying: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = ImageCopy.check

    def spoiled(copy: ImageCopy, *arguments: object) -> list[Extent]:
        (partial,) = partials(out)
        spoil(partial, 7 * BLOCK)
        return check(copy, *arguments)  # type: ignore[arg-type]  # as they came

    monkeypatch.setattr(ImageCopy, "check", spoiled)
    words = ["restore", "web1/latest", "--to", str(out / "a.raw"), "--verify", "full"]
    result = cbtfs(*words)
    assert result.status == 1
    assert f"bytes {7 * BLOCK} to {8 * BLOCK} read back differently" in result.err
    assert not (out / "a.raw").exists()

    monkeypatch.setattr(ImageCopy, "check", check)
    told = cbtfs.json(*words)
    assert (told["resumed"], told["bytes_written"]) == (True, BLOCK)
    assert (out / "a.raw").read_bytes() == HOLES


# ── Going on ─────────────────────────────────────────────────────────────────────────────────


def test_what_is_there_is_not_copied_again(
    cbtfs: Program, root: Path, out: Path, copying: None
) -> None:
    with stores.open_store(root) as store:
        (disk,) = store.catalogue().resolve("web1/latest").point.disks
    with PartialFile.open(out / "a.raw", identity=disk.digest_root) as partial:
        os.pwrite(partial.fd, HOLES[: 2 * units.MiB], 0)
        os.pwrite(partial.fd, noise(BLOCK, seed=9), 4 * units.MiB)  # where there must be a hole

    told = cbtfs.json("restore", "web1/latest", "--to", str(out / "a.raw"), "--verify", "full")

    assert told["resumed"] is True
    assert told["bytes_written"] == 4 * units.MiB + 512
    assert (out / "a.raw").read_bytes() == HOLES


def test_what_was_to_be_another_point_is_begun_anew(
    cbtfs: Program, root: Path, out: Path, copying: None
) -> None:
    with PartialFile.open(out / "a.raw", identity="0123456789abcdef") as partial:
        os.pwrite(partial.fd, HOLES[: 2 * units.MiB], 0)
    other = out / ".b.raw.0123456789abcdef.cbtfs-partial"
    other.touch()

    told = cbtfs.json("restore", "web1/latest", "--to", str(out / "a.raw"))

    assert told["resumed"] is False
    assert partials(out) == [other]


@pytest.mark.parametrize("trick", ["link", "symlink", "readable"])
def test_a_partial_file_that_is_not_ours_is_not_written_to(
    cbtfs: Program, root: Path, out: Path, copying: None, trick: str
) -> None:
    with stores.open_store(root) as store:
        (disk,) = store.catalogue().resolve("web1/latest").point.disks
    victim = out / "victim"
    victim.write_bytes(b"precious")
    victim.chmod(0o600)
    partial = out / PartialFile.name_of(out / "a.raw", identity=disk.digest_root)
    if trick == "link":
        os.link(victim, partial)
    elif trick == "symlink":
        partial.symlink_to(victim)
    else:
        partial.touch()
        partial.chmod(0o666)

    result = cbtfs("restore", "web1/latest", "--to", str(out / "a.raw"))

    assert victim.read_bytes() == b"precious"
    assert (result.status == 0) == (trick != "symlink")
    if result.status == 0:
        assert (out / "a.raw").stat().st_mode & 0o777 == 0o600


def test_two_runs_do_not_write_one_file(
    cbtfs: Program, root: Path, out: Path, copying: None
) -> None:
    with stores.open_store(root) as store:
        (disk,) = store.catalogue().resolve("web1/latest").point.disks
    for identity in (disk.digest_root, "f" * 16):
        with PartialFile.open(out / "a.raw", identity=identity):
            result = cbtfs("restore", "web1/latest", "--to", str(out / "a.raw"))

        assert result.status == 11
        assert "is being restored by another run" in result.err


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_the_next_run_goes_on(
    tmp_path: Path, signum: int, status: int
) -> None:
    add_point(tmp_path / "store", {"xvda": noise(24 * units.MiB)})
    program = (
        "import os, signal, sys\n"
        "from cbtfs import imagecopy, sparse, __main__\n"
        "sparse.reflink = lambda source, target: False\n"
        "copy, pieces = imagecopy.ImageCopy._bring, []\n"
        "def counted(self, piece):\n"
        "    pieces.append(piece)\n"
        f"    if len(pieces) == 12: os.kill(os.getpid(), {int(signum)})\n"
        "    return copy(self, piece)\n"
        "imagecopy.ImageCopy._bring = counted\n"
        "__main__.main()\n"
    )
    words = ["--store", str(tmp_path / "store"), "--json", "restore", "web1/latest"]
    words += ["--to", str(tmp_path / "a.raw")]
    command = [sys.executable, "-c", program, *words]
    first = subprocess.run(command, check=False, capture_output=True, text=True)
    assert first.returncode == status, first.stderr
    assert "interrupted" in first.stderr
    assert "stays in" in first.stderr
    assert not (tmp_path / "a.raw").exists()

    code = program.replace("== 12", "== -1")
    second = subprocess.run(
        [sys.executable, "-c", code, *words], check=False, capture_output=True, text=True
    )

    assert second.returncode == 0, second.stderr
    assert json.loads(second.stdout)["resumed"] is True
    assert (tmp_path / "a.raw").read_bytes() == noise(24 * units.MiB)


def test_a_full_disk_is_told_early_or_gone_on_with(
    cbtfs: Program, root: Path, out: Path, copying: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = str(out / "a.raw")
    with monkeypatch.context() as context:
        context.setattr(PartialFile, "free_space", lambda self: units.MiB)
        early = cbtfs("restore", "web1/latest", "--to", target)
    assert early.status == 1
    assert "1 MiB free" in early.err
    assert partials(out) == []

    pwrite = os.pwrite
    with monkeypatch.context() as context:

        def full(fd: int, data: memoryview, offset: int) -> int:
            if offset > 8 * units.MiB:
                raise OSError(28, "")
            return pwrite(fd, data, offset)

        context.setattr(os, "pwrite", full)
        late = cbtfs("restore", "web1/latest", "--to", target)
    assert late.status == 1
    assert "no space left" in late.err
    assert "stays in" in late.err

    assert cbtfs.json("restore", "web1/latest", "--to", target)["resumed"] is True
    assert (out / "a.raw").read_bytes() == HOLES


# ── Killed ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with open_runner(tmp_path_factory.mktemp("kill") / "run") as opened:
        yield opened


@pytest.mark.parametrize("kind", ["copy", "reflink", "replace", "resume"])
def test_whatever_goes_wrong_the_next_run_finishes(
    runner: Runner, tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    place: Path = request.getfixturevalue("reflink_dir") if kind == "reflink" else tmp_path
    root, out = place / "store", place / "out"
    add_point(root, {"xvda": HOLES})
    store = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    words = ["--store", str(root), "restore", "web1/latest", "--to", str(out / "a.raw")]
    words += ["--force"] if kind == "replace" else []

    def prepare() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        if kind == "replace":
            (out / "a.raw").write_bytes(b"old")
        if kind == "resume":
            assert runner.run(words, root=out, mode="half", at=5, match="pwrite").killed

    prepare()
    points = list(points_of(runner.run(words, root=out).trace))
    for mode, at in points[random.Random(SEED).randrange(EVERY) :: EVERY]:
        prepare()

        done = runner.run(words, root=out, mode=mode, at=at)

        what = f"{kind}, {mode}, {at}, seed {SEED}: {done}"
        assert done.status in ({-9, 0} if mode in {"kill", "half"} else {0, 1}), what
        found = (out / "a.raw").read_bytes() if (out / "a.raw").exists() else b""
        assert found in ((HOLES, b"old") if kind == "replace" else (HOLES, b"")), what
        assert found == HOLES or done.status != 0, what
        if found != HOLES or kind == "replace":
            again = runner.run(words, root=out)
            assert again.status == 0, f"{what}\nthen {again.err}"
        assert (out / "a.raw").read_bytes() == HOLES, what
        assert [path.name for path in out.iterdir()] == ["a.raw"], what
    assert store == {path: path.read_bytes() for path in store}
    print(f"{kind}, seed {SEED}: {len(points)} points")  # noqa: T201 - shown with -s


def test_a_file_gets_its_name_when_it_is_on_disk(runner: Runner, root: Path, out: Path) -> None:
    words = ["--store", str(root), "restore", "web1/latest", "--to", str(out / "a.raw")]

    calls = [line.split()[1:] for line in runner.run(words, root=out).trace]

    partial = next(name for call, name in calls if call == "open")
    last_write = max(at for at, call in enumerate(calls) if call[0] in {"pwrite", "fallocate"})
    assert calls[last_write + 1 :][-3:] == [
        ["fsync", partial],
        ["renameat2", str(out)],
        ["fsync", str(out)],
    ]


@pytest.mark.parametrize("kind", powercut.KINDS)
def test_a_restored_file_survives_a_power_cut(
    cbtfs: Program, root: Path, tmp_path: Path, copying: None, kind: str
) -> None:
    place = tmp_path / "machine"
    place.mkdir()
    with powercut.machine(place, kind) as machine:
        target = machine.path / "a.raw"
        assert cbtfs("restore", "web1/latest", "--to", str(target)).status == 0

        machine.cut_power()

        assert target.read_bytes() == HOLES
        assert partials(machine.path) == []


def test_a_disk_that_is_really_full_is_told(
    cbtfs: Program, root: Path, tmp_path: Path, copying: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restorefile, "_check_space", lambda partial, source: None)
    place = tmp_path / "machine"
    place.mkdir()
    with powercut.machine(place, "ext4") as machine:
        machine.fill()
        filler = machine.path / "filler"
        os.truncate(filler, filler.stat().st_size - 2 * units.MiB)
        target = machine.path / "a.raw"
        full = cbtfs("restore", "web1/latest", "--to", str(target))
        assert full.status == 1
        assert "no space left on its file system; make room" in full.err
        filler.unlink()

        assert cbtfs.json("restore", "web1/latest", "--to", str(target))["resumed"] is True
        assert target.read_bytes() == HOLES


def points_of(trace: Sequence[str]) -> Iterator[tuple[Mode, int]]:
    """Yield what can go wrong with a run that has this trace."""
    for at, line in enumerate(trace, 1):
        yield "kill", at
        if line.split()[1] in WRITES:
            yield "half", at
        yield "eio", at
        yield "enospc", at


# ── Devices ──────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def loop_device(file: Path, *options: str) -> Generator[str]:
    """Yield a loop device of ``file``."""
    command = ["losetup", *options, "-f", "--show", str(file)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


def blank(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


@needs_loop
@pytest.mark.parametrize(
    ("more", "sector"), [(0, 512), (3 * units.MiB, 512), (3 * units.MiB - 512, 4096)]
)
def test_a_device_equals_the_image_and_beyond_it_nothing_changes(
    cbtfs: Program, root: Path, tmp_path: Path, more: int, sector: int
) -> None:
    disk = blank(tmp_path / "disk", len(HOLES) + more)
    with disk.open("r+b") as file:
        file.seek(4 * units.MiB)
        file.write(noise(BLOCK, seed=5))  # where the image has nothing
        if sector > 512:  # the end of the disk is none of a sector, and is made zero first
            file.seek(0)
            file.write(noise(BLOCK, seed=5))
            file.seek(len(HOLES) - BLOCK)
            file.write(noise(BLOCK, seed=5))
        file.seek(len(HOLES))
        file.write(noise(more // 2, seed=6))
    with loop_device(disk, "--sector-size", str(sector)) as device:
        words = ["restore", "web1/latest", "--to", device, "--verify", "full", "--force"]
        plan = cbtfs.json(*words, "-n")
        result = cbtfs("--json", *words)

    assert plan["how"] == "device"
    assert result.status == 0, result.err
    assert disk.read_bytes()[: len(HOLES)] == HOLES
    assert disk.read_bytes()[len(HOLES) :] == noise(more // 2, seed=6) + bytes(more - more // 2)
    assert ("larger than the disk" in result.err) == bool(more)
    assert result.document()["verified_bytes"] == len(HOLES)


@needs_loop
def test_a_device_that_holds_something_is_left_alone_unless_forced(
    cbtfs: Program, root: Path, tmp_path: Path
) -> None:
    content = noise(len(HOLES), seed=7)
    disk, rest = tmp_path / "disk", bytes(len(HOLES) - 1)
    for before in (
        b"x" + rest,
        rest + b"x",
        b"x" + rest[2 * units.MiB :] + HOLES[-2 * units.MiB :],
    ):
        disk.write_bytes(before)
        with loop_device(disk) as device:
            refused = cbtfs("restore", "web1/latest", "--to", device)
            assert refused.status == 2
            assert "is not empty" in refused.err
            assert cbtfs("restore", "web1/latest", "--to", device, "-n").status == 2
        assert disk.read_bytes() == before
    disk.write_bytes(content)
    with loop_device(disk) as device:
        told = cbtfs.json("restore", "web1/latest", "--to", device, "--force")

    assert disk.read_bytes() == HOLES
    assert told["resumed"] is False


@needs_loop
def test_of_a_device_only_what_differs_is_written(
    cbtfs: Program, root: Path, tmp_path: Path
) -> None:
    middle = 2 * units.MiB
    disk = tmp_path / "disk"
    disk.write_bytes(HOLES[:middle] + noise(BLOCK, seed=8) + HOLES[middle + BLOCK :])
    with loop_device(disk) as device:
        told = cbtfs.json("restore", "web1/latest", "--to", device, "--force")

    assert disk.read_bytes() == HOLES
    edges = 2 * units.MiB + BLOCK - (BLOCK - 512)  # zeroed first, and written last
    assert told["bytes_written"] == BLOCK + edges + BLOCK - 512 - (BLOCK - 512)
    assert told["resumed"] is True


@pytest.mark.parametrize("modes", [1, 0], ids=["zero range", "none"])
def test_a_device_that_cannot_discard_is_made_zero_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modes: int
) -> None:
    fallocate = sparse._fallocate

    def unable(fd: int, mode: int, offset: int, length: int) -> bool:
        punches = mode & 0x02
        return bool(modes and not punches) and fallocate(fd, mode, offset, length)

    monkeypatch.setattr(sparse, "_fallocate", unable)
    disk, size = tmp_path / "disk", 3 * units.MiB + 512
    for stop in (size, 4096, 512, units.MiB):
        disk.write_bytes(b"x" * size)
        with disk.open("r+b") as file:
            sparse.zero_out(file.fileno(), 0, stop)
        assert disk.read_bytes() == bytes(stop) + b"x" * (size - stop)


@pytest.mark.parametrize("is_device", [False, True])
def test_where_the_image_has_nothing_the_target_is_made_zero(
    tmp_path: Path, is_device: bool
) -> None:
    # more than a page of digests is of: 16 MiB
    content = noise(BLOCK) + bytes(40 * units.MiB) + noise(BLOCK, seed=2)
    target = tmp_path / "target"
    add_point(tmp_path / "store", {"xvda": content})
    target.write_bytes(b"x" * len(content))

    with copy_of(tmp_path / "store", target, is_device=is_device) as copy:
        copy.bring(Extent(0, len(content)), lambda read, written: None)
        copy.flush()
        wrong = copy.check(copy.everything(), lambda read, written: None)

    assert wrong == []
    assert target.read_bytes() == content
    assert allocated(target) < units.MiB


def test_what_differs_altogether_is_soon_not_read_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 64 * units.MiB
    content, target = noise(size), tmp_path / "target"
    add_point(tmp_path / "store", {"xvda": content})
    target.write_bytes(noise(size - 24 * units.MiB, seed=2) + content[-24 * units.MiB :])
    reads: list[int] = []
    read = sparse.Reader.read

    def counted(reader: sparse.Reader, *arguments: object) -> memoryview:
        reads.append(1)
        return read(reader, *arguments)  # type: ignore[arg-type]  # as they came

    monkeypatch.setattr(sparse.Reader, "read", counted)
    with copy_of(tmp_path / "store", target, is_device=True) as copy:
        copy.bring(Extent(0, size), lambda read, written: None)
        kept = copy.kept

    assert target.read_bytes() == content
    assert len(reads) < 48
    assert 8 * units.MiB <= kept <= 16 * units.MiB


@needs_loop
@pytest.mark.parametrize("before", ["middle", "tail", "head"])
def test_a_device_half_written_is_not_taken_for_a_disk_and_is_gone_on_with(
    cbtfs: Program, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    bring, calls = ImageCopy.bring, iter(["middle", "tail", "head"])

    def interrupted(copy: ImageCopy, where: Extent, *arguments: object) -> None:
        if next(calls) == before:
            raise errors.StoreError("stopped")
        bring(copy, where, *arguments)  # type: ignore[arg-type]  # as they came

    disk = tmp_path / "disk"
    disk.write_bytes(noise(len(HOLES), seed=10))
    with loop_device(disk) as device:
        monkeypatch.setattr(ImageCopy, "bring", interrupted)
        assert cbtfs("restore", "web1/latest", "--to", device, "--force").status == 1
        assert not any(disk.read_bytes()[: units.MiB])

        monkeypatch.setattr(ImageCopy, "bring", bring)
        told = cbtfs.json("restore", "web1/latest", "--to", device)

    assert disk.read_bytes() == HOLES
    assert told["resumed"] is (before != "middle")


@needs_loop
def test_of_damage_on_record_it_is_told_whatever_else_there_is_to_say_of_a_device(
    cbtfs: Program, tmp_path: Path, root: Path
) -> None:
    content = noise(9 * BLOCK + 512)  # no more than a first MiB
    add_point(root, {"xvda": content}, time="20261123T020000Z")
    image = image_of(root, time="20261123T020000Z")
    spoil(image, BLOCK)
    assert cbtfs("verify", "web1/latest").status == 4
    spoil(image, BLOCK)

    disk = blank(tmp_path / "disk", units.MiB)
    with loop_device(disk) as device:
        told = cbtfs("-q", "restore", "web1/latest", "--to", device, "--force", "--verify", "full")

    assert told.status == 0
    assert told.err.endswith("is on record as damaged, and restored all the same\n")
    assert "gone on with" not in told.out
    assert disk.read_bytes() == content + bytes(units.MiB - len(content))


@needs_loop
def test_a_device_is_gone_on_with_after_a_stop_within_its_last_mib_or_while_it_is_read_back(
    cbtfs: Program, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(copy: ImageCopy, *arguments: object) -> list[Extent]:
        raise errors.StoreError("stopped")

    disk = blank(tmp_path / "disk", len(HOLES))
    with disk.open("r+b") as file:
        file.seek(len(HOLES) - 512)
        file.write(HOLES[-512:])
    with loop_device(disk) as device:
        words = ["restore", "web1/latest", "--to", device]
        with monkeypatch.context() as patched:
            patched.setattr(ImageCopy, "check", stopped)
            assert cbtfs(*words).status == 1
        assert disk.read_bytes()[units.MiB :] == HOLES[units.MiB :]
        assert not any(disk.read_bytes()[: units.MiB])

        told = cbtfs.json(*words, "--verify", "full")

    assert disk.read_bytes() == HOLES
    assert (told["resumed"], told["verified_bytes"]) == (True, len(HOLES))


@needs_loop
def test_devices_that_will_not_do(cbtfs: Program, root: Path, tmp_path: Path) -> None:
    small = blank(tmp_path / "small", len(HOLES) - 512)
    with loop_device(small) as device:
        result = cbtfs("restore", "web1/latest", "--to", device, "--force")
        assert result.status == 2
        assert "too small" in result.err
    with loop_device(image_of(root)) as device:
        result = cbtfs("restore", "web1/latest", "--to", device, "--force")
        assert result.status == 2
        assert "which is in the store" in result.err
    with loop_device(blank(tmp_path / "ro", len(HOLES)), "-r") as device:
        result = cbtfs("restore", "web1/latest", "--to", device, "--force")
        assert result.status == 1
        assert "is read-only" in result.err


@needs_loop
def test_a_device_in_use_is_refused(cbtfs: Program, root: Path, tmp_path: Path) -> None:
    disk = blank(tmp_path / "disk", 32 * units.MiB)
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    with loop_device(disk) as device:
        subprocess.run(["mkfs.ext4", "-q", "-F", device], check=True)
        subprocess.run(["mount", device, mounted], check=True)
        try:
            result = cbtfs("restore", "web1/latest", "--to", device, "--force")
        finally:
            subprocess.run(["umount", mounted], check=True)
        assert result.status == 1
        assert f"is in use: mounted on {mounted}" in result.err

        holder = os.open(device, os.O_RDONLY | os.O_EXCL)
        try:
            result = cbtfs("restore", "web1/latest", "--to", device, "--force")
        finally:
            os.close(holder)
        assert result.status == 1
        assert "it is in use" in result.err
    assert disk.read_bytes() != bytes(len(disk.read_bytes()))


# ── Large disks, and what is on them ─────────────────────────────────────────────────────────


@pytest.mark.reflink
def test_of_a_disk_of_16_tib_only_what_is_stored_travels(
    capsys: pytest.CaptureFixture[str], reflink_dir: Path, copying: None
) -> None:
    size = 16 * units.TiB
    places = {0: noise(BLOCK), 9 * units.TiB: noise(BLOCK, seed=2), size - BLOCK: noise(BLOCK)}
    with (
        stores.open_store(reflink_dir / "store") as store,
        store.lock(VM),
        store.stage(VM, time=FIRST) as stage,
    ):
        stage.record(intent(FIRST))
        image = stage.new_image("xvda.raw", size=size)
        for offset, content in places.items():
            image.write(offset, content)
        disk = disk_point(size, image.finish())
        stage.commit(Point(time=FIRST, vm_uuid=VM, vm_name="web1", disks=(disk,)))
    with untouched_process():
        cbtfs = Program(capsys, "--store", str(reflink_dir / "store"))
        told = cbtfs.json(
            "restore", "web1/latest", "--to", str(reflink_dir / "a.raw"), "--verify", "full"
        )

    assert told["bytes_written"] == 3 * BLOCK
    assert told["verified_bytes"] == size
    target = reflink_dir / "a.raw"
    assert target.stat().st_size == size
    assert allocated(target) < units.MiB
    with target.open("rb") as file:
        for offset, content in places.items():
            file.seek(offset)
            assert file.read(BLOCK) == content


@pytest.fixture(scope="module")
def scenario(started: RunningPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the disks of the simulated pool's web1 and db1, out of a store of theirs."""
    place = tmp_path_factory.mktemp("scenario")
    shell = Shell(started, place / "store")
    for vm in ("web1", "db1"):
        shell.sync(vm)
        (place / vm).mkdir()
        told = shell.json("restore", f"{vm}/latest", "--to", str(place / vm))
        for disk in items(told, "disks"):
            image = shell.image(vm, str(disk["device"]))
            compare = ["qemu-img", "compare", "-f", "raw", "-F", "raw", str(image)]
            subprocess.run([*compare, str(disk["target"])], check=True, capture_output=True)
    return place


def served(image: Path, part: Path, *options: str) -> Path:
    """Have nbdkit serve a part of a disk, and copy that into ``part``."""
    copy = f'nbdcopy "$uri" {shlex.quote(str(part))}'
    subprocess.run(["nbdkit", "-r", "-U", "-", "file", image, *options, "--run", copy], check=True)
    return part


def test_nbdkit_serves_partitions_that_are_whole(scenario: Path, tmp_path: Path) -> None:
    for device, files in (
        ("xvda", default_scenario.web1_files(2)),
        ("xvdb", default_scenario.web1_data_files()),
    ):
        image = scenario / "web1" / f"{device}.raw"
        part = served(image, tmp_path / device, "--filter=partition", "partition=1")
        check_files(part, files, tmp_path / f"{device}-files")


@pytest.mark.parametrize("volume", default_scenario.VOLUMES, ids=lambda volume: volume.name)
def test_nbdkit_serves_volumes_that_are_whole(
    scenario: Path, tmp_path: Path, volume: LogicalVolume
) -> None:
    image = scenario / "db1" / "xvda.raw"
    subprocess.run(["pvck", "--dump", "headers", image], check=True, capture_output=True)
    where = (f"offset={volume.offset}", f"range={volume.size}")

    part = served(image, tmp_path / "part", "--filter=offset", *where)

    check_files(part, default_scenario.db1_files(volume.name), tmp_path / "files")


@needs_loop
def test_a_restored_disk_can_be_checked_and_mounted(scenario: Path, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    with partitioned(scenario / "web1" / "xvda.raw") as device:
        subprocess.run(["fsck.ext4", "-n", "-f", f"{device}p1"], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "ro,noload", f"{device}p1", inside], check=True)
        try:
            check = ["sha256sum", "--quiet", "-c", "SHA256SUMS"]
            subprocess.run(check, cwd=inside, check=True)
        finally:
            subprocess.run(["umount", inside], check=True)


# ── The copy by itself ───────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def copy_of(root: Path, target: Path, *, is_device: bool) -> Generator[ImageCopy]:
    """Begin a copy of the only disk of a store into a file, which may pass for a device."""
    with stores.open_store(root) as store:
        reference = store.catalogue().resolve("web1/latest")
        (disk,) = reference.point.disks
        with (
            store.image_files(reference, disk) as files,
            imagecopy.opened(files, size=disk.size, root=disk.digest_root) as source,
            target.open("r+b") as file,
            ImageCopy(source, file.fileno(), path=target, is_device=is_device) as copy,
        ):
            yield copy


CONTENTS = st.lists(st.sampled_from([b"", b"a", b"b", b"c"]), max_size=24)


@settings(max_examples=30, deadline=None)
@given(
    image=CONTENTS, target=CONTENTS, tail=st.sampled_from([0, 512, 4096]), is_device=st.booleans()
)
def test_whatever_the_target_holds_it_becomes_the_image(
    tmp_path_factory: pytest.TempPathFactory,
    image: list[bytes],
    target: list[bytes],
    tail: int,
    is_device: bool,
) -> None:
    def content(blocks: list[bytes]) -> bytes:
        whole = b"".join((block or b"\0") * BLOCK for block in blocks)
        return whole + (b"t" * tail if whole else b"")

    place = tmp_path_factory.mktemp("copy")
    wanted = content(image)
    add_point(place / "store", {"xvda": wanted})
    (place / "target").write_bytes((content(target) + bytes(len(wanted)))[: len(wanted)])
    with copy_of(place / "store", place / "target", is_device=is_device) as copy:
        copy.bring(Extent(0, len(wanted)), lambda read, written: None)
        copy.flush()
        wrong = copy.check(copy.everything(), lambda read, written: None)
    assert wrong == []
    assert (place / "target").read_bytes() == wanted
    shutil.rmtree(place)
