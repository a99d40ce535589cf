"""The doctor names what cannot work, what works worse, and what helps."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cbtfs import doctor
from cbtfs.doctor import Finding
from cbtfs.inventory import SR, VBD, VDI, VM, Host, Inventory, Network, Owned, Pool, write_owner

HEALTHY = Inventory(
    pool=Pool(uuid="p", name="prod"),
    hosts={"H": Host(ref="H", uuid="h", name="xcp1")},
    srs={
        "R": SR(ref="R", uuid="r", name="fast", type="ext", host_refs=("H",), cbt_capable=True),
    },
    vms={"D": VM(ref="D", uuid="d", is_control_domain=True, resident_on="H")},
    vdis={"V": VDI(ref="V", uuid="v", sr_ref="R", cbt_enabled=True)},
    networks={"N": Network(ref="N", name="storage", purpose=frozenset({"nbd"}))},
)


def named(findings: list[Finding], name: str) -> Finding:
    [found] = [finding for finding in findings if finding.name == name]
    return found


def test_healthy_pool_has_nothing_to_complain_of() -> None:
    assert {finding.level for finding in doctor.pool(HEALTHY)} == {"ok"}


@pytest.mark.parametrize(
    ("purpose", "level", "words"),
    [
        ("nbd", "ok", "served with TLS on: storage"),
        ("insecure_nbd", "fail", "without TLS"),
        ("", "fail", "no network serves NBD"),
    ],
)
def test_network_without_tls_or_nbd_cannot_work(purpose: str, level: str, words: str) -> None:
    networks = {"N": Network(ref="N", name="storage", purpose=frozenset({purpose} - {""}))}

    found = named(doctor.pool(replace(HEALTHY, networks=networks)), "NBD")

    assert (found.level, words in found.detail) == (level, True)
    assert bool(found.remedy) == (level == "fail")


@pytest.mark.parametrize(("held", "level"), [(0, "ok"), (15, "ok"), (16, "warn"), (20, "warn")])
def test_connections_of_a_host_are_counted_by_its_control_domain(held: int, level: str) -> None:
    vbds = {f"B{n}": VBD(ref=f"B{n}", vm_ref="D", currently_attached=True) for n in range(held)}
    vbds["off"] = VBD(ref="off", vm_ref="D")

    found = named(doctor.pool(replace(HEALTHY, vbds=vbds)), "host xcp1")

    assert found.level == level
    assert f"about {max(0, 16 - held)} of 16" in found.detail


def test_storage_that_cannot_track_changes_is_warned_of() -> None:
    srs = {"R": replace(HEALTHY.srs["R"], cbt_capable=False)}

    found = named(doctor.pool(replace(HEALTHY, srs=srs)), "SR fast")

    assert found.level == "warn"
    assert "all of its 1 disks is read by each sync" in found.detail


def test_storage_that_no_host_has_attached_is_warned_of() -> None:
    srs = {"R": replace(HEALTHY.srs["R"], host_refs=())}

    assert named(doctor.pool(replace(HEALTHY, srs=srs)), "SR fast").level == "warn"


def test_tracking_that_is_off_is_fine_because_sync_turns_it_on() -> None:
    vdis = {"V": replace(HEALTHY.vdis["V"], cbt_enabled=False)}

    found = named(doctor.pool(replace(HEALTHY, vdis=vdis)), "SR fast")

    assert (found.level, found.detail.endswith("(sync turns it on)")) == ("ok", True)


def test_records_that_were_left_out_are_told() -> None:
    found = named(doctor.pool(replace(HEALTHY, problems=("VDI without uuid",))), "inventory")

    assert (found.level, "VDI without uuid" in found.detail) == ("warn", True)


def test_what_is_ours_in_the_pool_is_counted() -> None:
    owner = write_owner(Owned(self_uuid="s", role="base"))
    ours = VDI(ref="S", uuid="s", is_a_snapshot=True, other_config={"cbtfs:owner": owner})

    found = named(doctor.pool(replace(HEALTHY, vdis={**HEALTHY.vdis, "S": ours})), "of ours")

    assert found.detail.startswith("1 snapshots kept as bases")


def test_store_without_reflinks_says_what_that_costs(tmp_path: Path) -> None:
    levels = {finding.name: finding for finding in doctor.store(tmp_path)}

    assert levels["store"].level == "ok"
    assert levels["reflinks"].level in ("ok", "warn")
    assert "free space" in levels


def test_store_with_reflinks_is_fine(reflink_dir: Path) -> None:
    assert named(doctor.store(reflink_dir / "store"), "reflinks").level == "ok"


def test_looking_at_a_store_makes_nothing(tmp_path: Path) -> None:
    doctor.store(tmp_path / "a" / "b")

    assert list(tmp_path.iterdir()) == []


def test_store_where_nobody_may_write_cannot_work() -> None:
    assert "fail" in {finding.level for finding in doctor.store(Path("/proc/store"))}


READ_ONLY = """
mount -t tmpfs none "$0" && mkdir "$0/a" && mount -o remount,ro "$0" || exit 99
exec "$1" -c 'import sys; from pathlib import Path; from cbtfs import doctor
for found in doctor.store(Path(sys.argv[1])): print(found.level, found.detail, found.remedy)
' "$0/a/store"
"""


def test_store_on_a_file_system_that_is_read_only_says_so(tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare(1)")
    command = ["unshare", "-r", "-m", "sh", "-c", READ_ONLY, str(tmp_path), sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 99 or done.stderr.startswith("unshare:"):
        pytest.skip(f"needs a mount namespace: {done.stderr}")

    assert done.stdout == (
        f"fail {tmp_path}/a is on a file system that is mounted read-only"
        f" sudo mount -o remount,rw {tmp_path}; if that fails, see dmesg\n"
    ), done.stderr


def test_machine_names_its_versions() -> None:
    found = {finding.name: finding for finding in doctor.machine()}

    assert "pyfuse3" in found["versions"].detail
    assert "libnbd 1." in found["libnbd"].detail
