"""What a simulated pool keeps over stop and start, its settings and its own commands."""

import json
from pathlib import Path

import msgspec
import pytest

from cbtfs import errors
from cbtfs.simulator.builder import Builder
from cbtfs.simulator.failures import SimError
from cbtfs.simulator.faults import KEYS, Faults
from cbtfs.simulator.pool import SimulatedPool

from .smallpool import BLOCK, Client, Failed, SmallPool


def reopened(small: SmallPool) -> tuple[SimulatedPool, Client]:
    pool = SimulatedPool(small.pool.directory)
    assert pool.load()
    return pool, Client(pool, small.host1).login()


def test_a_stopped_pool_comes_back_as_it_was(tmp_path: Path) -> None:
    small = SmallPool(tmp_path)
    base = small.snapshot(small.root)
    small.write(small.root, 4)
    newer = small.snapshot(small.root)
    before = small.client.call("VDI.get_all_records")
    small.pool.close()

    pool, client = reopened(small)

    assert client.call("VDI.get_all_records") == before
    assert client.changed(base, newer) == {4}
    assert pool.disk(newer).pread(4 * BLOCK + 17, 1) == b"!"
    assert [disk.vm_name for disk in pool.live_disks()] == ["web1", "web1"]
    with pytest.raises(Failed, match="SESSION_INVALID"):
        small.client.pool = pool
        small.client.call("VM.get_all")
    pool.disk(small.root).write(9 * BLOCK, b"goes on")
    assert client.changed(newer, client.text("VDI.snapshot", small.root)) == {9}
    pool.close()


def test_a_killed_pool_comes_back_as_after_a_power_cut(tmp_path: Path) -> None:
    small = SmallPool(tmp_path)
    taken = small.snapshot(small.root)
    attachment = small.pool.open_export(small.host2, small.export(taken))
    small.pool.save()
    small.write(small.root, 4)
    assert attachment.size

    pool, client = reopened(small)

    assert client.call("VDI.get_VBDs", taken) == []
    assert client.call("VM.get_power_state", small.web1) == "Halted"
    client.call("VM.start", small.web1, False, False)
    assert client.call("VDI.get_cbt_enabled", small.root) is False
    assert client.call("VDI.get_cbt_enabled", small.idle_disk) is True
    pool.close()


def test_there_is_nothing_to_load_at_first(tmp_path: Path) -> None:
    assert SimulatedPool(tmp_path).load() is False


def test_two_builds_are_equal(tmp_path: Path) -> None:
    pools = []
    for name in ("a", "b"):
        small = SmallPool(tmp_path / name)
        small.write(small.root, 1)
        small.builder.snapshot(small.web1, "nightly")
        small.pool.close()
        dump = json.loads((tmp_path / name / "state.json").read_text())["database"]
        pools.append({kind: dump[kind].keys() for kind in ("VM", "VDI", "VBD", "PBD", "host")})

    assert pools[0] == pools[1]


def test_equal_names_get_uuids_of_their_own(tmp_path: Path) -> None:
    small = SmallPool(tmp_path)
    twins = {small.builder.add_vm("twin") for _ in range(3)}

    assert len(twins) == 3


def test_names_may_be_anything(tmp_path: Path) -> None:
    pool = SimulatedPool(tmp_path)
    builder = Builder(pool, seed="x")
    builder.add_pool("p")
    builder.add_host("h", address="127.0.0.2")
    names = ["", ".", "..", "../../etc", "a/b", "\x1b[2J\n", "\ud800", "n" * 300]
    for name in names:
        builder.add_vm(name)
    pool.close()
    again = SimulatedPool(tmp_path)
    again.load()

    assert {str(r["name_label"]) for r in again.db.records("VM").values()} >= set(names)


# ── settings ─────────────────────────────────────────────────────────────────────────────


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(errors.UsageError, match=r"'nbd.dealy'.*'nbd.delay'"):
        Faults().set("nbd.dealy", "1")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("nbd.delay", "soon"),
        ("nbd.drop_after", "x"),
        ("nbd.leak", "maybe"),
        ("nbd.slots", "many"),
        ("xapi.fail", "VM.snapshot"),
        ("xapi.delay", "VM.snapshot:soon"),
    ],
)
def test_a_value_must_fit_its_key(key: str, value: str) -> None:
    with pytest.raises(errors.UsageError):
        Faults().set(key, value)


def test_values_are_typed_and_an_empty_one_sets_back() -> None:
    faults = Faults()
    for key, value in [("nbd.delay", "2ms"), ("nbd.drop_after", "10M"), ("nbd.leak", "on")]:
        faults.set(key, value)

    assert faults.duration("nbd.delay") == 0.002
    assert faults.size("nbd.drop_after") == 10 << 20
    assert faults.flag("nbd.leak")
    assert faults.current() == {"nbd.delay": "2ms", "nbd.drop_after": "10M", "nbd.leak": "on"}
    for key in list(faults.current()):
        faults.set(key, "")
    assert faults.current() == {}
    assert faults.size("nbd.drop_after") is None
    assert faults.count("nbd.slots") == 16


def test_hosts_are_named_or_all() -> None:
    faults = Faults()
    faults.set("nbd.silent", "xcp1,xcp3")
    assert faults.hits("nbd.silent", "xcp3")
    assert not faults.hits("nbd.silent", "xcp2", "")
    faults.set("nbd.silent", "*")
    assert faults.hits("nbd.silent", "xcp2")


def test_methods_can_be_given_by_class() -> None:
    faults = Faults()
    faults.set("xapi.delay", "VDI.*:1s,VM.snapshot:500ms")

    assert faults.delay_of("VDI.snapshot") == 1
    assert faults.delay_of("VM.snapshot") == 0.5
    assert faults.delay_of("VM.start") == 0


@pytest.mark.parametrize("rule", ["**2", "VDI.**2", "VDI.snapshot*2"])
def test_a_failure_is_ordered_for_a_number_of_calls(rule: str) -> None:
    faults = Faults()
    faults.set("xapi.fail", f"{rule}:SR_BACKEND_FAILURE_44::full:")

    for _ in range(2):
        with pytest.raises(SimError, match="SR_BACKEND_FAILURE_44") as failed:
            faults.check("VDI.snapshot")
        assert failed.value.params == ("", "full", "")
    faults.check("VDI.snapshot")


def test_every_setting_is_explained() -> None:
    kinds = {"duration", "size", "count", "flag", "text", "rules"}

    assert all(key.meaning and key.kind in kinds for key in KEYS.values())


# ── commands ─────────────────────────────────────────────────────────────────────────────


def test_commands_answer_in_json(tmp_path: Path) -> None:
    small = SmallPool(tmp_path)
    small.write(small.root, 1)

    status = small.pool.control("status")
    assert isinstance(status, dict)
    assert status["running"] == ["web1"]
    volume = small.pool.control("volume", "root")
    assert isinstance(volume, dict)
    assert (volume["allocated"], volume["tracked"]) == (BLOCK, True)
    name = small.pool.control("call", "VM.get_name_label", small.web1)
    assert json.dumps([status, volume, name])
    failed = small.pool.control("call", "VDI.destroy", small.root)
    assert failed == {"error": ["VDI_IN_USE", small.root, "destroy"]}


def test_a_record_with_times_goes_through_the_control_socket(tmp_path: Path) -> None:
    small = SmallPool(tmp_path)

    record = small.pool.control("call", "VM.get_record", small.web1)

    assert b"19700101T00:00:00Z" in msgspec.json.encode(record)


@pytest.mark.parametrize(
    ("command", "args", "told"),
    [
        ("explode", [], "no command 'explode'"),
        ("changed-log", ["a"], "takes A B"),
        ("crash-vm", ["nobody"], "no VM"),
    ],
)
def test_a_wrong_command_says_what_is_wrong(
    tmp_path: Path, command: str, args: list[str], told: str
) -> None:
    with pytest.raises(errors.UsageError, match=told):
        SmallPool(tmp_path).pool.control(command, *args)


def test_collecting_coalesces_what_was_left(tmp_path: Path) -> None:
    small = SmallPool(tmp_path)
    small.pool.faults.set("sr.gc", "off")
    for number in range(5):
        small.write(small.root, number)
        small.client.call("VDI.destroy", small.snapshot(small.root))
    before = small.pool.control("volume", "root")
    small.pool.control("collect")
    after = small.pool.control("volume", "root")

    assert isinstance(before, dict)
    assert isinstance(after, dict)
    assert (before["layers"], after["layers"]) == (6, 1)
    assert small.disk(small.root).pread(4 * BLOCK + 17, 1) == b"!"
    records = small.pool.db.records("VDI").values()
    assert all(record["managed"] for record in records)
