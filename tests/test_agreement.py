"""``verify --against-pool``: images that are not as the pool has them, through the real command."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import blake3
import pytest

from cbtfs import damage, digests, errors, extents, store as stores, units
from cbtfs.damage import Disagreement
from cbtfs.extents import Extent
from cbtfs.folder import Folder
from cbtfs.store import Store

from . import bigdisks
from .commands import Shell, guest_content, items, leftovers
from .faulted import bytes_served
from .program import Program, untouched_process
from .smallvm import QUICKLY, Small, running_small, tidied
from .test_store import spoil

pytestmark = pytest.mark.timeout(120)

BLOCK = units.CBT_BLOCK
SIZES = (4 * units.MiB, 2 * units.MiB)
LARGE = int(os.environ.get("CBTFS_GIB", "256")) * units.GiB
"""Size of a large disk; that of 16 TiB takes half a minute: its array of digests has 4 GiB."""

FILLED = range(32)
"""Blocks of the first disk that hold data; the second has none. What was written once is never
comparable again with the point that most tests share, so each has blocks of its own."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    """A pool with the running VM ``v``."""
    with running_small(tmp_path_factory.mktemp("pool"), sizes=SIZES) as made:
        made.pool.set("vdi.data_destroy_wait", QUICKLY)
        write(made, *FILLED)
        yield made


@pytest.fixture(autouse=True)
def tidy(small: Small) -> Iterator[None]:
    """Whatever happens, nothing that was made for reading stays in the pool."""
    with tidied(small):
        yield


@pytest.fixture(scope="module")
def seeded(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A store with one point of ``v``."""
    made = Shell(small.pool, tmp_path_factory.mktemp("seeded") / "store")
    made.sync("v")
    return made


@pytest.fixture
def shell(small: Small, seeded: Shell, tmp_path: Path) -> Shell:
    """A copy of that store for a test that makes no other point: the base is that of all copies."""
    shutil.copytree(seeded.store, tmp_path / "store", symlinks=True)
    return Shell(small.pool, tmp_path / "store")


@pytest.fixture
def cbtfs(
    capsys: pytest.CaptureFixture[str], shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Program]:
    """The command in this process."""
    with program(capsys, shell, monkeypatch) as made:
        yield made


@pytest.fixture
def own(small: Small, tmp_path: Path) -> Shell:
    """An empty store."""
    return Shell(small.pool, tmp_path / "own")


@pytest.fixture
def syncing(
    capsys: pytest.CaptureFixture[str], own: Shell, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Program]:
    """The command for that store, after a first sync."""
    with program(capsys, own, monkeypatch) as made:
        assert made("-q", "sync", "--vm", "v").status == 0
        yield made


@contextlib.contextmanager
def program(
    capsys: pytest.CaptureFixture[str], shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Program]:
    monkeypatch.setenv("XDG_STATE_HOME", str(shell.store.parent / "state"))
    with untouched_process():
        yield Program(capsys, *shell.command()[3:])


def write(small: Small, *blocks: int) -> None:
    """Let the guest write random data into its first disk."""
    guest = small.pool.open_guest("v", "xvda")
    for block in blocks:
        guest.pwrite(random.randbytes(BLOCK), block * BLOCK)
    guest.shutdown()


def forge(shell: Shell, *blocks: int, data: bytes = b"wrong", device: str = "xvda") -> None:
    """Make an image wrong in such a way that only the pool can tell: digests and root fit."""
    image = shell.image("v", device)
    array = image.with_suffix(".b3")
    for block in blocks:
        with image.open("r+b") as file, array.open("r+b") as entries:
            file.seek(block * BLOCK)
            file.write(data.ljust(BLOCK, b"\0"))
            entries.seek(block * digests.LENGTH)
            entries.write(digests.of_block(memoryview(data.ljust(BLOCK, b"\0"))))
    record = image.with_name("point.json")
    told = json.loads(record.read_bytes())
    (disk,) = (disk for disk in told["disks"] if disk["device"] == device)
    disk["digest_root"] = blake3.blake3(array.read_bytes()).hexdigest()
    record.write_text(json.dumps(told))


def pool_of(document: dict[str, object], device: str = "xvda") -> dict[str, object]:
    """Return what a document says of a disk and the pool."""
    found = [
        disk["pool"]
        for point in items(document, "points")
        for disk in items(point, "disks")
        if disk["device"] == device
    ]
    assert isinstance(found[-1], dict)
    return found[-1]


def blocks_in(found: object) -> set[int]:
    """Return the numbers of the blocks in a list of extents."""
    assert isinstance(found, list)
    return {block for start, stop in found for block in range(start // BLOCK, stop // BLOCK)}


def recorded(shell: Shell) -> object:
    """Return where the first disk is on record as not as in the pool."""
    record = shell.image("v", "xvda").with_name("damaged.json")
    return json.loads(record.read_bytes())["disks"]["xvda"]["pool"]["extents"]


# ── what is compared ──


def test_what_did_not_change_is_read_and_is_as_in_the_pool(small: Small, cbtfs: Program) -> None:
    write(small, 1, 40)

    found = cbtfs.json("verify", "--against-pool")

    told = pool_of(found)
    assert told["state"] == "equal"
    assert told["with"] == "what did not change since"
    # the 4 MiB that the disk has allocated, less what was written since
    assert told["compared"] == told["comparable"] == SIZES[0] - 2 * BLOCK
    assert pool_of(found, "xvdb")["comparable"] == 0
    out = cbtfs("verify", "--against-pool").out
    assert "xvda  as in the pool, 3" in out
    assert "xvdb  as in the pool, nothing had to be read (no data known in what" in out


def test_a_wrong_block_is_named_and_the_next_sync_ends_with_a_whole_image(
    small: Small, own: Shell, syncing: Program, tmp_path: Path
) -> None:
    cbtfs, shell = syncing, own
    write(small, 1)
    assert cbtfs("sync", "--vm", "v").status == 0
    first, second = sorted(p.name for p in shell.store.glob("*/2*Z"))
    forge(shell, 2, 21)

    assert cbtfs("verify").status == 0
    result = cbtfs("verify", "--against-pool")

    assert result.status == 4
    lines = result.out.splitlines()
    assert any("xvda  NOT AS IN THE POOL: 2 blocks differ, " in line for line in lines)
    assert f"  not as in the pool: bytes {2 * BLOCK} to {3 * BLOCK}" in lines
    assert f"  not as in the pool: bytes {21 * BLOCK} to {22 * BLOCK}" in lines
    assert "  the next cbtfs sync compares the whole disk" in lines
    assert cbtfs("list").out.count("damaged: xvda") == 1

    planned = cbtfs("--json", "sync", "--vm", "v", "-n").document()
    done = cbtfs("--json", "sync", "--vm", "v").document()
    (vm,) = items(done, "vms")
    disks = {str(disk["device"]): disk for disk in items(vm, "disks")}
    assert "base-damaged" in json.dumps(planned)
    assert (disks["xvda"]["method"], disks["xvda"]["reason"]) == ("compare", "base-damaged")
    assert (disks["xvda"]["base"], second in str(disks["xvda"]["detail"])) == (first, True)
    assert disks["xvdb"]["method"] == "incremental"
    guest = guest_content(small.pool, "v", "xvda", tmp_path / "guest")
    assert shell.image("v", "xvda").read_bytes() == guest
    assert cbtfs("verify", "--against-pool").status == 0


def test_only_what_proves_it_clears_the_record(small: Small, shell: Shell, cbtfs: Program) -> None:
    image = shell.image("v", "xvda").read_bytes()
    forge(shell, 6, 7)
    assert cbtfs("verify", "--against-pool").status == 4
    for block in (6, 7):
        forge(shell, block, data=image[block * BLOCK : (block + 1) * BLOCK])

    plain = cbtfs("verify", "v/latest/xvda")
    assert plain.status == 4
    assert "but 2 blocks were not as in the pool when compared" in plain.out
    assert cbtfs("verify", "--repair").status == 4
    assert cbtfs("verify", "--against-pool", "--sample", "90%").status == 4
    assert recorded(shell) == [[6 * BLOCK, 8 * BLOCK]]
    assert cbtfs("verify", "--against-pool").status == 0
    assert not shell.image("v", "xvda").with_name("damaged.json").exists()

    forge(shell, 7)
    assert cbtfs("verify", "--against-pool").status == 4
    right = image[7 * BLOCK : 8 * BLOCK]
    forge(shell, 7, data=right)
    guest = small.pool.open_guest("v", "xvda")
    guest.pwrite(right, 7 * BLOCK)
    guest.shutdown()  # what changed cannot be compared: of that block nothing is known now
    assert cbtfs("verify", "--against-pool").status == 4
    assert recorded(shell) == [[7 * BLOCK, 8 * BLOCK]]


def test_lies_of_the_change_tracking_are_found(small: Small, cbtfs: Program) -> None:
    write(small, 10, 12, 13)
    small.pool.set("cbt.drop_bits", str(SIZES[0] // BLOCK))

    result = cbtfs("--json", "verify", "--against-pool")

    assert result.status == 4
    told = pool_of(result.document())
    # with what other tests wrote
    assert {10, 12, 13} <= blocks_in(told["extents"])


def test_zeros_are_not_called_equal_if_the_pool_cannot_tell_what_holds_data(
    small: Small, shell: Shell, cbtfs: Program
) -> None:
    forge(shell, 6, data=b"")
    small.pool.set("xapi.fail", "export_raw_vdi:INTERNAL_ERROR:sick")

    result = cbtfs("verify", "--against-pool")

    assert result.status == 0
    (line,) = (line for line in result.out.splitlines() if "xvda  as in the pool" in line)
    assert "blocks left out that are zeros in the image: the pool cannot tell" in line
    assert "xvdb  cannot be compared with the pool: the image has no data to compare" in result.out
    small.pool.set("xapi.fail", "")
    assert cbtfs("verify", "--against-pool").status == 4


def test_what_differs_is_told_also_of_an_image_that_cannot_be_read(
    small: Small, shell: Shell, cbtfs: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> NoReturn:
        raise errors.StoreError("you may not")

    forge(shell, 6, data=b"")
    monkeypatch.setattr(Store, "verify", refused)

    result = cbtfs("verify", "--against-pool")

    assert result.status == 4
    assert "v/xvda  NOT AS IN THE POOL: 1 blocks differ" in re.sub(r"\d{8}T\d{6}Z/", "", result.out)


def test_what_a_guest_discards_is_counted_apart(small: Small, cbtfs: Program) -> None:
    guest = small.pool.open_guest("v", "xvda")
    guest.trim(BLOCK, 15 * BLOCK)
    guest.shutdown()

    result = cbtfs("verify", "--against-pool")
    write(small, 15)

    assert result.status == 4
    assert "1 blocks differ, 1 of them are zeros in the pool now" in result.out


def test_a_sample_says_how_much_it_was(shell: Shell, cbtfs: Program) -> None:
    forge(shell, *range(16))

    result = cbtfs("--json", "verify", "--against-pool", "--sample", "30%")

    told = pool_of(result.document())
    compared, comparable = int(str(told["compared"])), int(str(told["comparable"]))
    assert compared == -(-comparable // BLOCK * 3 // 10) * BLOCK
    assert told["sampled"] is True
    assert 0 < int(str(told["blocks"])) <= compared // BLOCK
    assert result.status == 4


@contextlib.contextmanager
def halted(small: Small) -> Iterator[None]:
    small.api.call("VM.hard_shutdown", small.vm)
    try:
        yield
    finally:
        small.api.call("VM.start", small.vm, False, False)


def test_the_disks_of_a_halted_vm_are_read_themselves(
    small: Small, shell: Shell, cbtfs: Program
) -> None:
    forge(shell, 17)
    write(small, 18)
    with halted(small):
        small.pool.set("xapi.fail", "VDI.snapshot:INTERNAL_ERROR:none is needed")
        result = cbtfs("--json", "verify", "--against-pool")

    assert result.status == 4
    assert pool_of(result.document())["extents"] == [[17 * BLOCK, 18 * BLOCK]]


def test_a_snapshot_that_kept_its_data_is_compared_whole(
    small: Small, own: Shell, syncing: Program
) -> None:
    cbtfs, shell = syncing, own
    small.pool.set("sr.fail", "VDI.data_destroy:SR_BACKEND_FAILURE_46:x")
    assert cbtfs("-q", "sync", "--vm", "v").status == 0
    small.pool.set("sr.fail", "")
    write(small, *FILLED)

    equal = pool_of(cbtfs.json("verify", "--against-pool"))
    key = small.api.text("VM.get_uuid", small.vm)
    with stores.open_store(shell.store) as store, store.lock(key):
        at_work = cbtfs("verify", "--against-pool")
    forge(shell, 20)
    differs = cbtfs("--json", "verify", "--against-pool", "v/latest")

    assert (equal["state"], equal["with"]) == ("equal", "its snapshot")
    assert at_work.status == 1
    assert at_work.out.count("cannot be compared with the pool: ") == 2
    assert "is locked by process" in at_work.out
    assert int(str(equal["comparable"])) >= len(FILLED) * BLOCK
    assert differs.status == 4
    assert pool_of(differs.document())["extents"] == [[20 * BLOCK, 21 * BLOCK]]
    assert cbtfs("-q", "sync", "--vm", "v").status == 0  # which removes that snapshot


# ── what cannot be compared ──


def test_a_point_without_base_is_told_and_fails_only_if_nothing_else_was_named(
    syncing: Program,
) -> None:
    cbtfs = syncing
    assert cbtfs("-q", "sync", "--vm", "v").status == 0

    alone = cbtfs("verify", "--against-pool", "v/latest~1")
    both = cbtfs("verify", "--against-pool", "v/latest~1", "v/latest")
    unnamed = cbtfs("verify", "--against-pool")

    why = "cannot be compared with the pool: the pool no longer has its snapshot"
    assert alone.status == 1
    assert alone.out.count(why) == 2
    assert "nothing that was named can be compared" in alone.err
    assert (both.status, unnamed.status) == (0, 0)
    assert both.out.count(why) == 2
    assert why not in unnamed.out


def test_a_disk_that_is_gone_is_told(small: Small, syncing: Program) -> None:
    third = small.add_disk("v 2", 2)
    assert syncing("-q", "sync", "--vm", "v").status == 0
    small.detach(third)
    small.api.call("VDI.destroy", third)

    result = syncing("verify", "--against-pool")
    named = syncing("verify", "--against-pool", "v/latest/xvdc")

    assert result.status == 0
    assert "xvdc  cannot be compared with the pool: VDI " in result.out
    assert result.out.count("  as in the pool") == 2
    assert named.status == 1


def test_it_is_an_error_if_nothing_at_all_can_be_compared(
    small: Small, shell: Shell, cbtfs: Program
) -> None:
    small.pool.set("xapi.fail", "VDI.list_changed_blocks:SR_BACKEND_FAILURE_460:x")
    untold = cbtfs("verify", "--against-pool")
    small.pool.set("xapi.fail", "")
    record = shell.image("v", "xvda").with_name("point.json")
    other = {"pool_uuid": "11111111-2222-4333-8444-555555555555"}
    record.write_text(json.dumps(json.loads(record.read_bytes()) | other))
    elsewhere = cbtfs("-q", "--json", "verify", "--against-pool")

    why = "no disk of the store can be compared with the pool; see why at each of them"
    assert (untold.status, elsewhere.status) == (1, 1)
    assert why in untold.err
    assert why in elsewhere.err
    assert untold.out.count("cannot be compared with the pool: ") == 2
    assert "another pool" in str(pool_of(elsewhere.document())["why"])


def test_a_disk_that_changed_altogether_proves_nothing(
    small: Small, syncing: Program, own: Shell
) -> None:
    third = small.add_disk("v 3", 2, size=SIZES[1])
    assert syncing("-q", "sync", "--vm", "v").status == 0
    forge(own, 2, 5, device="xvdc")
    guest = small.pool.open_guest("v", "xvdc")
    guest.pwrite(random.randbytes(SIZES[1]), 0)
    guest.shutdown()

    result = syncing("--json", "verify", "--against-pool")
    named = syncing("verify", "--against-pool", "v/latest/xvdc")
    small.detach(third)
    small.api.call("VDI.destroy", third)

    assert (result.status, named.status) == (0, 1)
    why = "all of it has changed since"
    assert pool_of(result.document(), "xvdc") == {"state": "not-comparable", "why": why}
    assert f"xvdc  cannot be compared with the pool: {why}" in named.out


def test_damage_that_is_seen_counts_though_the_image_was_found_whole(
    shell: Shell, cbtfs: Program
) -> None:
    assert cbtfs("verify").status == 0
    spoil(shell.image("v", "xvda").with_suffix(".b3"), 5)

    result = cbtfs("verify", "--older-than", "30d", "--against-pool")

    assert result.status == 4
    assert "xvda  DAMAGED: " in result.out
    assert "xvda  cannot be compared with the pool: its digests are damaged" in result.out
    assert "xvdb  as in the pool" in result.out
    assert "1 disks left out" in result.err
    assert "damaged: xvda" in cbtfs("list").out


def test_repair_is_another_matter(cbtfs: Program) -> None:
    result = cbtfs("verify", "--against-pool", "--repair")

    assert result.status == 2
    assert "the next cbtfs sync compares the whole disk" in result.err


# ── what goes wrong ──


def test_one_disk_that_fails_does_not_keep_the_others_from_it(small: Small, cbtfs: Program) -> None:
    small.pool.set("xapi.fail", "VDI.snapshot*1:SR_BACKEND_FAILURE_44:no space")

    result = cbtfs("verify", "--against-pool")

    assert result.status == 3
    assert "SR_BACKEND_FAILURE_44" in result.err
    assert "xvda  not compared with the pool, see the error" in result.out
    assert "xvdb  as in the pool" in result.out


def test_a_pool_without_nbd_is_an_error_and_images_are_verified_all_the_same(
    small: Small, cbtfs: Program
) -> None:
    networks = small.api.records("network").items()
    (network,) = (ref for ref, record in networks if record["purpose"] == ["nbd"])
    small.api.call("network.remove_purpose", network, "nbd")
    try:
        result = cbtfs("-q", "verify", "--against-pool")
    finally:
        small.api.call("network.add_purpose", network, "nbd")

    assert result.status == 1
    assert result.err.count("no network of the pool has the purpose nbd") == 2
    assert result.out.count("  ok, ") == 2


def test_cut_connections_are_made_anew(small: Small, cbtfs: Program) -> None:
    small.pool.set("nbd.drop_after", "100K")
    small.pool.set("nbd.drop_count", "1")

    assert cbtfs("verify", "--against-pool").status == 0


@contextlib.contextmanager
def reading(small: Small, shell: Shell) -> Iterator[subprocess.Popen[str]]:
    """Run a comparison that is reading a disk, slowly."""
    small.pool.set("nbd.delay", "1s")
    command = shell.command("verify", "--against-pool")
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=shell.env()) as running:
        until = time.monotonic() + 60
        while not leftovers(small.pool).dom0_vbds and time.monotonic() < until:
            time.sleep(0.02)
        yield running


@pytest.mark.usefixtures("cbtfs")
def test_an_interrupted_one_leaves_nothing(small: Small, shell: Shell) -> None:
    with reading(small, shell) as running:
        assert len(leftovers(small.pool).snapshots) == 1
        running.send_signal(signal.SIGINT)
        small.pool.set("nbd.delay", "")
        _, said = running.communicate(timeout=60)

    assert running.returncode == 130, said
    assert leftovers(small.pool).snapshots == []


def test_clean_removes_what_a_killed_one_left(small: Small, shell: Shell, cbtfs: Program) -> None:
    with reading(small, shell) as running:
        running.kill()
        small.pool.set("nbd.delay", "")
        running.communicate(timeout=60)
    assert len(leftovers(small.pool).snapshots) == 1

    assert cbtfs("clean").status == 0
    assert leftovers(small.pool).snapshots == []


def test_a_sync_meanwhile_is_not_disturbed(small: Small, own: Shell, syncing: Program) -> None:
    with reading(small, own) as running:
        small.pool.set("nbd.delay", "")
        synced = syncing("--json", "sync", "--vm", "v")
        out, said = running.communicate(timeout=60)

    assert synced.status == 0
    assert "incremental" in synced.out
    # of the disk that was not begun, the base is gone
    assert running.returncode == 0, said
    assert "xvda  as in the pool" in out


def test_what_is_destroyed_while_it_is_read_proves_nothing(
    small: Small, shell: Shell, cbtfs: Program
) -> None:
    with reading(small, shell) as running:
        for vbd in leftovers(small.pool).dom0_vbds:
            vdi = small.api.text("VBD.get_VDI", vbd)
            small.api.call("VBD.unplug", vbd)
            small.api.call("VBD.destroy", vbd)
            small.api.call("VDI.destroy", vdi)
        small.pool.set("nbd.delay", "")
        _, said = running.communicate(timeout=60)

    assert running.returncode == 3
    assert "was removed from the pool while it was read; run the command again" in said
    assert not shell.image("v", "xvda").with_name("damaged.json").exists()


# ── the record ──


READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" || exit 99; exec "$@"'


@pytest.mark.usefixtures("cbtfs")
def test_what_cannot_be_put_on_record_is_told_and_promises_nothing(shell: Shell) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare(1)")
    forge(shell, 50)  # nobody writes there
    verify = shell.command("-q", "verify", "--against-pool", "v/latest/xvda")
    command = ["unshare", "-r", "-m", "sh", "-c", READ_ONLY, str(shell.store), *verify]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=shell.env())
    if done.returncode == 99 or done.stderr.startswith("unshare:"):
        pytest.skip(f"needs a mount namespace: {done.stderr}")

    assert done.returncode == 4
    assert f"not as in the pool: bytes {50 * BLOCK} to {51 * BLOCK}" in done.stdout
    assert "the next cbtfs sync compares" not in done.stdout
    assert "the result for xvda is not on record: " in done.stderr


@pytest.fixture
def point(tmp_path: Path) -> Iterator[Folder]:
    (tmp_path / "point").mkdir()
    with Folder.open(tmp_path / "point") as folder:
        yield folder


def put(point: Folder, found: Disagreement, *, beyond_reach: tuple[Extent, ...] = ()) -> None:
    damage.record_pool(
        point, "xvda", found, now="then",
        unproven=lambda recorded: extents.common(recorded, beyond_reach),
    )  # fmt: skip


def extents_of(*blocks: int) -> tuple[Extent, ...]:
    return tuple(extents.merge(Extent(b * BLOCK, (b + 1) * BLOCK) for b in blocks))


def test_a_record_without_the_pool_is_read_and_kept(point: Folder) -> None:
    old = {"xvda": {"found": "long ago", "problem": "", "blocks": 1, "extents": [[0, BLOCK]]}}
    point.write("damaged.json", json.dumps({"disks": old, "schema": 1}).encode())

    assert damage.recorded(point) == {"xvda"}
    put(point, Disagreement(2, 1, extents_of(4, 5)))
    assert damage.by_pool(point)["xvda"].blocks == 2
    damage.record(point, "xvda", damage.Damage(), now="then")
    assert damage.recorded(point) == {"xvda"}
    put(point, Disagreement())
    assert not point.exists("damaged.json")


def test_what_was_not_compared_stays_on_record(point: Folder) -> None:
    put(point, Disagreement(3, 0, extents_of(1, 2, 7)))
    put(point, Disagreement(1, 0, extents_of(9), sampled=True))
    assert damage.by_pool(point)["xvda"].blocks == 4

    put(point, Disagreement(1, 1, extents_of(3)), beyond_reach=extents_of(2, 3, 4))
    told = damage.by_pool(point)["xvda"]
    assert told.extents == tuple(tuple(e) for e in extents_of(2, 3))
    assert (told.blocks, told.zeros) == (2, 1)
    put(point, Disagreement(), beyond_reach=extents_of(3))
    assert damage.by_pool(point)["xvda"].blocks == 1


def test_blocks_that_are_not_named_go_only_if_everything_was_compared(point: Folder) -> None:
    put(point, Disagreement(5000, 0, extents_of(*range(0, 2000, 2))))

    put(point, Disagreement(), beyond_reach=extents_of(9))
    assert damage.by_pool(point)["xvda"].blocks == 4000
    put(point, Disagreement())
    assert damage.recorded(point) == frozenset()


# ── large disks ──


@pytest.mark.reflink
def test_large_disks_cost_what_holds_data(tmp_path: Path, reflink_dir: Path) -> None:
    size, rng = LARGE, random.Random(1)
    with bigdisks.running(tmp_path / "pool", {"big": size}) as pool:
        shell = Shell(pool, reflink_dir / "store")  # where files can be so large
        bigdisks.seed(shell, "big")
        bigdisks.write_scattered(pool, "big", size=size, blocks=40, rng=rng)
        bigdisks.sync(shell, "big")
        bigdisks.write_scattered(pool, "big", size=size, blocks=3, rng=rng)
        pool.control("reset-counters")

        verified, memory = measured(shell, "verify", "--against-pool", "--sample", "50%")
        told = pool_of(verified)
        differs, more = measured(shell, "diff", "big/latest", "big/now")

        compared, comparable = int(str(told["compared"])), int(str(told["comparable"]))
        # a VHD allocates 2 MiB at a time, and what has a QCOW2 allocated is not told
        assert told["state"] == "equal"
        assert 40 * BLOCK <= comparable <= 43 * 2 * units.MiB
        assert compared == -(-comparable // BLOCK // 2) * BLOCK
        (disk,) = items(differs, "disks")
        assert disk["changed"] == 3 * BLOCK
        # with what is sent of a VHD until its table of blocks has come
        assert bytes_served(pool) <= compared + 3 * BLOCK + 16 * units.MiB
        assert max(memory, more) < 256 * units.MiB, (memory, more)


def measured(shell: Shell, *arguments: str) -> tuple[dict[str, object], int]:
    """Run a command; return its document, and the most memory that it had, in bytes."""
    timed = ["/usr/bin/time", "-q", "-f", "%M", *shell.command("-q", "--json", *arguments)]
    done = subprocess.run(timed, check=True, capture_output=True, text=True, env=shell.env())
    document: dict[str, object] = json.loads(done.stdout)
    return document, int(done.stderr.split()[-1]) * units.KiB
