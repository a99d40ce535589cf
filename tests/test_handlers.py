"""JSON-RPC and xapi's handlers over HTTP: what each answer means."""

import gzip
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio

from cbtfs import errors, handlers, tls
from cbtfs.handlers import Web
from cbtfs.wire import NoAnswer

from .hosts import Certificate, Xapi, certificate, http, serving

HOST = "127.0.0.1"


@pytest.fixture
def own() -> Certificate:
    return certificate("xcp1.test", HOST)


class Client:
    """A ``Web`` to one host."""

    def __init__(self, web: Web, trusted: Certificate) -> None:
        self._web = web
        self._context = tls.pin(trusted.pem)

    async def post(self) -> bytes:
        return await self._web.post(HOST, self._context, "VM.get_all", ("OpaqueRef:secret",))

    async def get(self) -> bytes:
        query = {"uuid": "some uuid"}
        return await self._web.get(
            HOST, self._context, "/export_metadata", query=query, session="OpaqueRef:secret"
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
