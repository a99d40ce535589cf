"""An export reads what is asked for, and ends in good order or with the right error."""

import random
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
import trustme
from hypothesis import HealthCheck, given, settings, strategies as st

from cbtfs import errors, export as export_module, nbd
from cbtfs.nbd import Export, NbdAddress

from .hosts import CONTENT, QUICK, Certificate, NbdHost, certificate, nbd_host

SIZE = len(CONTENT)


@pytest.fixture
def own() -> Certificate:
    return certificate("xcp1.test", "10.0.0.1")


@asynccontextmanager
async def export_of(host: NbdHost, timeouts: nbd.Timeouts = QUICK) -> AsyncGenerator[Export]:
    async with nbd_host(host) as address:
        # not nested as usual: an error of the body must leave without a group around it
        async with nbd.open_export(address, timeouts=timeouts) as export:
            yield export


@pytest.mark.parametrize("tls", [True, False])
async def test_an_export_has_the_disks_size_and_bytes(own: Certificate, tls: bool) -> None:
    async with export_of(NbdHost(own, tls=tls)) as export:
        assert export.size == SIZE
        assert await export.pread(SIZE, 0) == CONTENT


@asynccontextmanager
async def plain_nbdkit(file: Path) -> AsyncGenerator[NbdAddress]:
    """Serve a file by threads, which answer in any order."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["nbdkit", "-f", "-r", "-i", "127.0.0.1", "-p", str(port), "file", str(file)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(trio.run_process, words, check=False))
        for _ in range(100):
            with suppress(OSError):
                await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
                break
            await trio.sleep(0.05)
        yield NbdAddress("127.0.0.1", port, export_name="disk", tls=False)
        nursery.cancel_scope.cancel()


@pytest.mark.skipif(shutil.which("nbdkit") is None, reason="needs nbdkit")
async def test_many_small_reads_at_once_are_all_answered(tmp_path: Path) -> None:
    """By a server that answers faster than trio looks: each answer must find its reader."""
    data = random.Random(3).randbytes(8 << 20)
    await trio.Path(tmp_path / "disk").write_bytes(data)

    async def reader(export: Export, number: int) -> None:
        rng = random.Random(number)
        for _ in range(500):
            offset = rng.randrange(len(data) // 65536) * 65536
            assert await export.pread(65536, offset) == data[offset : offset + 65536]
            await trio.lowlevel.checkpoint()

    with trio.fail_after(25):
        async with (
            plain_nbdkit(tmp_path / "disk") as address,
            nbd.open_export(address) as export,
            trio.open_nursery() as readers,
        ):
            for number in range(4):
                readers.start_soon(reader, export, number)


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 1), (1, 4096), (4095, 2), (SIZE - 1, 1), (SIZE - 512, 512), (100, SIZE - 100), (SIZE, 0)],
)
async def test_every_range_is_read_in_whole_blocks(
    own: Certificate, offset: int, length: int
) -> None:
    host = NbdHost(own, tls=False)

    async with export_of(host) as export:
        assert await export.pread(length, offset) == CONTENT[offset : offset + length]

    for start, count in host.reads:
        assert start % 4096 == 0
        assert count % 4096 == 0 or start + count == SIZE


@given(st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, 70_000)), max_size=8))
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_reads_at_the_same_time_do_not_mix(own: Certificate, ranges: list[tuple[int, int]]) -> None:
    async def read(export: Export, offset: int, length: int) -> None:
        length = min(length, SIZE - offset)
        assert await export.pread(length, offset) == CONTENT[offset : offset + length]

    async def main() -> None:
        async with export_of(NbdHost(own)) as export, trio.open_nursery() as nursery:
            for offset, length in ranges:
                nursery.start_soon(read, export, offset, length)

    trio.run(main)


@pytest.mark.parametrize("seed", range(8))
async def test_neither_do_those_of_the_thread_whoever_is_cancelled(
    own: Certificate, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(export_module, "BULK", 1)
    rng = random.Random(seed)

    async def read(export: Export) -> None:
        for _ in range(30):
            offset = rng.randrange(SIZE)
            length = rng.randrange(1, SIZE - offset + 1)
            with trio.move_on_after(rng.choice([5, 5, 5, 0.0001])):
                assert await export.pread(length, offset) == CONTENT[offset : offset + length]

    async with export_of(NbdHost(own, tls=False)) as export:
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(read, export)
        assert not export.lost


async def test_what_waits_for_the_thread_fails_with_its_connection(
    own: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "BULK", 1)
    host = NbdHost(own, tls=False, quirk="stuck")
    lost: list[str] = []

    async def read(export: Export) -> None:
        with pytest.raises(errors.ExportLost) as caught:
            await export.pread(SIZE, 0)
        lost.append(str(caught.value))

    async with (
        export_of(host, replace(QUICK, request=60)) as export,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(read, export)
        await host.stuck.wait()
        for _ in range(3):
            nursery.start_soon(read, export)
        await trio.testing.wait_all_tasks_blocked()
        export.abort()

    assert len(lost) == 4


async def test_a_long_read_is_cut_into_requests(
    own: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "MAX_REQUEST", 16384)
    host = NbdHost(own)

    async with export_of(host) as export:
        buffer = bytearray(SIZE)
        await export.read_into(buffer, 0)

    assert buffer == CONTENT
    assert max(length for _, length in host.reads) == 16384


@pytest.mark.usefixtures("pump")
async def test_many_ranges_are_read_in_one_call(own: Certificate) -> None:
    host = NbdHost(own)
    ranges = [(at * 16384, 4096 * (1 + at % 3)) for at in range(40)]
    buffer = memoryview(bytearray(sum(length for _, length in ranges)))
    parts: list[nbd.Part] = []
    for offset, length in ranges:
        at = sum(len(view) for view, _ in parts)
        parts.append((buffer[at : at + length], offset))

    async with export_of(host) as export:
        assert await export.read_each(parts) == [None] * 40

    assert sorted(host.reads) == ranges
    assert buffer == b"".join(CONTENT[offset : offset + length] for offset, length in ranges)


async def test_of_many_ranges_each_has_its_own_outcome(own: Certificate) -> None:
    whole, cut = bytearray(4096), bytearray(8192)
    host = NbdHost(own, quirk="cut after 4096")

    async with export_of(host) as export:
        told = await export.read_each([(memoryview(whole), 4096), (memoryview(cut), 8192)])

    assert whole == CONTENT[4096:8192]
    assert told[0] is None
    assert isinstance(told[1], errors.ExportLost)


async def test_over_a_lost_connection_no_range_is_read(own: Certificate) -> None:
    async with export_of(NbdHost(own)) as export:
        export.abort()
        parts = [(memoryview(bytearray(4096)), 4096 * at) for at in range(20)]
        told = await export.read_each(parts)

    assert [type(problem) for problem in told] == [errors.ExportLost] * 20


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (SIZE, 1), (0, SIZE + 1)])
async def test_nothing_is_read_beyond_the_disk(own: Certificate, offset: int, length: int) -> None:
    host = NbdHost(own)

    async with export_of(host) as export:
        with pytest.raises(errors.ExportError, match="not on the disk"):
            await export.pread(length, offset)

    assert host.reads == []


# ── who is not let in ────────────────────────────────────────────────────────────────────────────


async def outcome(host: NbdHost, *, quick: nbd.Timeouts = QUICK, **changes: object) -> Exception:
    found: Exception | None = None
    async with nbd_host(host, **changes) as address:
        try:
            async with nbd.open_export(address, timeouts=quick):
                pass
        except errors.CbtfsError as exc:
            found = exc
    assert found is not None
    assert "secret" not in str(found)
    return found


async def test_an_impostor_is_told_neither_session_nor_name(own: Certificate) -> None:
    host = NbdHost(certificate("xcp1.test", serial=2))

    assert isinstance(await outcome(host, cert_pem=own.pem), errors.AuthenticationFailed)
    assert host.heard == b""


async def test_a_host_without_tls_is_told_neither_session_nor_name(own: Certificate) -> None:
    host = NbdHost(own, tls=False)

    assert isinstance(await outcome(host, tls=True), errors.AuthenticationFailed)
    assert b"session" not in host.heard


async def test_a_full_host_is_a_lost_connection(own: Certificate) -> None:
    for tls in (True, False):
        found = await outcome(NbdHost(own, tls=tls, quirk="full"))
        assert isinstance(found, errors.ExportLost)


async def test_an_export_that_is_refused_is_a_lost_connection(own: Certificate) -> None:
    found = await outcome(NbdHost(own, quirk="refused export"))

    assert isinstance(found, errors.ExportLost)


async def test_a_host_that_knows_no_such_export_refuses_without_its_name_being_told(
    own: Certificate,
) -> None:
    found = await outcome(NbdHost(own, quirk="unknown"))

    assert type(found) is errors.ExportError


async def test_a_host_that_insists_on_tls_is_not_read_without(own: Certificate) -> None:
    found = await outcome(NbdHost(own, tls=True), tls=False)

    assert isinstance(found, errors.ExportError)


async def test_a_host_silent_at_first_is_given_up(own: Certificate) -> None:
    for tls in (True, False):
        quick = replace(QUICK, connect=0.1)
        found = await outcome(NbdHost(own, tls=tls, quirk="silent"), quick=quick)
        assert isinstance(found, errors.ExportLost)
        assert "did not get ready" in str(found)


async def test_a_host_may_have_answered_before_it_is_waited_for() -> None:
    ours, theirs = socket.socketpair()
    export = Export(NbdAddress("127.0.0.1", 1, "name", tls=False), timeouts=QUICK)
    unsupported = (0x3E889045565A9, 7, 0x80000001, 0)
    theirs.sendall(b"NBDMAGICIHAVEOPT\x00\x01" + struct.pack(">QIII", *unsupported))
    theirs.sendall(struct.pack(">QH", SIZE, 3) + bytes(124))

    with theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(export.drive)
            with trio.fail_after(20):
                await export.connect(ours, abort=theirs.close)
            await export.close()
        export.forget()

    assert export.size == SIZE


async def test_nobody_there_is_a_lost_connection(own: Certificate) -> None:
    for tls in (True, False):
        address = NbdAddress("127.0.0.1", 1, "name", own.pem, "xcp1.test", tls)
        with pytest.raises(errors.ExportLost, match="Connection refused"):
            async with nbd.open_export(address):
                pass


@pytest.fixture(params=["loop", "thread"])
def pump(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read is waited for in trio's loop, or every one in a thread."""
    monkeypatch.setattr(export_module, "BULK", 1 if request.param == "thread" else 1 << 40)


# ── what breaks later ────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("pump")
@pytest.mark.parametrize("quirk", ["cut", "stuck"])
@pytest.mark.parametrize("tls", [True, False])
async def test_a_read_that_breaks_off_loses_the_connection(
    own: Certificate, quirk: str, tls: bool
) -> None:
    async with export_of(NbdHost(own, tls=tls, quirk=quirk)) as export:
        for _ in range(2):
            with pytest.raises(errors.ExportLost):
                await export.pread(8192, 0)


@pytest.mark.usefixtures("pump")
@pytest.mark.parametrize("quirk", ["error", "einval"])
async def test_a_read_error_is_told(own: Certificate, quirk: str) -> None:
    async with export_of(NbdHost(own, quirk=quirk)) as export:
        with pytest.raises(errors.ExportError, match="cannot read 8192 bytes at 4096"):
            await export.pread(8192, 4096)


@pytest.mark.usefixtures("pump")
async def test_other_reads_fail_with_the_one_that_is_not_answered(own: Certificate) -> None:
    failed: list[Exception] = []

    async def read(export: Export, offset: int) -> None:
        try:
            await export.pread(4096, offset)
        except errors.ExportLost as exc:
            failed.append(exc)

    async with export_of(NbdHost(own, quirk="stuck")) as export, trio.open_nursery() as nursery:
        for block in range(20):
            nursery.start_soon(read, export, 4096 * block)

    assert len(failed) == 20


@pytest.mark.usefixtures("pump")
async def test_a_buffer_is_not_touched_after_a_cancelled_read(
    own: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "_CANCEL_GRACE", 0.05)
    host = NbdHost(own, quirk="stuck")
    buffer = bytearray(8192)

    async with export_of(host, replace(QUICK, request=30)) as export:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(export.read_into, buffer, 0)
            await host.stuck.wait()
            nursery.cancel_scope.cancel()

        assert export.lost  # libnbd lets go of the buffer only with its connection
        assert buffer == bytes(8192)


@pytest.mark.usefixtures("pump")
async def test_a_cancelled_read_that_is_answered_soon_costs_no_connection(
    own: Certificate,
) -> None:
    async with export_of(NbdHost(own)) as export:
        with trio.CancelScope() as scope:
            scope.cancel()
            await export.pread(65536, 0)

        assert await export.pread(4096, 0) == CONTENT[:4096]


@pytest.mark.usefixtures("pump")
@pytest.mark.parametrize("tls", [True, False])
async def test_an_aborted_connection_ends_its_reads_at_once(own: Certificate, tls: bool) -> None:
    host = NbdHost(own, tls=tls, quirk="stuck")

    async with export_of(host, replace(QUICK, request=600)) as export:
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                with pytest.raises(errors.ExportLost):
                    await export.pread(1 << 20, 0)

            nursery.start_soon(read)
            await host.stuck.wait()
            export.abort()


async def test_leaving_waits_until_the_host_has_detached_the_disk(own: Certificate) -> None:
    host = NbdHost(own, detached=trio.Event())
    detached = host.detached
    left = trio.Event()

    async def use(address: NbdAddress) -> None:
        async with nbd.open_export(address, timeouts=replace(QUICK, close=20)) as export:
            await export.pread(4096, 0)
        left.set()

    async with nbd_host(host) as address, trio.open_nursery() as nursery:
        nursery.start_soon(use, address)
        await host.parted.wait()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not left.is_set()
        assert detached is not None
        detached.set()
        await left.wait()


async def test_a_host_that_never_hangs_up_does_not_hold_us(own: Certificate) -> None:
    host = NbdHost(own, detached=trio.Event())

    started = time.monotonic()
    async with export_of(host):
        pass

    assert time.monotonic() - started < 5


async def test_an_error_of_the_user_leaves_as_it_is(own: Certificate) -> None:
    async with nbd_host(NbdHost(own)) as address:
        with pytest.raises(KeyError, match="mine"):
            async with nbd.open_export(address):
                raise KeyError("mine")


async def test_leaving_by_cancellation_says_goodbye(own: Certificate) -> None:
    host = NbdHost(own)

    async with nbd_host(host) as address:
        with trio.CancelScope() as scope:
            async with nbd.open_export(address):
                scope.cancel()
                await trio.sleep_forever()

    assert host.parted.is_set()


def test_an_address_keeps_its_credential_to_itself() -> None:
    address = NbdAddress("10.0.0.1", 10809, "/uuid?session_id=OpaqueRef:secret", "pem")

    assert "secret" not in f"{address!r} {address}"


# ── a second opinion ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def nbdkit(tmp_path: Path) -> Callable[[list[str]], list[str]]:
    """Arguments of an nbdkit with TLS, whose certificate is ``server-cert.pem``."""
    authority = trustme.CA()
    leaf = authority.issue_cert("xcp1.test")
    authority.cert_pem.write_to_path(tmp_path / "ca-cert.pem")
    leaf.private_key_pem.write_to_path(tmp_path / "server-key.pem")
    leaf.cert_chain_pems[0].write_to_path(tmp_path / "server-cert.pem")

    def command(arguments: list[str]) -> list[str]:
        pki = f"--tls-certificates={tmp_path}"
        return ["nbdkit", "-f", "--tls=require", pki, "-i127.0.0.1", *arguments]

    return command


async def test_nbdkit_is_read_through_tls_1_3(
    nbdkit: Callable[[list[str]], list[str]], tmp_path: Path, unused_port: int
) -> None:
    pidfile = tmp_path / "pid"
    command = nbdkit([f"-p{unused_port}", f"-P{pidfile}", "pattern", "8M"])
    server = subprocess.Popen(command)  # noqa: ASYNC220 - starts at once
    try:
        while not pidfile.exists():  # noqa: ASYNC110 - the only sign that nbdkit gives
            await trio.sleep(0.01)
        pem = (tmp_path / "server-cert.pem").read_text()
        address = NbdAddress("127.0.0.1", unused_port, "", pem, "xcp1.test")
        async with nbd.open_export(address) as export:
            data = await export.pread(8 << 20, 0)
    finally:
        server.terminate()
        server.wait()

    assert data == b"".join(offset.to_bytes(8, "big") for offset in range(0, 8 << 20, 8))


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
