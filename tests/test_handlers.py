"""JSON-RPC and xapi's handlers over HTTP: what each answer means."""

import gc
import gzip
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio
import trio.testing

from cbtfs import errors, handlers, tls, units
from cbtfs.handlers import Beginning, Moved, Web
from cbtfs.wire import NoAnswer

from .hosts import Certificate, Xapi, certificate, http, serving

HOST = "127.0.0.1"
REF = "OpaqueRef:36dd30a9-4eae-4f37-9df9-a3ad1a7dcd2a"


@pytest.fixture
def own() -> Certificate:
    return certificate("xcp1.test", HOST)


class Client:
    """A ``Web`` to one host."""

    def __init__(self, web: Web, trusted: Certificate) -> None:
        self.asked: list[str] = []
        self._web = web
        self._context = tls.pin(trusted.pem)

    async def post(self) -> bytes:
        return await self._web.post(HOST, self._context, "VM.get_all", ("OpaqueRef:secret",))

    async def get(self) -> bytes:
        query = {"uuid": "some uuid"}
        return await self._web.get(
            HOST, self._context, "/export_metadata", query=query, session="OpaqueRef:secret"
        )

    async def peek(self, take: Callable[[bytes], bool], *, silence: float = 5) -> None:
        wanted = Beginning("/export_raw_vdi", {"vdi": REF, "task_id": REF}, take, silence)
        await self._web.peek(
            HOST, self._context, wanted, session=REF, asked=lambda: self.asked.append("asked")
        )


@asynccontextmanager
async def client_of(
    xapi: Xapi, *, trusted: Certificate | None = None, patience: float = 5
) -> AsyncGenerator[Client]:
    async with serving(xapi.serve) as port:
        web = Web(port, timeout=patience)
        yield Client(web, trusted or xapi.shown)
        await web.close()


async def test_a_call_is_json_rpc_2_and_its_result_is_left_as_json(own: Certificate) -> None:
    xapi = Xapi(own, http(b'{"jsonrpc":"2.0","result":{"a": [1 ]},"id":1}'))

    async with client_of(xapi) as client:
        assert await client.post() == b'{"a": [1 ]}'
        await client.post()

    call = msgspec.json.decode(xapi.bodies[0])
    assert call["jsonrpc"] == "2.0"
    assert (call["method"], call["params"]) == ("VM.get_all", ["OpaqueRef:secret"])
    assert "id" in call
    assert xapi.connections == 1


async def test_a_refusal_is_xapis_own(own: Certificate) -> None:
    refusal = b'{"jsonrpc":"2.0","error":{"code":1,"message":"HANDLE_INVALID","data":["VM","x"]}}'

    async with client_of(Xapi(own, http(refusal))) as client:
        with pytest.raises(errors.XapiFailure) as caught:
            await client.post()

    assert (caught.value.code, caught.value.params) == ("HANDLE_INVALID", ("VM", "x"))


async def test_a_handler_is_given_the_session_as_a_cookie_in_a_short_header(
    own: Certificate,
) -> None:
    xapi = Xapi(own, http(b"tar"))

    async with client_of(xapi) as client:
        assert await client.get() == b"tar"

    (head,) = xapi.heads
    assert head.startswith(b"GET /export_metadata?uuid=some")
    assert b"session_id=OpaqueRef:secret" in head
    assert b"secret" not in head.split(b"\r\n")[0]
    assert len(head) < 512  # xapi takes 1024, references are longer than these


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (http(b"", "500 Booting"), NoAnswer),
        (http(b"", "401 Unauthorized"), errors.XapiFailure),
        (http(b"", "403 Forbidden"), errors.PoolError),
        (http(b"<html>"), errors.PoolError),
        (http(b'{"result":[1'), errors.PoolError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n", NoAnswer),
        (b"", NoAnswer),
        (http(b'{"result":' + b"[" * 100_000), errors.PoolError),
    ],
)
async def test_other_answers_are_errors(
    own: Certificate, answer: bytes, expected: type[Exception]
) -> None:
    async with client_of(Xapi(own, answer), patience=0.2) as client:
        with pytest.raises(expected) as caught:
            await client.post()

    assert "secret" not in str(caught.value)


async def test_an_answer_without_end_is_given_up(
    own: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers, "LONGEST", 1 << 20)

    async with client_of(Xapi(own, http(bytes(2 << 20)))) as client:
        with pytest.raises(errors.PoolError, match="no end"):
            await client.post()


async def test_nothing_is_unpacked(own: Certificate) -> None:
    body = gzip.compress(b'{"result":1}')
    packed = http(body).replace(b"\r\n", b"\r\nContent-Encoding: gzip\r\n", 1)

    async with client_of(Xapi(own, packed)) as client:
        with pytest.raises(errors.PoolError, match="no form that xapi uses"):
            await client.post()


async def test_a_handlers_500_is_a_refusal(own: Certificate) -> None:
    async with client_of(Xapi(own, http(b"", "500 Internal Error"))) as client:
        with pytest.raises(errors.PoolError, match="HTTP 500"):
            await client.get()


async def test_an_impostor_gets_no_request(own: Certificate) -> None:
    xapi = Xapi(certificate("xcp1.test", HOST, serial=2), http(b"{}"))

    async with client_of(xapi, trusted=own) as client:
        for request in (client.post, client.get):
            with pytest.raises(errors.AuthenticationFailed):
                await request()

    assert xapi.heads == []


async def test_cancelled_in_the_handshake_it_leaves_no_socket_behind(own: Certificate) -> None:
    greeted, hung_up = trio.Event(), trio.Event()

    async def silent(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        greeted.set()
        await stream.receive_some()
        hung_up.set()

    async with serving(silent) as port:
        web = Web(port, timeout=5)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(web.post, HOST, tls.pin(own.pem), "VM.get_all", ("x",))
            await greeted.wait()
            nursery.cancel_scope.cancel()
        gc.disable()  # which would hang up, too
        try:
            with trio.fail_after(5):
                await hung_up.wait()
        finally:
            gc.enable()
        await web.close()


async def test_cancelled_while_it_sends_it_leaves_nothing_to_the_garbage_collector(
    own: Certificate,
) -> None:
    begun = trio.Event()

    async def deaf(stream: trio.SocketStream) -> None:
        secured = trio.SSLStream(stream, own.server_context(), server_side=True)
        await secured.receive_some()
        begun.set()
        await trio.sleep_forever()

    async with serving(deaf) as port:
        web = Web(port, timeout=5)
        async with trio.open_nursery() as nursery:
            long = "x" * 32 * units.MiB  # more than the sockets take
            nursery.start_soon(web.post, HOST, tls.pin(own.pem), "VM.get_all", (long,))
            await begun.wait()
            await trio.testing.wait_all_tasks_blocked(0.1)
            nursery.cancel_scope.cancel()
        gc.collect()  # here the tests would be told
        await web.close()


async def test_silence_and_refusal_are_no_answer(own: Certificate) -> None:
    async with client_of(Xapi(own, b"silence"), patience=0.1) as client:
        with pytest.raises(NoAnswer, match="silent"):
            await client.post()
    web = Web(1, timeout=1)
    with pytest.raises(NoAnswer, match="Connection refused"):
        await web.post(HOST, tls.pin(own.pem), "VM.get_all", ())


async def test_no_proxy_is_asked(own: Certificate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")

    async with client_of(Xapi(own, http(b'{"result":1}'))) as client:
        assert await client.post() == b"1"


async def test_calls_may_overlap(own: Certificate) -> None:
    xapi = Xapi(own, http(b'{"result":1}'))

    async with client_of(xapi) as client, trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(client.post)

    assert len(xapi.bodies) == 5


# ── the beginning of an answer ───────────────────────────────────────────────────────────────────


def moved(location: str) -> bytes:
    """Return a redirect."""
    head = f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n"
    return head.encode()


async def test_no_more_is_taken_than_is_wanted(own: Certificate) -> None:
    taken: list[bytes] = []

    def take(part: bytes) -> bool:
        taken.append(part)
        return True

    async with client_of(Xapi(own, http(bytes(8 << 20)))) as client:
        await client.peek(take)

    assert len(taken) == 1
    assert len(taken[0]) < 1 << 20


async def test_an_error_of_whoever_takes_ends_it(own: Certificate) -> None:
    def take(part: bytes) -> bool:
        raise errors.AllocationUnknown("enough")

    async with client_of(Xapi(own, http(bytes(8 << 20)))) as client:
        with pytest.raises(errors.AllocationUnknown, match="enough"):
            await client.peek(take)


async def test_an_end_before_there_is_enough_is_an_error(own: Certificate) -> None:
    async with client_of(Xapi(own, http(b"too short"))) as client:
        with pytest.raises(errors.PoolError, match="too early"):
            await client.peek(lambda part: False)


async def test_the_request_for_a_beginning_is_short(own: Certificate) -> None:
    xapi = Xapi(own, http(b"x"))

    async with client_of(xapi) as client:
        await client.peek(lambda part: True)

    (head,) = xapi.heads
    assert REF.encode() not in head.split(b"\r\n")[0]  # a session in a URL gets into logs
    assert f"session_id={REF}".encode() in head
    assert len(head) < 512


@pytest.mark.parametrize(
    ("location", "host"),
    [
        ("https://127.0.0.3/export_raw_vdi?vdi=x", "127.0.0.3"),
        ("https://127.0.0.3:8443/else", "127.0.0.3"),
        ("https://[fd00::1]/", "fd00::1"),
        ("https://xcp2.test", "xcp2.test"),
    ],
)
async def test_of_a_redirect_only_the_host_is_taken(
    own: Certificate, location: str, host: str
) -> None:
    async with client_of(Xapi(own, moved(location))) as client:
        with pytest.raises(Moved) as caught:
            await client.peek(lambda part: True)

    assert caught.value.host == host


@pytest.mark.parametrize(
    "location", ["", "/", "http://127.0.0.3/", "https://", "https://[::1", "file:///etc/passwd"]
)
async def test_a_redirect_to_nowhere_is_an_error(own: Certificate, location: str) -> None:
    async with client_of(Xapi(own, moved(location))) as client:
        with pytest.raises((errors.PoolError, NoAnswer), match=r"nowhere|Invalid URL"):
            await client.peek(lambda part: True)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("401 Unauthorized", errors.XapiFailure),
        ("403 Forbidden", errors.PoolError),
        ("404 Not Found", errors.PoolError),
        ("500 Internal Error", errors.PoolError),
        ("206 Partial Content", errors.PoolError),
    ],
)
async def test_another_status_is_no_beginning(
    own: Certificate, status: str, expected: type[Exception]
) -> None:
    taken: list[bytes] = []

    def take(part: bytes) -> bool:
        taken.append(part)
        return False

    async with client_of(Xapi(own, http(b"<html>", status))) as client:
        with pytest.raises(expected):
            await client.peek(take)

    assert taken == []


async def test_a_host_is_asked_only_once_it_has_proved_itself(own: Certificate) -> None:
    xapi = Xapi(certificate("xcp1.test", HOST, serial=2), http(b"{}"))

    async with client_of(xapi, trusted=own) as client:
        with pytest.raises(errors.AuthenticationFailed):
            await client.peek(lambda part: True)
        assert client.asked == []


async def test_a_host_that_was_asked_is_not_waited_for_for_ever(own: Certificate) -> None:
    async with client_of(Xapi(own, b"silence")) as client:
        with pytest.raises(NoAnswer, match="silent"):
            await client.peek(lambda part: True, silence=0.2)
        assert client.asked == ["asked"]
