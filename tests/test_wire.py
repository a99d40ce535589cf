"""One call on one line: sent once, over a verified connection, and failing in few ways."""

import ssl
import xmlrpc.client
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from cbtfs import errors, tls, wire
from cbtfs.wire import Line, Lines, NoAnswer

from .hosts import Certificate, Xapi, certificate, http, serving

SUCCESS = {"Status": "Success", "Value": "done"}


@pytest.fixture
def own() -> Certificate:
    return certificate("xcp1.test", "127.0.0.1")


@asynccontextmanager
async def line_to(xapi: Xapi, context: ssl.SSLContext | None = None) -> AsyncGenerator[Line]:
    async with serving(xapi.serve) as port:
        trust = context or tls.pin(xapi.shown.pem)
        line = Line("127.0.0.1", port, context=trust, timeout=5)
        yield line
        line.discard()


async def call(line: Line, method: str, *params: object) -> object:
    return await trio.to_thread.run_sync(line.call, method, params)


async def test_a_line_carries_one_call_after_another(own: Certificate) -> None:
    xapi = Xapi(own, SUCCESS)

    async with line_to(xapi) as line:
        assert await call(line, "VDI.get_uuid", "ref") == "done"
        assert await call(line, "VDI.get_uuid", "ref") == "done"

    assert (xapi.connections, len(xapi.bodies)) == (1, 2)


async def test_integers_and_records_are_sent_as_xapi_takes_them(own: Certificate) -> None:
    xapi = Xapi(own, SUCCESS)
    record = {"virtual_size": 1 << 44, "sharable": False, "names": ["a", 7], "other": {"x": 1}}

    async with line_to(xapi) as line:
        await call(line, "VDI.create", record)

    (sent,), method = xmlrpc.client.loads(xapi.bodies[0])
    assert method == "VDI.create"
    assert sent == {
        "virtual_size": str(1 << 44),
        "sharable": False,
        "names": ["a", "7"],
        "other": {"x": "1"},
    }


async def test_a_refusal_carries_xapis_code_and_parameters(own: Certificate) -> None:
    refusal = {"Status": "Failure", "ErrorDescription": ["VDI_IN_USE", "OpaqueRef:1", "destroy"]}

    async with line_to(Xapi(own, refusal)) as line:
        with pytest.raises(errors.XapiFailure) as caught:
            await call(line, "VDI.destroy", "ref")

    assert caught.value.code == "VDI_IN_USE"
    assert caught.value.params == ("OpaqueRef:1", "destroy")
    assert "OpaqueRef" not in str(caught.value)


async def test_an_expired_session_is_not_renewed_in_secret(own: Certificate) -> None:
    xapi = Xapi(own, {"Status": "Failure", "ErrorDescription": ["SESSION_INVALID", "ref"]})

    async with line_to(xapi) as line:
        with pytest.raises(errors.XapiFailure, match="SESSION_INVALID"):
            await call(line, "VDI.get_uuid", "ref")

    assert len(xapi.bodies) == 1


@pytest.mark.parametrize("answer", [b"HTTP/1.1 500 Booting\r\nContent-Length: 0\r\n\r\n", b""])
async def test_a_call_is_sent_once_whatever_happens(own: Certificate, answer: bytes) -> None:
    xapi = Xapi(own, answer)

    async with line_to(xapi) as line:
        with pytest.raises(NoAnswer) as caught:
            await call(line, "VM.snapshot", "ref")

    assert caught.value.sent
    assert len(xapi.bodies) == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>",
        {"Status": "Perhaps"},
        "nothing",
        {"Status": ["Success"]},
    ],
)
async def test_what_is_no_xapi_is_a_pool_error(own: Certificate, answer: object) -> None:
    async with line_to(Xapi(own, answer)) as line:
        with pytest.raises(errors.PoolError):
            await call(line, "VDI.get_uuid", "ref")


@pytest.mark.parametrize(
    "value",
    [
        "<int>x</int>",
        "<boolean>2</boolean>",
        "<base64>x</base64>",
        "<struct><value>a</value></struct>",
        "<struct><member><name><value><struct></struct></value></name></member></struct>",
    ],
)
async def test_values_that_are_none_are_a_pool_error(own: Certificate, value: str) -> None:
    body = (
        f"<methodResponse><params><param><value>{value}</value></param></params></methodResponse>"
    )

    async with line_to(Xapi(own, http(body.encode()))) as line:
        with pytest.raises(errors.PoolError, match="something else than XML-RPC"):
            await call(line, "VDI.get_uuid", "ref")


async def test_an_answer_without_end_is_given_up(
    own: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "LONGEST", 1 << 20)

    async with line_to(Xapi(own, http(b"<methodResponse>" + b" " * (2 << 20)))) as line:
        with pytest.raises(errors.PoolError, match="no end"):
            await call(line, "VDI.get_uuid", "ref")


async def test_an_impostor_gets_no_call(own: Certificate) -> None:
    xapi = Xapi(certificate("xcp1.test", "127.0.0.1", serial=2), SUCCESS)

    async with line_to(xapi, tls.pin(own.pem)) as line:
        with pytest.raises(errors.AuthenticationFailed):
            await call(line, "session.login_with_password", "root", "secret")

    assert xapi.bodies == []


async def test_nobody_there_has_not_got_the_call(own: Certificate) -> None:
    line = Line("127.0.0.1", 1, context=tls.pin(own.pem), timeout=5)

    with pytest.raises(NoAnswer, match="Connection refused") as caught:
        await call(line, "VM.snapshot", "ref")

    assert not caught.value.sent


async def in_lines(
    xapi: Xapi, use: Callable[[Callable[[str], Awaitable[object]]], Awaitable[None]]
) -> None:
    async with serving(xapi.serve) as port:
        lines = Lines(port, timeout=5)
        context = tls.pin(xapi.shown.pem)
        await use(lambda method: lines.call("127.0.0.1", context, method, ("ref",)))
        lines.close()


async def test_a_line_that_was_of_use_just_now_is_used_again(own: Certificate) -> None:
    xapi = Xapi(own, SUCCESS)

    async def use(send: Callable[[str], Awaitable[object]]) -> None:
        for method in ("VDI.get_uuid", "VM.snapshot", "VDI.get_uuid", "VM.destroy"):
            await send(method)

    await in_lines(xapi, use)

    assert (xapi.connections, len(xapi.bodies)) == (1, 4)


async def test_of_older_lines_only_reads_make_use(
    own: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "FRESH", 0)
    xapi = Xapi(own, SUCCESS)

    async def use(send: Callable[[str], Awaitable[object]]) -> None:
        for method in ("VDI.get_uuid", "VM.snapshot", "VDI.get_uuid", "VM.get_record"):
            await send(method)

    await in_lines(xapi, use)

    assert xapi.connections == 2


async def test_no_change_is_sent_over_a_line_that_its_host_has_closed(own: Certificate) -> None:
    xapi = Xapi(own, SUCCESS)
    xapi.hangs_up = True

    async def use(send: Callable[[str], Awaitable[object]]) -> None:
        for _ in range(5):
            assert await send("VM.snapshot") == "done"
            with trio.fail_after(5):
                while xapi.open:  # noqa: ASYNC110 - until the server has hung up
                    await trio.sleep(0.001)

    await in_lines(xapi, use)

    assert (xapi.connections, len(xapi.bodies)) == (5, 5)


async def test_few_lines_stay_open_however_many_calls_had_a_new_one(
    own: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "FRESH", 0)
    xapi = Xapi(own, SUCCESS)

    async def use(send: Callable[[str], Awaitable[object]]) -> None:
        for _ in range(30):
            await send("VM.snapshot")
        with trio.fail_after(10):
            while xapi.open > 8:  # noqa: ASYNC110 - until the server sees that they were closed
                await trio.sleep(0.01)

    await in_lines(xapi, use)

    assert xapi.connections == 30


async def test_calls_at_the_same_time_have_a_line_each(own: Certificate) -> None:
    xapi = Xapi(own, SUCCESS)

    async def use(send: Callable[[str], Awaitable[object]]) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(send, "VDI.get_uuid")

    await in_lines(xapi, use)

    assert len(xapi.bodies) == 4
    assert xapi.connections > 1


async def test_a_read_that_is_cancelled_is_left_behind(own: Certificate) -> None:
    xapi = Xapi(own, b"silence")

    async def use(send: Callable[[str], Awaitable[object]]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, "VDI.get_uuid")
            await xapi.silent.wait()
            nursery.cancel_scope.cancel()

    with trio.fail_after(4):
        await in_lines(xapi, use)


@pytest.mark.parametrize(
    ("method", "repeatable"),
    [
        ("VDI.get_nbd_info", True),
        ("pool.get_all_records", True),
        ("VM.snapshot", False),
        ("Async.VM.snapshot", False),
        ("session.login_with_password", False),
    ],
)
def test_only_getters_may_be_repeated(method: str, repeatable: bool) -> None:
    assert wire.is_repeatable(method) is repeatable
