"""Whom TLS believes, and what a peer hears before it is believed."""

import ssl
from pathlib import Path

import pytest
import trio

from cbtfs import errors, tls

from .hosts import Certificate, ca_file, certificate, serving


class TlsHost:
    """A TLS server that notes what it is told after the handshake."""

    def __init__(self, shown: Certificate) -> None:
        self.shown = shown
        self.heard = b""

    async def serve(self, stream: trio.SocketStream) -> None:
        secured = trio.SSLStream(stream, self.shown.server_context(), server_side=True)
        self.heard += await secured.receive_some() or b""


@pytest.fixture
def own() -> Certificate:
    return certificate("xcp1.test", "127.0.0.1")


@pytest.fixture
def other() -> Certificate:
    return certificate("xcp1.test", "127.0.0.1", serial=2)


async def test_a_pin_accepts_its_certificate_whatever_its_names() -> None:
    nameless = certificate()

    async with serving(TlsHost(nameless).serve) as port:
        shown = await tls.probe("127.0.0.1", port, context=tls.pin(nameless.pem))

    assert tls.fingerprint(shown) == tls.fingerprint(nameless.pem)


async def test_a_pin_refuses_another_certificate_with_the_same_names(
    own: Certificate, other: Certificate
) -> None:
    host = TlsHost(other)

    async with serving(host.serve) as port:
        with pytest.raises(errors.AuthenticationFailed, match="certificate"):
            await tls.probe("127.0.0.1", port, context=tls.pin(own.pem))

    assert host.heard == b""


async def test_a_hosts_own_certificate_may_stand_in_the_ca_file(
    tmp_path: Path, own: Certificate, other: Certificate
) -> None:
    context = tls.ca(ca_file(tmp_path, other, own))

    async with serving(TlsHost(own).serve) as port:
        assert await tls.probe("127.0.0.1", port, context=context)


async def test_a_certificate_of_the_ca_file_counts_only_for_its_names(tmp_path: Path) -> None:
    elsewhere = certificate("xcp9.test", "127.0.0.9")
    context = tls.ca(ca_file(tmp_path, elsewhere))

    async with serving(TlsHost(elsewhere).serve) as port:
        with pytest.raises(errors.AuthenticationFailed, match="mismatch"):
            await tls.probe("127.0.0.1", port, context=context)


async def test_the_systems_cas_do_not_vouch_for_a_self_signed_host(own: Certificate) -> None:
    async with serving(TlsHost(own).serve) as port:
        with pytest.raises(errors.AuthenticationFailed):
            await tls.probe("127.0.0.1", port, context=tls.ca())


@pytest.mark.parametrize("text", [None, "", "no certificate"])
def test_a_useless_ca_file_is_a_configuration_error(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "ca.pem"
    if text is not None:
        path.write_text(text)

    with pytest.raises(errors.ConfigError, match="ca_file"):
        tls.ca(str(path))


def test_what_is_no_certificate_cannot_be_pinned() -> None:
    for inside in ("AAAA", "A", "\xe9", ""):
        pem = f"-----BEGIN CERTIFICATE-----\n{inside}\n-----END CERTIFICATE-----"
        with pytest.raises(errors.PoolError):
            tls.pin(pem)
    with pytest.raises(errors.PoolError):
        tls.pin("")


@pytest.mark.parametrize("inside", ["A", "\xe9"])
def test_what_is_no_certificate_has_no_fingerprint(inside: str) -> None:
    with pytest.raises(errors.PoolError):
        tls.fingerprint(f"-----BEGIN CERTIFICATE-----\n{inside}\n-----END CERTIFICATE-----")


async def test_fetching_a_certificate_sends_nothing(own: Certificate) -> None:
    host = TlsHost(own)

    async with serving(host.serve) as port:
        shown = await tls.fetch_certificate("127.0.0.1", port)

    assert tls.fingerprint(shown) == tls.fingerprint(own.pem)
    assert host.heard == b""


async def test_a_peer_without_tls_is_refused() -> None:
    async def plain(stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with serving(plain) as port:
        with pytest.raises(errors.AuthenticationFailed, match="does not do TLS"):
            await tls.fetch_certificate("127.0.0.1", port)


async def test_a_peer_that_hangs_up_is_a_failed_connection() -> None:
    async def rude(stream: trio.SocketStream) -> None:
        await stream.receive_some()

    async with serving(rude) as port:
        with pytest.raises(OSError, match="hung up"):
            await tls.fetch_certificate("127.0.0.1", port)


async def test_a_refused_connection_is_explained_in_the_systems_words() -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - its words are looked at below
        await tls.fetch_certificate("127.0.0.1", 1)

    assert tls.explain(caught.value) == "Connection refused"
    assert tls.explain(TimeoutError()) == "TimeoutError"


def test_a_fingerprint_is_of_the_der_form(own: Certificate) -> None:
    der = ssl.PEM_cert_to_DER_cert(own.pem)

    assert tls.fingerprint(own.pem) == tls.fingerprint(der)
    assert tls.fingerprint("some words\n" + own.pem) == tls.fingerprint(der)


@pytest.mark.parametrize(
    "text",
    [
        "sha256:" + "ab" * 32,
        "AB:" * 31 + "AB",
        "sha256 Fingerprint=" + "AB:" * 31 + "ab",
        " SHA256:" + "aB" * 32 + "\n",
    ],
)
def test_a_fingerprint_may_be_written_as_openssl_prints_it(text: str) -> None:
    assert tls.parse_fingerprint(text) == "sha256:" + "ab" * 32


@pytest.mark.parametrize("text", ["", "sha256:", "sha1:" + "ab" * 20, "sha256:" + "xy" * 32])
def test_what_is_no_fingerprint_is_a_configuration_error(text: str) -> None:
    with pytest.raises(errors.ConfigError, match="fingerprint"):
        tls.parse_fingerprint(text)


@pytest.mark.parametrize("host", ["a..b", "x" * 300, ""])
async def test_what_is_no_host_name_does_not_answer(host: str) -> None:
    with pytest.raises(OSError):  # noqa: PT011 - of the resolver or ours
        await tls.fetch_certificate(host, 443)


def test_a_name_that_cannot_be_checked_is_not_believed() -> None:
    with pytest.raises(errors.AuthenticationFailed, match="no name"):
        tls.Handshake(tls.ca(), "fe80::1%eth0")
