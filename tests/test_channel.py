"""What an NBD server hears before it has proved who it is: nothing that matters."""

from dataclasses import replace

import pytest
import trio
import trustme

from cbtfs import channel, errors
from cbtfs.nbd import NbdAddress

from .hosts import Certificate, NbdHost, certificate, nbd_host

STARTTLS = b"\0\0\0\1" + b"IHAVEOPT\0\0\0\5\0\0\0\0"
"""Client flags and the option: all that may be told in the clear."""


@pytest.fixture
def own() -> Certificate:
    return certificate("xcp1.test", "10.0.0.1")


async def opened(address: NbdAddress) -> channel.Channel:
    return await channel.open_channel(
        address.host, address.port, cert_pem=address.cert_pem, subject=address.subject
    )


async def test_bytes_pass_both_ways_once_the_peer_is_known(own: Certificate) -> None:
    async with nbd_host(NbdHost(own)) as address, trio.open_nursery() as nursery:
        link = await opened(address)
        nursery.start_soon(link.run)
        link.socket.setblocking(False)
        client = trio.socket.from_stdlib_socket(link.socket)

        greeting = await client.recv(18)
        await client.send(b"\0\0\0\1" + b"IHAVEOPT\0\0\0\3\0\0\0\0")
        answer = await client.recv(20)

        assert greeting == b"NBDMAGICIHAVEOPT\0\1"
        assert answer[8:16] == b"\0\0\0\3\x80\0\0\2"
        client.close()
        link.close()


async def test_an_impostor_hears_nothing(own: Certificate) -> None:
    host = NbdHost(certificate("xcp1.test", "10.0.0.1", serial=2))

    async with nbd_host(host, cert_pem=own.pem) as address:
        with pytest.raises(errors.AuthenticationFailed, match=r"127\.0\.0\.1:\d+ does not show"):
            await opened(address)

    assert host.heard == b""


async def test_what_a_pinned_authority_signed_is_not_the_pinned_certificate() -> None:
    authority = trustme.CA(key_type=trustme.KeyType.RSA)
    leaf = authority.issue_cert("xcp1.test", key_type=trustme.KeyType.RSA)
    shown = Certificate(leaf.cert_chain_pems[0].bytes().decode(), leaf.private_key_pem.bytes())
    host = NbdHost(shown)

    async with nbd_host(host, cert_pem=authority.cert_pem.bytes().decode()) as address:
        with pytest.raises(errors.AuthenticationFailed, match="another one"):
            await opened(address)

    assert host.heard == b""


@pytest.mark.parametrize("quirk", ["", "injected", "plain after ack", "oldstyle"])
async def test_without_tls_there_is_no_connection(own: Certificate, quirk: str) -> None:
    host = NbdHost(own, tls=quirk in {"injected", "plain after ack"}, quirk=quirk)

    async with nbd_host(host) as address:
        with pytest.raises(errors.AuthenticationFailed):
            await opened(address)

    assert bytes(host.heard) in {b"", STARTTLS} or b"secret" not in host.heard


async def test_a_host_that_hangs_up_is_a_failed_connection(own: Certificate) -> None:
    for quirk in ("full", "no handshake"):
        async with nbd_host(NbdHost(own, quirk=quirk)) as address:
            with pytest.raises(OSError, match="hung up"):
                await opened(address)


@pytest.mark.parametrize(
    ("names", "subject"),
    [
        (("xcp1.test",), "xcp1.test"),
        (("xcp1.test",), "XCP1.test"),
        (("a.test", "xcp1.test"), "xcp1.test"),
        (("*.test",), "xcp1.test"),
        (("*.test",), "test"),  # xapi reports the base of a wildcard
        (("10.0.0.1",), "xcp1.test"),  # no name in it: xapi reports the host's own
        ((), "xcp1.test"),
        (("xcp1.test", "10.0.0.1"), "10.0.0.1"),
    ],
)
async def test_the_subject_is_a_name_of_the_certificate(
    names: tuple[str, ...], subject: str
) -> None:
    async with nbd_host(NbdHost(certificate(*names)), subject=subject) as address:
        link = await opened(address)
        link.close()
        link.socket.close()


@pytest.mark.parametrize("name", ["xcp1.test", "*.example"])
@pytest.mark.parametrize("subject", ["xcp2.test", "test", "", "xcp1.test.evil"])
async def test_another_subject_is_refused(name: str, subject: str) -> None:
    async with nbd_host(NbdHost(certificate(name)), subject=subject) as address:
        with pytest.raises(errors.AuthenticationFailed, match="is not for"):
            await opened(address)


async def test_a_certificate_that_cannot_be_read_is_never_skipped(own: Certificate) -> None:
    async with nbd_host(NbdHost(own)) as address:
        with pytest.raises(errors.PoolError):
            await opened(replace(address, cert_pem=""))
