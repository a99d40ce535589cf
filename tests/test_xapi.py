"""A session on the simulated pool: who is let in, and what a session survives."""

import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from cbtfs import errors, tasks, tls, xapi
from cbtfs.xapi import Credentials, Session, Trust

from .pools import in_good_order
from .simulated import Api, RunningPool

ROOT = Credentials("root", "simulated")
MASTER, SUPPORTER = "127.0.0.2", "127.0.0.3"


@pytest.fixture
def pool(started: RunningPool) -> Iterator[RunningPool]:
    """A pool in good order: no fault set, xcp1 its master, nothing counted or stolen."""
    with in_good_order(started) as made:
        yield made


def fingerprint(pool: RunningPool, host: str = "xcp1") -> str:
    return tls.fingerprint(pool.certificate(host).read_text())


@asynccontextmanager
async def session_of(
    pool: RunningPool,
    *,
    host: int = 0,
    credentials: Credentials = ROOT,
    trust: Trust | None = None,
    state: Path | None = None,
) -> AsyncGenerator[Session]:
    async with xapi.open_session(
        pool.host_url(host),
        credentials=credentials,
        trust=trust or Trust(str(pool.ca_file)),
        state_dir=str(state) if state else None,
        timeout=5,
    ) as session:
        yield session


def logins(pool: RunningPool) -> int:
    counters = pool.control("counters")
    assert isinstance(counters, dict)
    return int(counters.get("rpc.session.login_with_password", 0))


async def root_of(session: Session) -> str:
    """Return the live root disk of web1, whose snapshots have its name."""
    for ref in await session.fetch("VDI.get_by_name_label", "web1 root", type=list[str]):
        if not await session.fetch("VDI.get_is_a_snapshot", ref, type=bool):
            return ref
    raise AssertionError("no root disk")


# ── calls ────────────────────────────────────────────────────────────────────────────────────────


async def test_a_session_has_an_originator_of_its_own(pool: RunningPool) -> None:
    async with session_of(pool) as session:
        assert await session.call("session.get_originator", session.ref) == "cbtfs"


async def test_values_come_in_the_type_that_is_asked_for(pool: RunningPool) -> None:
    async with session_of(pool) as session:
        sizes = [
            await session.fetch("VDI.get_virtual_size", ref, type=int)
            for ref in await session.fetch("VDI.get_all", type=list[str])
        ]
        with pytest.raises(errors.PoolError, match=r"VDI\.get_all is not understood"):
            await session.fetch("VDI.get_all", type=int)

    assert max(sizes) >= 512 << 20


async def test_tables_are_the_json_of_all_records(pool: RunningPool) -> None:
    async with session_of(pool) as session:
        tables = await session.tables(("host", "VM"))
        refs = await session.fetch("VM.get_all", type=list[str])

    assert set(msgspec.json.decode(tables["VM"])) == set(refs)
    assert set(tables) == {"host", "VM"}


async def test_a_refusal_is_xapis_own(pool: RunningPool) -> None:
    async with session_of(pool) as session:
        for method in (session.call, session.call_async):
            with pytest.raises(errors.XapiFailure) as caught:
                await method("VDI.destroy", "OpaqueRef:none")
            assert caught.value.code == "HANDLE_INVALID"
        with pytest.raises(errors.XapiFailure, match="UUID_INVALID"):
            await session.fetch("VM.get_by_uuid", "none", type=str)


async def test_a_session_ends_with_its_context(pool: RunningPool) -> None:
    async with session_of(pool) as session:
        ref = session.ref

    api = Api(pool, session=ref)
    with pytest.raises(Exception, match="SESSION_INVALID"):
        api.call("VM.get_all")


async def test_an_error_of_the_user_leaves_as_it_is(pool: RunningPool) -> None:
    with pytest.raises(KeyError):
        async with session_of(pool):
            raise KeyError("mine")


async def test_metadata_is_a_tar(pool: RunningPool) -> None:
    api = Api(pool).login()
    web1 = api.text("VM.get_uuid", api.named("VM", "web1"))
    async with session_of(pool) as session:
        assert b"ova.xml" in (await session.export_metadata(web1))[:100]
        with pytest.raises(errors.PoolError):
            await session.export_metadata("none")
        assert await session.fetch("task.get_all", type=list[str]) == []


# ── tasks ────────────────────────────────────────────────────────────────────────────────────────


async def test_a_task_is_waited_for_and_destroyed(pool: RunningPool) -> None:
    async with session_of(pool) as session:
        vdi = await root_of(session)
        snapshot = await session.call_async("VDI.snapshot", vdi, {})
        assert await session.fetch("VDI.get_is_a_snapshot", snapshot, type=bool)
        assert await session.call_async("VDI.destroy", snapshot) == ""
        tasks = await session.fetch("task.get_all", type=list[str])

    assert tasks == []


async def test_a_failed_task_fails_as_the_call_would(pool: RunningPool) -> None:
    pool.set("xapi.fail", "VDI.snapshot:SR_BACKEND_FAILURE_109::chain too long:")
    async with session_of(pool) as session:
        vdi = await root_of(session)
        with pytest.raises(errors.XapiFailure, match="chain too long") as caught:
            await session.call_async("VDI.snapshot", vdi, {})
        assert await session.fetch("task.get_all", type=list[str]) == []

    assert (caught.value.code, caught.value.method) == ("SR_BACKEND_FAILURE_109", "VDI.snapshot")


async def test_what_a_cancelled_task_made_is_undone(pool: RunningPool) -> None:
    pool.set("sr.delay", "300ms")
    undone: list[str] = []

    async with session_of(pool) as session:
        vdi = await root_of(session)

        async def undo(ref: str) -> None:
            undone.append(ref)
            await session.call_async("VDI.destroy", ref)

        before = await session.fetch("VDI.get_snapshots", vdi, type=list[str])
        with trio.move_on_after(0.1) as scope:
            await session.call_async("VDI.snapshot", vdi, {}, undo=undo)
        after = await session.fetch("VDI.get_snapshots", vdi, type=list[str])

        assert scope.cancelled_caught
        assert after == before
        assert await session.fetch("task.get_all", type=list[str]) == []


# ── who is let in ────────────────────────────────────────────────────────────────────────────────


async def refusal(
    pool: RunningPool, *, credentials: Credentials = ROOT, trust: Trust | None = None, host: int = 0
) -> errors.CbtfsError:
    try:
        async with session_of(pool, credentials=credentials, trust=trust, host=host):
            pass
    except errors.CbtfsError as exc:
        return exc
    raise AssertionError("let in")


async def test_a_wrong_password_is_tried_once(pool: RunningPool) -> None:
    wrong = Credentials("root", "wrong")

    found = await refusal(pool, credentials=wrong)

    assert isinstance(found, errors.AuthenticationFailed)
    assert "root" in str(found)
    assert "wrong" not in str(found)
    assert logins(pool) == 1


async def test_a_password_that_changed_is_tried_once_and_never_again(pool: RunningPool) -> None:
    async with session_of(pool) as session:
        pool.control("expire-sessions")
        pool.set("xapi.fail", "session.login_with_password:SESSION_AUTHENTICATION_FAILED:root:no")
        pool.control("reset-counters")
        for _ in range(3):
            with pytest.raises(errors.AuthenticationFailed):
                await session.fetch("VM.get_all", type=list[str])

        assert logins(pool) == 1


@pytest.mark.parametrize("trusted", ["ca", "fingerprint"])
async def test_an_impostor_gets_neither_login_nor_a_byte(pool: RunningPool, trusted: str) -> None:
    pool.set("http.impostor", "*")
    trust = Trust(fingerprints=(fingerprint(pool),)) if trusted == "fingerprint" else None

    found = await refusal(pool, trust=trust)

    assert isinstance(found, errors.AuthenticationFailed)
    assert MASTER in str(found)
    assert pool.stolen() == []


async def test_an_impostor_that_comes_later_gets_nothing_either(pool: RunningPool) -> None:
    async with session_of(pool) as session:
        pool.set("http.impostor", "*")
        with pytest.raises(errors.AuthenticationFailed):
            await session.call("VDI.set_name_label", "ref", "x")

    assert pool.stolen() == []


async def test_a_system_ca_does_not_vouch_for_the_pool(pool: RunningPool) -> None:
    assert isinstance(await refusal(pool, trust=Trust("")), errors.AuthenticationFailed)


@pytest.mark.parametrize(
    ("key", "value"),
    [("http.reset", "*"), ("http.status", "500"), ("xapi.booting", "*")],
)
async def test_a_pool_that_does_not_answer_is_unreachable(
    pool: RunningPool, key: str, value: str
) -> None:
    pool.set(key, value)

    found = await refusal(pool)

    assert isinstance(found, errors.PoolUnreachable)
    assert MASTER in str(found)


async def test_nobody_there_is_unreachable(pool: RunningPool) -> None:
    pool.control("kill-host", "xcp1")

    found = await refusal(pool)

    assert isinstance(found, errors.PoolUnreachable)
    assert "Connection refused" in str(found)


# ── what a session survives ──────────────────────────────────────────────────────────────────────


async def test_an_expired_session_is_renewed_by_one_login(pool: RunningPool) -> None:
    async with session_of(pool) as session:
        old = session.ref
        pool.control("reset-counters")
        pool.control("expire-sessions")

        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(session.call, "pool.get_all")
                nursery.start_soon(session.tables, ["pool"])

        assert session.ref != old
        assert session.generation == 2
        assert logins(pool) == 1


async def test_a_supporter_sends_us_to_the_master(pool: RunningPool) -> None:
    async with session_of(pool, host=1) as session:
        assert session.master == MASTER


async def test_a_master_that_nothing_vouches_for_is_named_and_told_nothing(
    pool: RunningPool,
) -> None:
    found = await refusal(pool, host=1, trust=Trust(fingerprints=(fingerprint(pool, "xcp2"),)))

    assert isinstance(found, errors.AuthenticationFailed)
    assert MASTER in str(found)
    assert fingerprint(pool) in str(found)


async def test_several_fingerprints_cover_several_hosts(pool: RunningPool) -> None:
    both = Trust(fingerprints=(fingerprint(pool, "xcp2"), fingerprint(pool, "xcp1")))

    async with session_of(pool, host=1, trust=both) as session:
        assert session.master == MASTER


@pytest.fixture
def failed_over(pool: RunningPool) -> Iterator[RunningPool]:
    """The pool, to be given another master by the test and its first one back after it."""
    yield pool
    pool.control("revive-host", "xcp1", "xcp2")
    pool.control("failover", "xcp1")


async def test_a_running_session_follows_a_failover(failed_over: RunningPool) -> None:
    trust = Trust(fingerprints=(fingerprint(failed_over),))
    async with session_of(failed_over, trust=trust) as session:
        failed_over.control("failover", "xcp2")
        assert await session.fetch("pool.get_all", type=list[str])
        assert session.master == SUPPORTER

        failed_over.control("failover", "xcp1")
        failed_over.control("kill-host", "xcp2")
        assert await session.call("pool.get_all")
        assert session.master == MASTER


@pytest.mark.parametrize("dead", [False, True])
async def test_a_new_session_finds_a_new_master_by_what_was_learned(
    failed_over: RunningPool, tmp_path: Path, dead: bool
) -> None:
    trust = Trust(fingerprints=(fingerprint(failed_over),))
    async with session_of(failed_over, trust=trust, state=tmp_path):
        pass
    failed_over.control("failover", "xcp2")
    if dead:
        failed_over.control("kill-host", "xcp1")

    async with session_of(failed_over, trust=trust, state=tmp_path) as session:
        assert session.master == SUPPORTER


async def test_a_call_that_changes_something_is_not_sent_to_another_host(
    failed_over: RunningPool,
) -> None:
    async with session_of(failed_over) as session:
        failed_over.set("http.status", "500")
        with pytest.raises(errors.PoolUnreachable):
            await session.call("VDI.set_name_label", "ref", "x")


async def test_no_secret_reaches_a_log(
    failed_over: RunningPool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        async with session_of(failed_over) as session:
            first = session.ref
            failed_over.control("failover", "xcp2")
            await session.fetch("pool.get_all", type=list[str])
            second = session.ref
            text = f"{session!r}{ROOT!r}"

    assert "logged in" in caplog.text
    for secret in (first, second, ROOT.password):
        assert secret not in caplog.text + text


@pytest.mark.parametrize(
    ("result", "value"),
    [
        ("", ""),
        ("OpaqueRef:1", "OpaqueRef:1"),
        ("<value/>", ""),
        ("<value></value>", ""),
        ("<value>OpaqueRef:1</value>", "OpaqueRef:1"),
        ("<value><string>QUJD+/=</string></value>", "QUJD+/="),
        ("<value>a &lt; b</value>", "a < b"),
        ("<value><string>a\r\nb</string></value>", "a\nb"),
        ("<value><int>7</int></value>", "7"),
    ],
)
def test_the_value_of_a_result(result: str, value: str) -> None:
    assert tasks.unwrapped(result) == value


@pytest.mark.parametrize(
    "result",
    [
        "<value>",
        "<value>a</string></value>",
        "<foo/>",
        "<value><int>x</int></value>",
        "<value/></param></params><fault/>",
    ],
)
def test_a_result_that_is_none_is_a_pool_error(result: str) -> None:
    with pytest.raises(errors.PoolError, match="the result of a task"):
        tasks.unwrapped(result)
