"""event.from of the simulated pool."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .smallpool import Client, Failed, Json, SmallPool


@pytest.fixture
def small(tmp_path: Path) -> Iterator[SmallPool]:
    pool = SmallPool(tmp_path)
    yield pool
    pool.pool.close()


def ask(
    client: Client, *classes: str, token: str = "", timeout: float = 0.02
) -> tuple[list[tuple[str, str, str]], str]:
    """Return (operation, class, ref) of the events, and the token."""
    answer = client.call("event.from", list(classes), token, timeout)
    assert isinstance(answer, dict)
    events = answer["events"]
    assert isinstance(events, list)
    rows: list[tuple[str, str, str]] = []
    for event in events:
        assert isinstance(event, dict)
        assert ("snapshot" in event) == (event["operation"] != "del")
        assert isinstance(event["id"], str)
        assert event["timestamp"] == "0.0"
        rows.append((str(event["operation"]), str(event["class"]), str(event["ref"])))
    return rows, str(answer["token"])


def test_the_first_call_dumps_everything_as_added(small: SmallPool) -> None:
    rows, token = ask(small.client, "vm", "sr")

    assert ("add", "vm", small.web1) in rows
    assert ("add", "sr", small.shared) in rows
    assert {kind for _, kind, _ in rows} == {"vm", "sr"}
    assert len(token) == 41
    assert token[20] == ","


def test_changes_are_told_once_with_the_latest_record(small: SmallPool) -> None:
    _, token = ask(small.client, "vdi")
    small.client.call("VDI.set_name_label", small.root, "one")
    small.client.call("VDI.set_name_label", small.root, "two")

    answer = small.client.call("event.from", ["VDI"], token, 1.0)

    assert isinstance(answer, dict)
    assert isinstance(answer["events"], list)
    (event,) = answer["events"]
    assert isinstance(event, dict)
    assert isinstance(event["snapshot"], dict)
    assert (event["operation"], event["snapshot"]["name_label"]) == ("mod", "two")


def test_new_and_gone_objects(small: SmallPool) -> None:
    kept = small.snapshot(small.root)
    _, token = ask(small.client, "vdi")
    brief, new = small.snapshot(small.root), small.snapshot(small.root)
    small.client.call("VDI.destroy", brief)
    small.client.call("VDI.destroy", kept)

    rows, _ = ask(small.client, "vdi", token=token)

    assert ("add", "vdi", new) in rows
    assert ("del", "vdi", kept) in rows
    assert brief not in {ref for _, _, ref in rows}


def test_one_object_can_be_watched(small: SmallPool) -> None:
    _, token = ask(small.client, "*")
    small.client.call("VDI.set_name_label", small.data, "x")
    small.client.call("VDI.set_name_label", small.root, "x")

    rows, _ = ask(small.client, f"vdi/{small.root}", token=token)

    assert rows == [("mod", "vdi", small.root)]


def test_nothing_happened_is_an_empty_answer_with_a_token(small: SmallPool) -> None:
    _, token = ask(small.client, "vm")
    before = time.monotonic()

    rows, again = ask(small.client, "vm", token=token, timeout=0.05)

    assert rows == []
    assert again >= token
    assert time.monotonic() - before >= 0.05


def test_waiting_ends_when_something_happens(small: SmallPool) -> None:
    _, token = ask(small.client, "vm")
    found: list[list[tuple[str, str, str]]] = []
    other = Client(small.pool, small.host1).login()
    thread = threading.Thread(
        target=lambda: found.append(ask(other, "vm", token=token, timeout=20)[0])
    )
    thread.start()
    small.client.call("VM.set_name_label", small.web1, "renamed")
    thread.join(10)

    assert found == [[("mod", "vm", small.web1)]]


def test_a_session_that_ends_ends_the_wait(small: SmallPool) -> None:
    _, token = ask(small.client, "vm")
    other = Client(small.pool, small.host1).login()
    codes: list[str] = []

    def wait() -> None:
        with pytest.raises(Failed) as failed:
            ask(other, "vm", token=token, timeout=20)
        codes.append(failed.value.code)

    thread = threading.Thread(target=wait)
    thread.start()
    small.client.call("VDI.get_all")
    small.pool.logout(other.session)
    thread.join(10)

    assert codes == ["SESSION_INVALID"]


def test_a_token_of_before_a_failover_is_void(small: SmallPool) -> None:
    _, token = ask(small.client, "vm")
    small.pool.control("failover", "xcp2")
    client = Client(small.pool, small.host2).login()

    with pytest.raises(Failed) as failed:
        ask(client, "vm", token=token)

    assert failed.value.code == "EVENT_FROM_TOKEN_PARSE_FAILURE"
    assert failed.value.params == [token]
    assert ask(client, "vm")[0]


@pytest.mark.parametrize("token", ["x", "1", "1,2,3", ","])
def test_a_bad_token_is_refused(small: SmallPool, token: str) -> None:
    with pytest.raises(Failed, match="EVENT_FROM_TOKEN_PARSE_FAILURE"):
        ask(small.client, "vm", token=token)


def test_a_bad_subscription_is_refused(small: SmallPool) -> None:
    with pytest.raises(Failed) as failed:
        ask(small.client, "/x")

    assert failed.value.code == "EVENT_SUBSCRIPTION_PARSE_FAILURE"


def test_counts_are_typed_ints_in_xml(small: SmallPool) -> None:
    body = (
        "<methodCall><methodName>event.from</methodName><params>"
        f"<param><value>{small.client.session}</value></param>"
        "<param><value><array><data><value>vm</value></data></array></value></param>"
        "<param><value></value></param><param><value><double>0.0</double></value></param>"
        "</params></methodCall>"
    )

    _, _, reply = small.client.post("/", body.encode())

    count = len(small.pool.db.records("VM"))
    assert f"<name>vm</name><value><i4>{count}</i4></value>".encode() in reply


def test_a_token_is_a_string_over_json(small: SmallPool) -> None:
    answer: Json = small.client.call("event.from", ["vm"], "", 0)

    assert isinstance(answer, dict)
    assert isinstance(answer["token"], str)
