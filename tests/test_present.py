"""``diff POINT VM/now``: what changed on live disks, through the real command."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cbtfs import units

from .commands import Shell, guest_content, items
from .program import Program, untouched_process
from .smallvm import QUICKLY, Small, running_small, tidied
from .test_diff import naive
from .test_restore_pool import blocks, content, halted, patch
from .test_store import spoil

pytestmark = pytest.mark.timeout(120)

BLOCK = units.CBT_BLOCK
SIZES = (4 * units.MiB, 2 * units.MiB)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    """A pool with the running VM ``v``."""
    with running_small(tmp_path_factory.mktemp("pool"), sizes=SIZES) as made:
        made.pool.set("vdi.data_destroy_wait", QUICKLY)
        write(made, {n * BLOCK: random.randbytes(BLOCK) for n in (0, 1, 2, 5, 20, 21)})
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
def shell(request: pytest.FixtureRequest, small: Small, tmp_path: Path) -> Shell:
    """An empty store; or a copy of ``seeded``, for a test that makes no other point."""
    made = Shell(small.pool, tmp_path / "store")
    if "seeded" in request.fixturenames:
        seeded: Shell = request.getfixturevalue("seeded")
        shutil.copytree(seeded.store, made.store, symlinks=True)
    return made


@pytest.fixture
def cbtfs(
    capsys: pytest.CaptureFixture[str], shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Program]:
    """The command in this process."""
    monkeypatch.setenv("XDG_STATE_HOME", str(shell.store.parent / "state"))
    with untouched_process():
        yield Program(capsys, *shell.command()[3:])


def sync(cbtfs: Program, vm: str = "v") -> str:
    """Make a restore point; return its time."""
    (told,) = items(cbtfs.json("sync", "--vm", vm), "vms")
    return str(told["point"])


def write(small: Small, content: dict[int, bytes]) -> None:
    """Let the guest write into its first disk."""
    guest = small.pool.open_guest("v", "xvda")
    for offset, data in content.items():
        guest.pwrite(data, offset)
    guest.shutdown()


def test_it_is_what_a_comparison_of_the_bytes_finds(
    small: Small, shell: Shell, cbtfs: Program, tmp_path: Path
) -> None:
    times: list[str] = []
    for numbers in ((2, 30), (5, 40, 41)):
        times.append(sync(cbtfs))
        write(small, blocks(*numbers))
    image = shell.image("v", "xvda").read_bytes()
    write(small, {0: image[:BLOCK], 20 * BLOCK: bytes(BLOCK)})  # one as it was, one zeros
    now = guest_content(small.pool, "v", "xvda", tmp_path / "guest")

    for time in times:
        found = cbtfs.json("diff", f"v/{time}", "v/now")
        disk, other = items(found, "disks")
        before = shell.image("v", "xvda", time).read_bytes()
        assert disk["extents"] == [list(e) for e in naive(before, now)]
        assert disk["compared"] == other["compared"] == f"changes since {times[-1]}"
        assert other["changed"] == 0
        assert found["new"] == {"point": "v/now", "vm_uuid": small.api.text(
            "VM.get_uuid", small.vm), "time": None}  # fmt: skip

    lines = cbtfs("diff", "v/latest/xvda", "v/now").out.splitlines()
    assert lines[0] == f"v/{times[-1]} -> v/now"
    assert lines[2].split("  ")[-1] == f"changes since {times[-1]}"
    assert lines[3:] == [
        f"xvda  bytes {a * BLOCK} to {b * BLOCK}" for a, b in ((5, 6), (20, 21), (40, 42))
    ]
    assert cbtfs("diff", "v/latest/xvda", "v/now/xvda").out.splitlines() == lines


@pytest.mark.parametrize("sr", ["Shared NFS", "Linstor"])
def test_the_disks_of_a_halted_vm_are_read_themselves(
    small: Small, shell: Shell, cbtfs: Program, sr: str
) -> None:
    with halted(small, sr) as p:
        sync(cbtfs, "p")
        patch(p, p.disk("p 0"), {**blocks(3, 302, 480), 310 * BLOCK: bytes(BLOCK)})
        small.pool.set("xapi.fail", "VDI.snapshot:INTERNAL_ERROR:none is needed")

        found = cbtfs.json("diff", "p/latest", "p/now")

        disk, _ = items(found, "disks")
        assert disk["extents"] == [[n * BLOCK, (n + 1) * BLOCK] for n in (3, 302, 310, 480)]
        how = "changes since" if sr == "Shared NFS" else "all that holds data (no base"
        assert str(disk["compared"]).startswith(how)


def test_disks_that_are_new_gone_or_larger_are_told(
    small: Small, shell: Shell, cbtfs: Program
) -> None:
    with halted(small) as p:
        time = sync(cbtfs, "p")
        small.api.call("VDI.resize", p.disk("p 0"), str(34 * units.MiB))
        patch(p, p.disk("p 0"), blocks(1, 520))
        gone = p.disk("p 1")
        (vbd,) = (r for r, v in small.api.records("VBD").items() if v["VDI"] == gone)
        small.api.call("VBD.destroy", vbd)
        p.add_disk("p 2", 2)

        result = cbtfs("-v", "diff", "p/latest", "p/now")
        image = shell.image("p", "xvda").read_bytes()
        small.api.call("VDI.destroy", gone)

        assert result.status == 0, result.err
        assert naive(image, content(small)) == [(n * BLOCK, (n + 1) * BLOCK) for n in (1, 520)]
    assert [line.split() for line in result.out.splitlines()[2:]] == [
        ["xvda", "128", "KiB", "2", "32", "MiB", "->", "34", "MiB", "changes", "since", time],
        ["xvdc", "-", "-", "4", "MiB", "only", "in", "p/now"],
        ["xvdb", "-", "-", "2", "MiB", "only", "in", f"p/{time}"],
        ["xvda", "bytes", str(BLOCK), "to", str(2 * BLOCK)],
        ["xvda", "bytes", str(520 * BLOCK), "to", str(521 * BLOCK)],
    ]


@pytest.mark.usefixtures("seeded")
def test_a_list_of_changes_that_cannot_be_had_is_no_obstacle(
    small: Small, shell: Shell, cbtfs: Program
) -> None:
    write(small, blocks(1))
    small.pool.set("xapi.fail", "VDI.list_changed_blocks:SR_BACKEND_FAILURE_460:unrelated")

    disk, _ = items(cbtfs.json("diff", "v/latest", "v/now"), "disks")

    assert f"[{BLOCK}, {2 * BLOCK}]" in str(disk["extents"])  # beside what other tests wrote
    assert "the pool cannot tell which blocks changed" in str(disk["compared"])


@pytest.mark.usefixtures("seeded")
def test_one_disk_that_fails_does_not_keep_the_others_from_it(small: Small, cbtfs: Program) -> None:
    small.pool.set("xapi.fail", "VDI.snapshot*1:SR_BACKEND_FAILURE_44:no space")

    result = cbtfs("-q", "--json", "diff", "v/latest", "v/now")
    small.pool.set("xapi.fail", "VDI.snapshot:SR_BACKEND_FAILURE_44:no space")
    neither = cbtfs("diff", "v/latest", "v/now")

    first, second = items(result.document(), "disks")
    assert (result.status, neither.status) == (3, 1)
    assert "SR_BACKEND_FAILURE_44" in str(first["problem"])
    assert (second["problem"], second["changed"]) == ("", 0)
    assert "v/xvda: " in result.err
    assert neither.out.count("not compared, see the error") == 2


@pytest.mark.usefixtures("seeded")
def test_digests_that_changed_are_not_believed(small: Small, shell: Shell, cbtfs: Program) -> None:
    spoil(shell.image("v", "xvda").with_suffix(".b3"), 0)

    result = cbtfs("diff", "v/latest", "v/now")

    assert result.status == 4
    assert "xvda.b3 is not as committed; run cbtfs verify" in result.err
    assert "xvdb      0 B" in result.out


def test_another_vm_of_that_name_is_not_taken_for_it(small: Small, cbtfs: Program) -> None:
    record: dict[str, object] = {"name_label": "twin", "name_description": ""}
    old = Small(small.pool, small.api, small.api.text("VM.create", record))
    disks = [old.add_disk("t 0", 0, size=units.MiB)]
    sync(cbtfs, "twin")
    was = small.api.text("VM.get_uuid", old.vm)
    small.api.call("VM.destroy", old.vm)
    new = Small(small.pool, small.api, small.api.text("VM.create", record))
    disks.append(new.add_disk("t 1", 0, size=units.MiB))
    now = small.api.text("VM.get_uuid", new.vm)

    refused = cbtfs("diff", "twin/latest", "twin/now")
    meant = cbtfs("diff", "twin/latest", f"{now}/now")
    small.api.call("VM.destroy", new.vm)
    for disk in disks:
        small.api.call("VDI.destroy", disk)

    assert (refused.status, refused.out, meant.status) == (10, "", 0)
    assert f"{was}, is not in the pool" in refused.err
    assert f"write {now}/now to compare with that" in refused.err
    assert "twin/now" in meant.out


MISTAKES = [
    (["v/now", "v/latest"], 2, "can only be what a point is compared with"),
    (["v/now"], 2, "write cbtfs diff POINT v/now"),
    (["v/latest", "nobody/now"], 10, "no VM called 'nobody'"),
    (["v/latest", "v/now/xvdz"], 10, "v has no disk 'xvdz' now; it has: xvda, xvdb"),
    (["v/latest/xvdz", "v/now"], 10, "has no disk 'xvdz'"),
]


@pytest.mark.usefixtures("seeded")
def test_mistakes(cbtfs: Program) -> None:
    for arguments, status, sentence in MISTAKES:
        result = cbtfs("diff", *arguments)
        assert (result.status, result.out) == (status, ""), arguments
        assert sentence in result.err
