"""The API's bytes: encodings, failures, sessions, fields, tasks."""

import json
import threading
import time
import xmlrpc.client
from collections.abc import Iterator
from pathlib import Path

import pytest

from cbtfs.simulator.fields import CLASSES

from .smallpool import Client, Failed, MiB, SmallPool


@pytest.fixture
def small(tmp_path: Path) -> Iterator[SmallPool]:
    pool = SmallPool(tmp_path)
    yield pool
    pool.pool.close()


# ── encodings ────────────────────────────────────────────────────────────────────────────


def test_xml_carries_ints_as_strings_and_json_as_numbers(small: SmallPool) -> None:
    answer = small.client.xml("VDI.get_virtual_size", small.client.session, small.root)

    assert answer == {"Status": "Success", "Value": str(64 * MiB)}
    assert small.client.call("VDI.get_virtual_size", small.root) == 64 * MiB


def test_xml_types_are_those_of_xapi(small: SmallPool) -> None:
    answer = small.client.xml("VDI.get_record", small.client.session, small.root)
    record = answer["Value"]

    assert isinstance(record, dict)
    assert record["cbt_enabled"] is True
    assert record["snapshot_time"] == xmlrpc.client.DateTime("19700101T00:00:00Z")
    assert record["snapshot_of"] == "OpaqueRef:NULL"
    assert record["tags"] == []
    assert record["other_config"] == {}


def test_the_raw_xml_of_an_int_is_untyped_and_of_a_float_a_double(small: SmallPool) -> None:
    body = xmlrpc.client.dumps((small.client.session, small.web1), "VM.get_record").encode()

    _, _, reply = small.client.post("/", body)

    assert b"<name>version</name><value>0</value>" in reply
    assert b"<name>HVM_shadow_multiplier</name><value><double>1</double></value>" in reply


def test_xml_failure_has_the_code_first(small: SmallPool) -> None:
    answer = small.client.xml("VDI.get_uuid", small.client.session, "OpaqueRef:no")

    assert answer == {
        "Status": "Failure",
        "ErrorDescription": ["HANDLE_INVALID", "VDI", "OpaqueRef:no"],
    }


def test_json_2_failure_has_the_code_apart(small: SmallPool) -> None:
    body = {"jsonrpc": "2.0", "method": "VDI.get_uuid", "params": [small.client.session, "x"]}

    _, kind, reply = small.client.post("/jsonrpc", json.dumps(body | {"id": "a"}).encode())

    assert kind == "application/json"
    error = {"code": 1, "message": "HANDLE_INVALID", "data": ["VDI", "x"]}
    assert json.loads(reply) == {"jsonrpc": "2.0", "error": error, "id": "a"}


def test_json_1_answers_in_its_own_shape(small: SmallPool) -> None:
    good = {"method": "session.get_uuid", "params": [small.client.session] * 2, "id": 3}
    bad = {"method": "no.such", "params": [small.client.session], "id": 4}

    _, _, result = small.client.post("/json", json.dumps(good).encode())
    _, _, failure = small.client.post("/jsonrpc", json.dumps(bad).encode())

    assert json.loads(result)["error"] is None
    assert json.loads(failure) == {
        "result": None,
        "error": ["MESSAGE_METHOD_UNKNOWN", "no.such"],
        "id": 4,
    }


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/", b"<methodCall><methodName>a"),
        ("/RPC2", b""),
        ("/", b"<x/>"),
        ("/jsonrpc", b"{"),
        ("/jsonrpc", b'{"jsonrpc":"2.0","method":"session.logout","params":[]}'),
        ("/jsonrpc", b'{"id":1,"method":3}'),
        ("/jsonrpc", b"[]"),
    ],
)
def test_what_is_no_request_is_http_500_with_html(small: SmallPool, path: str, body: bytes) -> None:
    status, kind, page = small.client.post(path, body)

    assert (status, kind) == (500, "text/html")
    assert b"<html>" in page


def test_hostile_names_survive_both_encodings(small: SmallPool) -> None:
    name = 'a<b>&"\x1b[31m\n\ud800 \u202e ../../etc'
    with small.pool.lock:
        small.pool.db.set("VM", small.idle, name_label=name)

    assert small.client.call("VM.get_name_label", small.idle) == name
    answer = small.client.xml("VM.get_name_label", small.client.session, small.idle)
    assert answer["Value"] == 'a<b>&"\ufffd[31m\n\ufffd \u202e ../../etc'


def test_ints_may_be_sent_as_strings(small: SmallPool) -> None:
    small.client.call("VDI.resize", small.idle_disk, str(32 * MiB))

    assert small.client.call("VDI.get_virtual_size", small.idle_disk) == 32 * MiB


def test_records_have_every_field_of_their_class(small: SmallPool) -> None:
    for kind in ("pool", "host", "SR", "PBD", "network", "PIF", "VDI", "VBD", "VM", "SM"):
        found = small.client.call(f"{kind}.get_all_records")
        assert isinstance(found, dict)
        assert found
        for record in found.values():
            assert isinstance(record, dict)
            assert record.keys() == CLASSES[kind].keys()
    assert [len(CLASSES[k]) for k in ("VDI", "VBD", "VM", "SR", "host")] == [32, 22, 90, 21, 70]


# ── errors ───────────────────────────────────────────────────────────────────────────────


def test_errors_of_the_call_itself(small: SmallPool) -> None:
    expected = {
        ("VDI.frobnicate",): ("MESSAGE_METHOD_UNKNOWN", ["VDI.frobnicate"]),
        ("VDI.resize", small.root): (
            "MESSAGE_PARAMETER_COUNT_MISMATCH",
            ["VDI.resize", "2", "1"],
        ),
        ("VDI.destroy", "OpaqueRef:x"): ("HANDLE_INVALID", ["VDI", "OpaqueRef:x"]),
        ("VDI.get_by_uuid", "x"): ("UUID_INVALID", ["VDI", "x"]),
        ("VDI.resize", small.root, "big"): ("FIELD_TYPE_ERROR", ["size"]),
        ("Async.VDI.get_nbd_info", small.root): (
            "MESSAGE_METHOD_UNKNOWN",
            ["Async.VDI.get_nbd_info"],
        ),
        ("Async.task.create", "a", "b"): ("MESSAGE_METHOD_UNKNOWN", ["Async.task.create"]),
    }
    for call, (code, params) in expected.items():
        with pytest.raises(Failed) as failed:
            small.client.call(*call)
        assert (failed.value.code, failed.value.params) == (code, params)


def test_a_key_of_a_map_cannot_be_added_twice(small: SmallPool) -> None:
    small.client.call("VDI.add_to_other_config", small.root, "k", "v")

    with pytest.raises(Failed) as failed:
        small.client.call("VDI.add_to_other_config", small.root, "k", "w")

    uuid = small.uuid(small.root)
    assert failed.value.params == ["VDI", "other_config", uuid, "k"]
    small.client.call("VDI.remove_from_other_config", small.root, "k")
    assert small.client.call("VDI.get_other_config", small.root) == {}


def test_read_only_fields_have_no_setter(small: SmallPool) -> None:
    with pytest.raises(Failed, match="MESSAGE_METHOD_UNKNOWN"):
        small.client.call("VDI.set_virtual_size", small.root, 5)


def test_tags_and_names_can_be_set(small: SmallPool) -> None:
    small.client.call("VM.add_tags", small.web1, "gold")
    small.client.call("VM.add_tags", small.web1, "gold")
    small.client.call("VDI.set_name_label", small.root, "renamed")

    assert small.client.call("VM.get_tags", small.web1) == ["gold"]
    assert small.client.call("VDI.get_by_name_label", "renamed") == [small.root]


# ── sessions and hosts ───────────────────────────────────────────────────────────────────


def test_a_wrong_password_is_refused_after_a_delay(small: SmallPool) -> None:
    small.pool.faults.set("xapi.auth_delay", "30ms")
    before = time.monotonic()

    with pytest.raises(Failed) as failed:
        small.client.bare("session.login_with_password", "root", "wrong", "1.0", "x")

    assert failed.value.code == "SESSION_AUTHENTICATION_FAILED"
    assert failed.value.params[0] == "root"
    assert time.monotonic() - before >= 0.03


@pytest.mark.parametrize("method", ["session.login_with_password", "VM.get_all"])
def test_a_supporter_names_the_master(small: SmallPool, method: str) -> None:
    supporter = Client(small.pool, small.host2)
    params = ("root", "root") if "login" in method else (small.client.session,)

    with pytest.raises(Failed) as failed:
        supporter.bare(method, *params)

    assert (failed.value.code, failed.value.params) == ("HOST_IS_SLAVE", ["127.0.0.2"])


def test_a_session_ends_by_logout_expiry_and_disuse(small: SmallPool) -> None:
    one, two, three = (Client(small.pool, small.host1).login(str(n)) for n in range(3))
    one.call("session.logout")
    for client in (one,):
        with pytest.raises(Failed) as failed:
            client.call("VM.get_all")
        assert (failed.value.code, failed.value.params) == ("SESSION_INVALID", [client.session])

    small.pool.faults.set("xapi.idle", "0.001")
    time.sleep(0.002)
    with pytest.raises(Failed, match="SESSION_INVALID"):
        two.call("VM.get_all")
    small.pool.faults.set("xapi.idle", "")
    small.pool.control("expire-sessions")
    with pytest.raises(Failed, match="SESSION_INVALID"):
        three.call("VM.get_all")


def test_an_unfinished_task_keeps_its_session(small: SmallPool) -> None:
    task = small.client.text("task.create", "long", "")
    small.pool.faults.set("xapi.idle", "0.001")
    time.sleep(0.002)
    small.client.call("VM.get_all")

    small.client.call("task.destroy", task)
    time.sleep(0.002)
    with pytest.raises(Failed, match="SESSION_INVALID"):
        small.client.call("VM.get_all")


def test_logging_in_again_gives_another_ref(small: SmallPool) -> None:
    before = small.client.session

    assert small.client.login().session != before


def test_an_originator_has_at_most_500_sessions(small: SmallPool) -> None:
    first = Client(small.pool, small.host1).login("greedy")
    for _ in range(500):
        Client(small.pool, small.host1).login("greedy")

    with pytest.raises(Failed, match="SESSION_INVALID"):
        first.call("VM.get_all")
    small.client.call("VM.get_all")


def test_failover_loses_sessions_and_tasks(small: SmallPool) -> None:
    task = small.client.text("task.create", "mine", "")
    small.pool.control("failover", "xcp2")

    with pytest.raises(Failed, match="HOST_IS_SLAVE"):
        small.client.call("VM.get_all")
    other = Client(small.pool, small.host2)
    other.session = small.client.session
    with pytest.raises(Failed, match="SESSION_INVALID"):
        other.call("VM.get_all")
    other.login()
    assert other.call("pool.get_master", *other.texts("pool.get_all")) == small.host2
    with pytest.raises(Failed, match="HANDLE_INVALID"):
        other.call("task.get_status", task)


def test_a_booting_host_says_so(small: SmallPool) -> None:
    small.pool.faults.set("xapi.booting", "xcp1")

    with pytest.raises(Failed) as failed:
        small.client.call("VM.get_all")

    assert (failed.value.code, failed.value.params) == ("HOST_STILL_BOOTING", [])


# ── tasks ────────────────────────────────────────────────────────────────────────────────


def finished(client: Client, task: str) -> dict[str, object]:
    deadline = time.monotonic() + 10
    while client.call("task.get_status", task) in ("pending", "cancelling"):
        assert time.monotonic() < deadline
    return dict(client.record("task", task))


def test_async_returns_a_task_whose_result_is_xml_over_json_too(small: SmallPool) -> None:
    task = finished(small.client, small.client.text("Async.VDI.snapshot", small.root))

    assert task["status"] == "success"
    assert task["progress"] == 1.0
    result = str(task["result"])
    assert result.startswith("<value>OpaqueRef:")
    ref = result.removeprefix("<value>").removesuffix("</value>")
    assert small.client.call("VDI.get_snapshot_of", ref) == small.root


def test_an_async_call_without_result_leaves_none(small: SmallPool) -> None:
    task = finished(small.client, small.client.text("Async.VDI.disable_cbt", small.root))

    assert (task["status"], task["result"]) == ("success", "")


def test_an_async_failure_is_in_error_info(small: SmallPool) -> None:
    small.pool.faults.set("xapi.fail", "VM.snapshot:SR_BACKEND_FAILURE_44::no space:")

    task = finished(small.client, small.client.text("Async.VM.snapshot", small.web1, "x"))

    assert task["status"] == "failure"
    assert task["error_info"] == ["SR_BACKEND_FAILURE_44", "", "no space", ""]


def test_a_waiting_task_can_be_cancelled(small: SmallPool) -> None:
    small.pool.faults.set("xapi.delay", "VM.snapshot:60")
    task = small.client.text("Async.VM.snapshot", small.web1, "x")

    small.client.call("task.cancel", task)

    assert finished(small.client, task)["status"] == "cancelled"
    assert small.client.record("task", task)["error_info"] == ["TASK_CANCELLED", task]


def test_a_task_of_ones_own_stays_until_destroyed(small: SmallPool) -> None:
    task = small.client.text("task.create", "label", "about")

    assert small.client.record("task", task)["status"] == "pending"
    small.client.call("task.destroy", task)
    with pytest.raises(Failed, match="HANDLE_INVALID"):
        small.client.record("task", task)


# ── ordered faults ───────────────────────────────────────────────────────────────────────


def test_a_call_can_be_made_to_fail_a_number_of_times(small: SmallPool) -> None:
    small.pool.faults.set("xapi.fail", "VM.get_all*2:RBAC_PERMISSION_DENIED:vm.get_all:no")

    for _ in range(2):
        with pytest.raises(Failed) as failed:
            small.client.call("VM.get_all")
        assert failed.value.code == "RBAC_PERMISSION_DENIED"
        assert failed.value.params == ["vm.get_all", "no"]
    small.client.call("VM.get_all")


def test_a_call_can_be_made_to_fail_after_it_worked(small: SmallPool) -> None:
    small.pool.faults.set("xapi.fail_after", "VDI.snapshot:INTERNAL_ERROR:lost")
    before = len(small.client.texts("VDI.get_snapshots", small.root))

    with pytest.raises(Failed, match="INTERNAL_ERROR"):
        small.snapshot(small.root)

    assert len(small.client.texts("VDI.get_snapshots", small.root)) == before + 1


def test_a_call_can_be_delayed(small: SmallPool) -> None:
    small.pool.faults.set("xapi.delay", "VDI.snapshot:0.05,VM.start:9")
    before = time.monotonic()

    small.snapshot(small.root)

    assert 0.05 <= time.monotonic() - before < 5


def test_counters_count_calls(small: SmallPool) -> None:
    small.pool.control("reset-counters")
    small.client.call("VM.get_all")
    small.client.call("VM.get_all")

    counters = small.pool.control("counters")
    assert isinstance(counters, dict)
    assert counters["rpc.VM.get_all"] == 2


def test_calls_run_in_parallel(small: SmallPool) -> None:
    small.pool.faults.set("xapi.delay", "VDI.get_uuid:0.4")
    before = time.monotonic()
    threads = [
        threading.Thread(target=small.client.call, args=("VDI.get_uuid", small.root))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert time.monotonic() - before < 2.5
