"""Bodies sent to a handler that answers before it reads, and all that it may answer instead."""

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace

import pytest
import trio

from cbtfs import errors, tls, upload
from cbtfs.handlers import Moved
from cbtfs.upload import Host, Upload
from cbtfs.wire import NoAnswer

from .hosts import Certificate, certificate, serving

BODY: list[bytes | memoryview] = [b"first", b"", bytes(300_000), memoryview(b"last")]
LENGTH = sum(map(len, BODY))


@dataclass
class Handler:
    """A host that answers once it has the head; then it takes what comes, if it is to.

    Attributes:
        answer: sent as it is; nothing if there is none.
        takes: whether it takes the body.
        stays: whether it stays without a word instead.
    """

    shown: Certificate
    answer: bytes | None = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
    takes: bool = True
    stays: bool = False
    head: bytes = b""
    body: bytearray = field(default_factory=bytearray)
    taken: trio.Event = field(default_factory=trio.Event)
    ended: trio.Event = field(default_factory=trio.Event)

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection."""
        secured = trio.SSLStream(
            stream, self.shown.server_context(), server_side=True, https_compatible=True
        )
        try:
            while b"\r\n\r\n" not in self.head:
                self.head += bytes(await secured.receive_some())
            self.head, _, rest = self.head.partition(b"\r\n\r\n")
            assert not rest, "the body came before it was asked for"
            if self.answer:
                await secured.send_all(self.answer)
            if self.stays:
                await trio.sleep_forever()
            while self.takes and (part := bytes(await secured.receive_some())):
                self.body += part
                if len(self.body) >= LENGTH:
                    self.taken.set()
        finally:
            self.ended.set()


@pytest.fixture
def handler() -> Handler:
    return Handler(certificate("xcp1.test", "127.0.0.1"))


@pytest.fixture
async def host(handler: Handler) -> AsyncGenerator[Host]:
    async with serving(handler.serve) as port:
        yield Host("127.0.0.1", port, tls.pin(handler.shown.pem), "OpaqueRef:s")


def upload_of(parts: list[bytes | memoryview], *, length: int = LENGTH, query: str = "x") -> Upload:
    async def body() -> AsyncGenerator[bytes | memoryview]:
        for part in parts:
            yield part

    return Upload("/import_raw_vdi", {"vdi": query}, length, body)


def never() -> None:
    pytest.fail("it may have received something")


async def send(
    host: Host, what: Upload | None = None, *, asked: Callable[[], None] = lambda: None
) -> None:
    with trio.fail_after(10):
        async with upload.sent(what or upload_of(BODY), host, asked=asked):
            pass


async def test_the_body_arrives_once_it_is_asked_for(handler: Handler, host: Host) -> None:
    told: list[bytes] = []

    async with upload.sent(upload_of(BODY), host, asked=lambda: told.append(bytes(handler.head))):
        await handler.taken.wait()

    assert handler.body == b"".join(BODY)
    assert told == [b""]  # before the first byte went
    lines = handler.head.split(b"\r\n")
    assert lines[0] == b"PUT /import_raw_vdi?vdi=x HTTP/1.1"
    assert b"Cookie: session_id=OpaqueRef:s" in lines
    assert b"Content-Length: %d" % LENGTH in lines


async def test_the_connection_is_open_as_long_as_the_block(handler: Handler, host: Host) -> None:
    async with upload.sent(upload_of(BODY), host, asked=lambda: None):
        await handler.taken.wait()
        await trio.sleep(0.05)
        assert not handler.ended.is_set()
    with trio.fail_after(5):
        await handler.ended.wait()


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (b"HTTP/1.1 401 Unauthorised\r\n\r\n", errors.XapiFailure, "SESSION_INVALID"),
        (b"HTTP/1.1 500 Internal\r\n\r\n", errors.PoolError, "HTTP 500"),
        (b"HTTP/1.1\r\n\r\n", errors.PoolError, "HTTP nonsense"),
        (b"220 mail.test\r\n\r\n", errors.PoolError, "HTTP nonsense"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://10.0.0.1/\r\n\r\n", errors.PoolError, "nowhere"),
        (b"HTTP/1.1 302 Found\r\nLocation: https://[::/\r\n\r\n", errors.PoolError, "nowhere"),
        (b"HTTP/1.1 302 Found\r\n\r\n", errors.PoolError, "nowhere"),
        (b"x" * 100_000, NoAnswer, "hung up"),
        (b"HTTP/1.1 200 OK\r\n", NoAnswer, "hung up"),
        (b"", NoAnswer, "hung up"),
    ],
)
async def test_an_answer_that_asks_for_no_body_gets_none(
    handler: Handler, host: Host, answer: bytes, error: type[Exception], text: str
) -> None:
    handler.answer, handler.takes = answer, False

    with pytest.raises(error, match=text):
        await send(host)

    assert not handler.body


async def test_another_host_is_named_and_nothing_else_taken_from_the_answer(
    handler: Handler, host: Host
) -> None:
    handler.answer = b"HTTP/1.1 302 Found\r\nlocation: https://10.0.0.7:99/evil?x=y\r\n\r\n"
    handler.takes = False

    with pytest.raises(Moved) as caught:
        await send(host)

    assert caught.value.host == "10.0.0.7"


@pytest.mark.parametrize("length", [LENGTH - 1, LENGTH + 1])
async def test_a_body_of_another_length_is_an_error(host: Host, length: int) -> None:
    with pytest.raises(errors.PoolError, match="another length than announced"):
        await send(host, upload_of(BODY, length=length))


async def test_a_head_that_xapi_would_not_take_is_not_sent(handler: Handler, host: Host) -> None:
    with pytest.raises(errors.PoolError, match="no request as long"):
        await send(host, upload_of(BODY, query="x" * 1000))

    assert not handler.head


async def test_no_stranger_is_told_the_session(handler: Handler, host: Host) -> None:
    expected = certificate("xcp1.test", "127.0.0.1", serial=2)

    with pytest.raises(errors.AuthenticationFailed):
        await send(replace(host, context=tls.pin(expected.pem)), asked=never)

    assert not handler.head


@pytest.mark.parametrize("answer", [None, Handler.answer])
async def test_silence_is_not_waited_for_without_end(
    handler: Handler, host: Host, answer: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the answer, and when the body is not taken."""
    monkeypatch.setattr(upload, "SILENCE", 0.3)
    handler.answer, handler.stays = answer, True
    much: list[bytes | memoryview] = [bytes(1 << 20)] * 64

    with pytest.raises(NoAnswer, match="silent"):
        await send(host, upload_of(much, length=64 << 20))


async def test_nobody_listens(host: Host) -> None:
    with pytest.raises((NoAnswer, OSError)):
        await send(replace(host, port=1), asked=never)
