"""libnbd does TLS itself where it verifies as strictly as we do, and what it refuses we decide."""

import tempfile
from dataclasses import replace
from pathlib import Path

import nbd as libnbd
import pytest
import trustme

from cbtfs import anchor, channel, errors, nbd
from cbtfs.nbd import NbdAddress

from .hosts import CONTENT, QUICK, Certificate, NbdHost, certificate, nbd_host

native = pytest.mark.skipif(
    not hasattr(libnbd.NBD, "set_tls_hostname"), reason="needs libnbd 1.22 or newer"
)


@pytest.fixture
def own() -> Certificate:
    return certificate("xcp1.test", "10.0.0.1")


@pytest.fixture
def no_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    def used(*_: object, **__: object) -> None:
        raise AssertionError("our own channel was used")

    monkeypatch.setattr(channel, "open_channel", used)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory where temporary ones are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


async def test_an_older_libnbd_is_not_asked_to_verify(
    own: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(libnbd.NBD, "set_tls_hostname", raising=False)
    monkeypatch.setattr(anchor, "anchored", None)

    async with nbd_host(NbdHost(own)) as address:
        async with nbd.open_export(address, timeouts=QUICK) as export:
            assert await export.pread(4096, 0) == CONTENT[:4096]


def test_a_host_with_a_name_is_left_to_libnbd(own: Certificate) -> None:
    assert anchor.verifies(own.pem, "xcp1.test")
    assert anchor.verifies(own.pem, "xcp-1_a.test")


@pytest.mark.parametrize("subject", ["", "10.0.0.1", "fe80::1", "a b", "xcp1.test\n", "*.test"])
def test_what_is_no_host_name_is_not(own: Certificate, subject: str) -> None:
    assert not anchor.verifies(own.pem, subject)


def test_an_authority_is_not_for_libnbd_would_accept_whom_it_signed() -> None:
    authority = trustme.CA(key_type=trustme.KeyType.RSA)

    assert not anchor.verifies(authority.cert_pem.bytes().decode(), "xcp1.test")


def test_what_is_no_certificate_is_an_error() -> None:
    with pytest.raises(errors.PoolError):
        anchor.verifies("", "xcp1.test")


def test_the_anchor_is_private_and_does_not_stay(own: Certificate, temporary: Path) -> None:
    with anchor.anchored("some words\n" + own.pem) as directory:
        [file] = Path(directory).iterdir()
        assert Path(directory).stat().st_mode & 0o777 == 0o700
        assert (file.name, file.read_text()) == ("ca-cert.pem", own.pem.strip())

    assert empty(temporary)


def empty(directory: Path) -> bool:
    return not list(directory.iterdir())


async def refused(host: NbdHost, cert_pem: str) -> bool:
    """Tell whether ``host`` is not let pass for the owner of a certificate, and learns nothing."""
    async with nbd_host(host, cert_pem=cert_pem, tls=True) as address:
        with pytest.raises(errors.AuthenticationFailed):
            async with nbd.open_export(address, timeouts=replace(QUICK, connect=20)):
                pass
    return b"session" not in host.heard


@native
@pytest.mark.usefixtures("no_channel")
async def test_libnbd_reads_from_a_host_that_it_verified(own: Certificate, temporary: Path) -> None:
    async with nbd_host(NbdHost(own)) as address:
        async with nbd.open_export(address, timeouts=QUICK) as export:
            assert empty(temporary)
            assert await export.pread(len(CONTENT), 0) == CONTENT


@native
@pytest.mark.parametrize(
    ("names", "subject"), [((), "xcp1.test"), (("*.test",), "test"), (("10.0.0.1",), "xcp1.test")]
)
async def test_what_libnbd_refuses_our_channel_may_accept(
    names: tuple[str, ...], subject: str, temporary: Path
) -> None:
    async with nbd_host(NbdHost(certificate(*names)), subject=subject) as address:
        async with nbd.open_export(address, timeouts=QUICK) as export:
            assert await export.pread(4096, 0) == CONTENT[:4096]

    assert empty(temporary)


@native
@pytest.mark.parametrize("quirk", ["", "injected", "plain after ack", "oldstyle"])
async def test_without_tls_neither_attempt_tells_a_host_anything(
    own: Certificate, quirk: str
) -> None:
    plain = quirk in {"", "oldstyle"}

    assert await refused(NbdHost(own, tls=not plain, quirk=quirk), own.pem)


@native
@pytest.mark.parametrize(("name", "serial"), [("xcp1.test", 2), ("xcp2.test", 1)])
async def test_neither_attempt_tells_an_impostor_anything(
    own: Certificate, name: str, serial: int
) -> None:
    assert await refused(NbdHost(certificate(name, serial=serial)), own.pem)


@native
async def test_whom_the_pinned_certificate_signed_is_an_impostor() -> None:
    authority = trustme.CA(key_type=trustme.KeyType.RSA)
    leaf = authority.issue_cert("xcp1.test", key_type=trustme.KeyType.RSA)
    shown = Certificate(leaf.cert_chain_pems[0].bytes().decode(), leaf.private_key_pem.bytes())

    assert await refused(NbdHost(shown), authority.cert_pem.bytes().decode())


@native
@pytest.mark.usefixtures("no_channel")
async def test_who_does_not_answer_in_time_is_not_asked_twice(own: Certificate) -> None:
    async with nbd_host(NbdHost(own, quirk="silent")) as address:
        with pytest.raises(errors.ExportLost, match="did not get ready"):
            async with nbd.open_export(address, timeouts=replace(QUICK, connect=0.2)):
                pass


@native
@pytest.mark.usefixtures("no_channel")
async def test_who_is_not_there_is_not_asked_twice(own: Certificate) -> None:
    with pytest.raises(errors.ExportLost, match="refused"):
        async with nbd.open_export(NbdAddress("127.0.0.1", 1, "name", own.pem, "xcp1.test")):
            pass
