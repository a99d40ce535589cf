"""Places at hosts, over tasks and processes: how many, in which order, and when they are free."""

import itertools
import logging
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
import trio.testing

from cbtfs import errors, places
from cbtfs.places import Places

HOLDER = """
import sys, trio
from cbtfs.places import Places

async def hold(host, limit, count):
    own = Places(limit)
    async with trio.open_nursery() as nursery:
        async def one():
            print("begun", flush=True)
            async with own.held({host: host}):
                print("held", flush=True)
                await trio.sleep_forever()
        for _ in range(count):
            nursery.start_soon(one)

trio.run(hold, sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
"""
"""Another process: takes places and holds them until it is killed; says so for each."""


@pytest.fixture
def host() -> str:
    """A host that nobody else on this machine knows."""
    return f"{uuid.uuid4()}:10809"


@pytest.fixture
def other(host: str) -> str:
    return f"{uuid.uuid4()}:10809"


@contextmanager
def held_elsewhere(host: str, *, limit: int, count: int) -> Iterator["subprocess.Popen[str]"]:
    """Hold places in another process."""
    command = [sys.executable, "-c", HOLDER, host, str(limit), str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            told = itertools.islice(process.stdout, 2 * count)
            assert sorted(told) == ["begun\n"] * count + ["held\n"] * count
            yield process
        finally:
            process.kill()


async def is_free(host: str, limit: int, *, within: float = 0.0) -> bool:
    """Tell whether a place is free, or becomes so within some seconds."""
    with trio.move_on_after(within):
        async with Places(limit).held({host: host}):
            return True
    return False


async def holding(own: Places, host: str, nursery: trio.Nursery) -> trio.CancelScope:
    """Hold a place until the scope returned is cancelled; return once it is held."""

    async def hold(task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        with trio.CancelScope() as scope:
            async with own.held({host: host}):
                task_status.started(scope)
                await trio.sleep_forever()

    scope: trio.CancelScope = await nursery.start(hold)
    return scope


# ── how many ─────────────────────────────────────────────────────────────────────────────────


async def test_there_are_as_many_places_as_the_limit(host: str) -> None:
    own = Places(3)
    async with own.held({host: host}), own.held({host: host}):
        assert await is_free(host, 3)
        async with own.held({host: host}):
            assert not await is_free(host, 3)


async def test_a_place_left_is_free(host: str) -> None:
    async with Places(1).held({host: host}):
        pass

    assert await is_free(host, 1)


async def test_every_host_has_its_own(host: str, other: str) -> None:
    async with Places(1).held({host: host}):
        assert await is_free(other, 1)


async def test_other_processes_count(host: str) -> None:
    with held_elsewhere(host, limit=2, count=2):
        assert not await is_free(host, 2)


async def test_a_killed_process_frees_its_places(host: str) -> None:
    with held_elsewhere(host, limit=1, count=1) as process:
        os.kill(process.pid, signal.SIGKILL)

        assert await is_free(host, 1, within=20)


async def test_a_child_does_not_keep_a_place(host: str) -> None:
    async with Places(1).held({host: host}):
        child = child_with_our_descriptors()
    with child:
        assert await is_free(host, 1)
        child.communicate()


def child_with_our_descriptors() -> "subprocess.Popen[bytes]":
    """Start a process that has every descriptor which is not closed on exec; it ends with stdin."""
    return subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False)


async def test_a_smaller_limit_finds_a_place_beside_a_larger(host: str) -> None:
    with held_elsewhere(host, limit=12, count=8):
        assert await is_free(host, 4)


async def test_a_smaller_limit_is_kept(host: str) -> None:
    with held_elsewhere(host, limit=4, count=4):
        assert not await is_free(host, 4)
        assert await is_free(host, 5)


@pytest.mark.parametrize("name", ["x" * 200, "../a\0b/7", "ö"])
async def test_a_hostile_name_of_a_host_is_one(name: str) -> None:
    hostile = f"{name}{uuid.uuid4()}"
    async with Places(1).held({hostile: hostile}):
        assert not await is_free(hostile, 1)
    assert await is_free(hostile, 1)


async def test_a_kernel_that_refuses_is_told(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_PREFIX", "x" * 200)  # longer than any name of a socket

    with pytest.raises(errors.PoolError, match="abstract unix sockets"):
        await is_free(host, 1)


# ── which one ────────────────────────────────────────────────────────────────────────────────


async def test_the_host_with_the_fewest_places_taken_is_first(host: str, other: str) -> None:
    hosts = {host: "a", other: "b"}
    with held_elsewhere(host, limit=12, count=1):
        async with Places(12).held(hosts) as place:
            assert place.host == other


async def test_a_process_spreads_its_own_over_the_hosts(host: str, other: str) -> None:
    own, hosts = Places(12), {host: "a", other: "b"}
    async with own.held(hosts) as a, own.held(hosts) as b, own.held(hosts) as c:
        async with own.held(hosts) as d:
            taken = [place.host for place in (a, b, c, d)]

    assert sorted(taken) == sorted([host, other] * 2)


async def test_a_host_of_the_last_resort_is_taken_when_the_others_are_full(
    host: str, other: str
) -> None:
    own, hosts = Places(1), {host: "a", other: "b"}
    async with own.held(hosts, last=[host]) as first, own.held(hosts, last=[host]) as second:
        assert (first.host, second.host) == (other, host)


# ── waiting ──────────────────────────────────────────────────────────────────────────────────


async def test_who_waits_gets_what_becomes_free_at_any_of_its_hosts(host: str, other: str) -> None:
    own = Places(1)
    async with trio.open_nursery() as nursery:
        await holding(own, host, nursery)
        freed = await holding(own, other, nursery)
        nursery.start_soon(cancel_when_waiting, own, freed)
        with trio.fail_after(20):
            async with own.held({host: "a", other: "b"}) as place:
                assert place.host == other
                assert place.waited
        nursery.cancel_scope.cancel()


async def cancel_when_waiting(own: Places, scope: trio.CancelScope) -> None:
    await trio.testing.wait_all_tasks_blocked()
    assert "1 waiting" in repr(own)
    scope.cancel()


async def test_who_need_not_wait_has_not_waited(host: str) -> None:
    async with Places(1).held({host: host}) as place:
        assert not place.waited


async def test_who_came_first_is_first(host: str) -> None:
    own, order = Places(1), list[int]()

    async def use(number: int) -> None:
        async with own.held({host: host}):
            order.append(number)

    async with trio.open_nursery() as nursery:
        freed = await holding(own, host, nursery)
        for number in range(5):
            nursery.start_soon(use, number)
            await trio.testing.wait_all_tasks_blocked()
        freed.cancel()

    assert order == [0, 1, 2, 3, 4]


async def test_who_waits_for_one_host_holds_up_nobody_at_another(host: str, other: str) -> None:
    own = Places(1)
    async with trio.open_nursery() as nursery:
        await holding(own, host, nursery)
        nursery.start_soon(holding, own, host, nursery)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(20):
            async with own.held({other: other}):
                assert "1 waiting" in repr(own)
        nursery.cancel_scope.cancel()


async def test_cancelled_while_waiting_takes_nothing(host: str) -> None:
    own = Places(1)
    async with trio.open_nursery() as nursery:
        freed = await holding(own, host, nursery)
        with trio.move_on_after(0.01):
            async with own.held({host: host}):
                raise AssertionError("there was none")
        freed.cancel()

    assert repr(own) == "<Places {} of 1, 0 waiting>"
    assert await is_free(host, 1)


async def test_when_the_first_gives_up_the_next_is_served(host: str) -> None:
    own, impatient = Places(1), trio.CancelScope()

    async def give_up() -> None:
        with impatient:
            async with own.held({host: host}):
                raise AssertionError("there was none")

    async with trio.open_nursery() as nursery:
        freed = await holding(own, host, nursery)
        nursery.start_soon(give_up)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(20):
            nursery.start_soon(end_both, impatient, freed)
            async with own.held({host: host}) as place:
                assert place.waited


async def end_both(*scopes: trio.CancelScope) -> None:
    for scope in scopes:
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()


async def test_a_process_with_a_queue_leaves_some_to_others(host: str) -> None:
    own = Places(1)

    async def again_and_again() -> None:
        while True:
            async with own.held({host: host}):
                await trio.sleep(0.05)  # others look in vain while it is held, mostly

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(again_and_again)
        with trio.fail_after(25):
            await trio.to_thread.run_sync(take_elsewhere, host, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()


def take_elsewhere(host: str) -> None:
    with held_elsewhere(host, limit=1, count=1):
        pass


# ── telling ──────────────────────────────────────────────────────────────────────────────────


async def told(
    own: Places, host: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Return what is said of two who wait, long after they lost patience."""
    monkeypatch.setattr(places, "PATIENCE", 0.0)
    monkeypatch.setattr(places, "PAUSE", 0.001)
    caplog.set_level(logging.WARNING)
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(holding, own, host, nursery)
        with trio.move_on_after(0.5):
            await trio.sleep_forever()
        nursery.cancel_scope.cancel()
    return caplog.messages


async def test_waiting_for_other_processes_is_told_once(
    host: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held_elsewhere(host, limit=3, count=3):
        (text,) = await told(Places(3), host, caplog, monkeypatch)

    assert f"to {host}: other processes on this machine hold all 3" in text


async def test_the_share_of_other_processes_is_told(
    host: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Places(3)
    async with own.held({host: host}):
        with held_elsewhere(host, limit=3, count=2):
            (text,) = await told(own, host, caplog, monkeypatch)

    assert "hold 2 of the 3" in text


async def test_waiting_for_oneself_is_not_told(
    host: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Places(1)
    async with own.held({host: host}):
        assert await told(own, host, caplog, monkeypatch) == []
