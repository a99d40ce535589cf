"""How the hosts of a pool prove who they are, and what is remembered of that."""

import logging
import os
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from cbtfs import errors, peers, tls
from cbtfs.peers import Peers, Trust

from .hosts import Certificate, ca_file, certificate, serving

FIRST, SECOND = "127.0.0.1", "127.0.0.2"


@pytest.fixture
def one() -> Certificate:
    return certificate("xcp1.test", FIRST)


@pytest.fixture
def two() -> Certificate:
    return certificate("xcp2.test", SECOND)


@asynccontextmanager
async def hosts(*shown: Certificate) -> AsyncGenerator[int]:
    """Serve TLS at 127.0.0.1, 127.0.0.2, … and the same port."""

    def shower(each: Certificate) -> object:
        async def show(stream: trio.SocketStream) -> None:
            secured = trio.SSLStream(stream, each.server_context(), server_side=True)
            assert not await secured.receive_some(), "told something"

        return show

    port = 0
    async with AsyncExitStack() as stack:
        for number, each in enumerate(shown, 1):
            handler = shower(each)
            serve = serving(handler, host=f"127.0.0.{number}", port=port)  # type: ignore[arg-type]
            port = await stack.enter_async_context(serve)
        yield port


def fingerprints(*certificates: Certificate) -> Trust:
    return Trust(fingerprints=tuple(tls.fingerprint(each.pem) for each in certificates))


async def test_a_fingerprint_is_compared_before_anything_is_sent(
    one: Certificate, two: Certificate
) -> None:
    async with hosts(one) as port:
        known = Peers(f"https://{FIRST}:{port}", trust=fingerprints(two, one))
        assert await tls.probe(FIRST, port, context=await known.context(FIRST))

        stranger = Peers(f"https://{FIRST}:{port}", trust=fingerprints(two))
        with pytest.raises(errors.AuthenticationFailed, match=tls.fingerprint(one.pem)):
            await stranger.context(FIRST)


async def test_a_fingerprint_counts_though_the_name_is_another(two: Certificate) -> None:
    async with hosts(two) as port:
        known = Peers(f"https://{FIRST}:{port}", trust=fingerprints(two))

        await known.context(FIRST)


async def test_the_ca_file_decides_if_there_is_no_fingerprint(
    tmp_path: Path, one: Certificate, two: Certificate
) -> None:
    async with hosts(one, two) as port:
        known = Peers(f"https://{FIRST}:{port}", trust=Trust(ca_file(tmp_path, one)))

        await known.context(FIRST)
        with pytest.raises(errors.AuthenticationFailed, match=r"ca\.pem") as caught:
            await known.context(SECOND)

    assert SECOND in str(caught.value)
    assert tls.fingerprint(two.pem) in str(caught.value)


async def test_what_was_learned_verifies_other_hosts(
    tmp_path: Path, one: Certificate, two: Certificate
) -> None:
    async with hosts(one, two) as port:
        for trust in (fingerprints(one), Trust(ca_file(tmp_path, one))):
            known = Peers(f"https://{FIRST}:{port}", trust=trust)
            known.learn({SECOND: two.pem})

            await known.context(SECOND)
            assert known.addresses() == (FIRST, SECOND)


async def test_an_impostor_of_a_learned_host_is_refused(
    tmp_path: Path, one: Certificate, two: Certificate
) -> None:
    impostor = certificate("xcp2.test", SECOND, serial=2)
    async with hosts(one, impostor) as port:
        for trust in (fingerprints(one), Trust(ca_file(tmp_path, one))):
            known = Peers(f"https://{FIRST}:{port}", trust=trust)
            known.learn({SECOND: two.pem})

            with pytest.raises(errors.AuthenticationFailed):
                await known.context(SECOND)


async def test_a_silent_host_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_PROBE_TIMEOUT", 0.1)

    async def silent(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with serving(silent) as port:
        with pytest.raises(OSError, match="timed out"):
            await Peers(f"https://{FIRST}:{port}", trust=Trust()).context(FIRST)


def test_what_was_learned_outlives_the_session(
    tmp_path: Path, one: Certificate, two: Certificate
) -> None:
    state = tmp_path / "state" / "cbtfs"
    first = Peers("https://10.0.0.1", trust=fingerprints(one), state_dir=str(state))
    first.learn({"10.0.0.1": one.pem, "10.0.0.2": two.pem})

    again = Peers("https://10.0.0.1", trust=fingerprints(one), state_dir=str(state))

    assert again.addresses() == ("10.0.0.1", "10.0.0.2")
    assert [file.stat().st_mode & 0o077 for file in state.iterdir()] == [0]
    assert state.stat().st_mode & 0o077 == 0


def test_another_trust_forgets_what_was_learned(
    tmp_path: Path, one: Certificate, two: Certificate
) -> None:
    file = ca_file(tmp_path, one)

    def opened(trust: Trust, url: str = "https://10.0.0.1") -> Peers:
        return Peers(url, trust=trust, state_dir=str(tmp_path / "state"))

    opened(Trust(file)).learn({"10.0.0.2": two.pem})
    assert opened(Trust(file)).addresses()[1:]

    assert not opened(fingerprints(one)).addresses()[1:]
    assert not opened(Trust()).addresses()[1:]
    assert not opened(Trust(file), "https://10.0.0.9").addresses()[1:]
    ca_file(tmp_path, one, two)
    assert not opened(Trust(file)).addresses()[1:]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema":2,"trust":"","hosts":{}}'])
def test_a_damaged_memory_is_begun_anew(tmp_path: Path, two: Certificate, text: str) -> None:
    first = Peers("https://10.0.0.1", trust=Trust(), state_dir=str(tmp_path))
    first.learn({"10.0.0.2": two.pem})
    (file,) = tmp_path.iterdir()
    file.write_text(text)

    again = Peers("https://10.0.0.1", trust=Trust(), state_dir=str(tmp_path))
    again.learn({"10.0.0.3": two.pem})

    assert again.addresses() == ("10.0.0.1", "10.0.0.3")


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_memory_that_others_may_write_is_not_believed(
    tmp_path: Path, two: Certificate, mode: int
) -> None:
    first = Peers("https://10.0.0.1", trust=Trust(), state_dir=str(tmp_path))
    first.learn({"10.0.0.2": two.pem})
    (file,) = tmp_path.iterdir()
    file.chmod(mode)

    assert not Peers("https://10.0.0.1", trust=Trust(), state_dir=str(tmp_path)).addresses()[1:]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_memory_of_somebody_else_is_not_believed(tmp_path: Path, two: Certificate) -> None:
    first = Peers("https://10.0.0.1", trust=Trust(), state_dir=str(tmp_path))
    first.learn({"10.0.0.2": two.pem})
    (file,) = tmp_path.iterdir()
    os.chown(file, 1000, 1000)

    assert not Peers("https://10.0.0.1", trust=Trust(), state_dir=str(tmp_path)).addresses()[1:]


@pytest.mark.parametrize(
    "pem",
    [
        "",
        "second",
        "-----BEGIN CERTIFICATE-----\nA\n-----END CERTIFICATE-----",
        "-----BEGIN CERTIFICATE-----\n\xe9\n-----END CERTIFICATE-----",
    ],
)
def test_what_is_no_certificate_is_not_learned(two: Certificate, pem: str) -> None:
    known = Peers("https://10.0.0.1", trust=Trust())
    known.learn({"10.0.0.2": pem, "10.0.0.3": two.pem})

    assert known.addresses() == ("10.0.0.1", "10.0.0.3")


async def test_a_certificate_that_is_renewed_counts_from_then_on(
    one: Certificate, two: Certificate
) -> None:
    renewed = certificate("xcp2.test", SECOND, serial=2)
    async with hosts(one, renewed) as port:
        known = Peers(f"https://{FIRST}:{port}", trust=fingerprints(one))
        known._contexts[SECOND] = tls.pin(two.pem)  # from when it showed that
        known.learn({SECOND: renewed.pem})

        assert await tls.probe(SECOND, port, context=await known.context(SECOND))


def test_a_memory_that_cannot_be_written_is_only_told(
    tmp_path: Path, two: Certificate, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    known = Peers("https://10.0.0.1", trust=Trust(), state_dir=str(tmp_path / "file" / "x"))

    with caplog.at_level(logging.INFO):
        known.learn({"10.0.0.2": two.pem})

    assert "cannot keep" in caplog.text
    assert known.addresses()[1:]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "xcp1",
        "http://xcp1",
        "https://",
        "https://me:secret@xcp1",
        "https://xcp1:port",
        "https://[",
    ],
)
def test_a_url_is_https_and_nothing_more(url: str) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        Peers(url, trust=Trust())

    assert "secret" not in str(caught.value)


def test_ports_and_ipv6_addresses_are_understood() -> None:
    known = Peers("https://[fd00::1]:8443/", trust=Trust())

    assert (known.host, known.port) == ("fd00::1", 8443)
    assert Peers("https://xcp1", trust=Trust()).port == 443
    assert peers.netloc("fd00::1", 443) == "[fd00::1]:443"
    assert peers.netloc("10.0.0.1", 443) == "10.0.0.1:443"
