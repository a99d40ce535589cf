"""The simulated hosts' NBD servers, byte for byte, and as libnbd's own tools see them."""

import contextlib
import ssl
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cbtfs.simulator.default_scenario import ODD_SIZE

from . import nbdclient
from .nbdclient import Closed, NbdClient
from .simulated import Api, RunningPool, running_pool

KiB = 1 << 10
MiB = 1 << 20


@pytest.fixture(scope="module")
def shared_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPool]:
    with running_pool(tmp_path_factory.mktemp("sim") / "pool") as pool:
        yield pool


@pytest.fixture
def pool(shared_pool: RunningPool) -> Iterator[RunningPool]:
    yield shared_pool
    for key in shared_pool.faults():
        shared_pool.set(key, "")


@pytest.fixture
def api(pool: RunningPool) -> Api:
    return Api(pool).login()


@pytest.fixture
def snapshot(api: Api) -> str:
    """The older snapshot of web1's system disk: nobody writes to it."""
    return snapshot_of(api, "web1 root")


def snapshot_of(api: Api, name: str) -> str:
    found = [
        (record["snapshot_time"], ref)
        for ref, record in api.records("VDI").items()
        if record["name_label"] == name and record["is_a_snapshot"]
    ]
    return min(found, key=str)[1]


def info(api: Api, vdi: str) -> list[dict[str, str]]:
    found = api.call("VDI.get_nbd_info", vdi)
    assert isinstance(found, list)
    return found


def connect(pool: RunningPool, address: str = "127.0.0.12") -> NbdClient:
    return NbdClient(address, pool.nbd_port)


def opened(pool: RunningPool, api: Api, vdi: str) -> NbdClient:
    """Return a client that has the disk open over TLS."""
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(connect(pool))
        client.hello()
        client.starttls(pool.certificate())
        client.export_name(info(api, vdi)[0]["exportname"])
        stack.pop_all()  # from here on the caller closes it
    return client


def uri(pool: RunningPool, api: Api, vdi: str) -> str:
    """Return the URI that a third party would use: the address that the certificate names."""
    export = info(api, vdi)[0]["exportname"].replace("?", "%3F")
    where = f"nbds://127.0.0.2:{pool.nbd_port}/{export}"
    return f"{where}?tls-certificates={pool.tls_directory()}"


def test_greets_as_fixed_newstyle_and_nothing_more(pool: RunningPool) -> None:
    with connect(pool) as client:
        assert client.hello() == b"NBDMAGICIHAVEOPT\0\1"


@pytest.mark.parametrize(
    ("option", "reply"),
    [
        (nbdclient.LIST, nbdclient.ERR_TLS_REQD),
        (nbdclient.INFO, nbdclient.ERR_TLS_REQD),
        (nbdclient.GO, nbdclient.ERR_TLS_REQD),
        (nbdclient.STRUCTURED_REPLY, nbdclient.ERR_TLS_REQD),
        (10, nbdclient.ERR_TLS_REQD),
        (11, nbdclient.ERR_TLS_REQD),
        (99, nbdclient.ERR_TLS_REQD),
    ],
)
def test_options_before_tls(pool: RunningPool, option: int, reply: int) -> None:
    with connect(pool) as client:
        client.hello()

        assert client.option(option) == reply


@pytest.mark.parametrize(
    ("option", "reply"),
    [
        (nbdclient.LIST, nbdclient.ERR_POLICY),
        (nbdclient.STARTTLS, nbdclient.ERR_INVALID),
        (nbdclient.INFO, nbdclient.ERR_UNSUP),
        (nbdclient.GO, nbdclient.ERR_UNSUP),
        (nbdclient.STRUCTURED_REPLY, nbdclient.ERR_UNSUP),
        (9, nbdclient.ERR_UNSUP),
        (10, nbdclient.ERR_UNSUP),
        (11, nbdclient.ERR_UNSUP),
        (nbdclient.ABORT, nbdclient.ACK),
    ],
)
def test_options_after_tls(pool: RunningPool, option: int, reply: int) -> None:
    with connect(pool) as client:
        client.hello()
        client.starttls(pool.certificate())

        assert client.option(option) == reply


@pytest.mark.parametrize("option", [nbdclient.EXPORT_NAME, nbdclient.ABORT])
def test_closes_without_a_word_before_tls(pool: RunningPool, option: int) -> None:
    with connect(pool) as client:
        client.hello()
        client.send_option(option, b"/x")

        assert client.at_end()


def test_client_without_fixed_newstyle_is_closed(pool: RunningPool) -> None:
    with connect(pool) as client:
        client.hello(flags=0)

        assert client.at_end()


def test_export_is_size_flags_and_124_zeroes(pool: RunningPool, api: Api, snapshot: str) -> None:
    with connect(pool) as client:
        client.hello(flags=3)  # asks for no zeroes, in vain
        client.starttls(pool.certificate())

        answer = client.export_name(info(api, snapshot)[0]["exportname"])

        assert answer == struct.pack(">QH", 512 * MiB, 0x0003) + bytes(124)
        client.disconnect()


@pytest.mark.parametrize("name", ["", "/", "/nonsense?session_id=x", "//%%%"])
def test_wrong_export_is_closed_silently(pool: RunningPool, name: str) -> None:
    with connect(pool) as client:
        client.hello()
        client.starttls(pool.certificate())

        with pytest.raises(Closed) as closed:
            client.export_name(name)

        assert closed.value.got == b""


def test_export_name_of_an_ended_session_is_dead(pool: RunningPool, snapshot: str) -> None:
    other = Api(pool).login()
    name = info(other, snapshot)[0]["exportname"]
    other.call("session.logout")

    with connect(pool) as client:
        client.hello()
        client.starttls(pool.certificate())
        with pytest.raises(Closed):
            client.export_name(name)


def test_logout_does_not_cut_an_open_export(pool: RunningPool, snapshot: str) -> None:
    other = Api(pool).login()
    with opened(pool, other, snapshot) as client:
        other.call("session.logout")

        assert len(client.read(0, 4096)) == 4096
        client.disconnect()


def test_reads_what_the_disk_holds(pool: RunningPool, api: Api, snapshot: str) -> None:
    with opened(pool, api, snapshot) as client:
        assert client.read(0, 512)[510:] == b"\x55\xaa"
        assert client.read(MiB + 1024, 1024)[56:58] == b"\x53\xef"  # ext4's magic number
        assert len(client.read(0, 3 * MiB)) == 3 * MiB
        client.disconnect()


@pytest.mark.parametrize(("offset", "length"), [(1, 512), (0, 511), (256, 512)])
def test_unaligned_read_is_einval_and_the_end(
    pool: RunningPool, api: Api, snapshot: str, offset: int, length: int
) -> None:
    with opened(pool, api, snapshot) as client:
        client.request(nbdclient.READ, offset, length)

        assert client.reply() == nbdclient.EINVAL
        assert client.at_end()


def test_sectors_of_4096_bytes(pool: RunningPool, api: Api) -> None:
    vdi = api.named("VDI", "app1 4k")
    with opened(pool, api, vdi) as client:
        assert len(client.read(4096, 4096)) == 4096

        client.request(nbdclient.READ, 512, 512)

        assert client.reply() == nbdclient.EINVAL
        assert client.at_end()


def test_read_past_the_end_says_success_and_breaks_off(
    pool: RunningPool, api: Api, snapshot: str
) -> None:
    with opened(pool, api, snapshot) as client:
        client.request(nbdclient.READ, 512 * MiB - 1024, 4096)

        assert client.reply() == 0
        with pytest.raises(Closed) as closed:
            client.exactly(4096)
        assert len(closed.value.got) == 1024


def test_read_error_in_the_middle_says_success_first(
    pool: RunningPool, api: Api, snapshot: str
) -> None:
    pool.set("nbd.fail_read_at", "1M")
    with opened(pool, api, snapshot) as client:
        client.request(nbdclient.READ, 0, 2 * MiB)

        assert client.reply() == 0
        with pytest.raises(Closed) as closed:
            client.exactly(2 * MiB)
        assert len(closed.value.got) == MiB


def test_read_of_two_gib_is_closed(pool: RunningPool, api: Api, snapshot: str) -> None:
    with opened(pool, api, snapshot) as client:
        client.request(nbdclient.READ, 0, 1 << 31)

        assert client.at_end()


@pytest.mark.parametrize(
    ("command", "flags", "error"),
    [
        (nbdclient.WRITE, 0, nbdclient.EPERM),
        (nbdclient.FLUSH, 0, nbdclient.EINVAL),
        (nbdclient.TRIM, 0, nbdclient.EINVAL),
        (nbdclient.CACHE, 0, nbdclient.EINVAL),
        (nbdclient.WRITE_ZEROES, 0, nbdclient.EINVAL),
        (nbdclient.BLOCK_STATUS, 0, nbdclient.EINVAL),
        (77, 0, nbdclient.EINVAL),
        (nbdclient.READ, 1, nbdclient.EINVAL),  # a flag makes any command unknown
    ],
)
def test_other_commands_are_refused_and_the_end(
    pool: RunningPool, api: Api, snapshot: str, command: int, flags: int, error: int
) -> None:
    with opened(pool, api, snapshot) as client:
        client.request(command, 0, 4096, flags=flags)

        assert client.reply() == error
        assert client.at_end()


def test_a_wrong_magic_number_is_the_end(pool: RunningPool, api: Api, snapshot: str) -> None:
    with opened(pool, api, snapshot) as client:
        client.connection.sendall(bytes(28))

        assert client.at_end()


def test_end_of_file_after_disc_means_the_vbd_is_gone(
    pool: RunningPool, api: Api, snapshot: str
) -> None:
    pool.set("nbd.detach_delay", "200ms")
    before = api.call("VDI.get_VBDs", snapshot)
    with opened(pool, api, snapshot) as client:
        attached = api.call("VDI.get_VBDs", snapshot)

        client.disconnect()

        assert isinstance(before, list)
        assert isinstance(attached, list)
        assert len(attached) == len(before) + 1
        assert api.call("VDI.get_VBDs", snapshot) == before


def test_the_slot_is_free_after_the_end_only(pool: RunningPool, api: Api, snapshot: str) -> None:
    pool.set("nbd.slots", "1")
    with opened(pool, api, snapshot) as client:
        with connect(pool) as late:
            assert late.at_end()
        client.disconnect()
    for _ in range(20):  # at once, and every time
        with opened(pool, api, snapshot) as again:
            again.disconnect()


def test_the_seventeenth_connection_is_closed_without_a_byte(pool: RunningPool) -> None:
    clients = [connect(pool) for _ in range(16)]
    try:
        for client in clients:
            client.hello()
        with connect(pool) as late, connect(pool, "127.0.0.13") as elsewhere:
            assert late.at_end()
            assert elsewhere.hello().startswith(b"NBDMAGIC")  # slots are per host
    finally:
        for client in clients:
            client.connection.close()


def test_a_host_without_the_sr_closes(pool: RunningPool, api: Api) -> None:
    vdi = api.named("VDI", "app1 odd")
    name = info(api, vdi)[0]["exportname"]
    assert {row["address"] for row in info(api, vdi)} & {"127.0.0.13"} == set()

    with connect(pool, "127.0.0.13") as client:
        client.hello()
        client.starttls(pool.certificate("xcp2"), name="xcp2.sim")
        with pytest.raises(Closed):
            client.export_name(name)


@pytest.fixture
def without_tls(api: Api) -> Iterator[None]:
    network = api.named("network", "NBD network")
    api.call("network.remove_purpose", network, "nbd")
    api.call("network.add_purpose", network, "insecure_nbd")
    yield
    api.call("network.remove_purpose", network, "insecure_nbd")
    api.call("network.add_purpose", network, "nbd")


@pytest.mark.usefixtures("without_tls")
@pytest.mark.parametrize(
    ("option", "reply"),
    [
        (nbdclient.STARTTLS, nbdclient.ERR_POLICY),
        (nbdclient.LIST, nbdclient.ERR_POLICY),
        (nbdclient.GO, nbdclient.ERR_UNSUP),
        (nbdclient.ABORT, nbdclient.ACK),
    ],
)
def test_options_without_tls(pool: RunningPool, option: int, reply: int) -> None:
    with connect(pool) as client:
        client.hello(flags=0)  # tolerated here

        assert client.option(option) == reply


@pytest.mark.usefixtures("without_tls")
def test_serves_plainly_when_the_purpose_is_insecure(
    pool: RunningPool, api: Api, snapshot: str
) -> None:
    row = info(api, snapshot)[0]
    assert row["cert"].startswith("-----BEGIN CERTIFICATE")  # a certificate does not mean TLS

    with connect(pool) as client:
        client.hello()
        client.export_name(row["exportname"])
        assert len(client.read(0, 512)) == 512
        client.disconnect()


def test_closes_without_greeting_when_no_network_has_a_purpose(
    pool: RunningPool, api: Api, snapshot: str
) -> None:
    network = api.named("network", "NBD network")
    api.call("network.remove_purpose", network, "nbd")
    try:
        with connect(pool) as client:
            assert client.at_end()
        assert info(api, snapshot) == []
    finally:
        api.call("network.add_purpose", network, "nbd")


def test_tls_is_1_2_with_the_two_suites(pool: RunningPool) -> None:
    with connect(pool) as client:
        client.hello()
        client.starttls(pool.certificate())

        assert isinstance(client.connection, ssl.SSLSocket)
        assert client.connection.version() == "TLSv1.2"
        cipher = client.connection.cipher()
        assert cipher is not None
        assert cipher[0] == "ECDHE-RSA-AES256-GCM-SHA384"


def test_the_certificate_lacks_the_nbd_address(pool: RunningPool) -> None:
    with connect(pool) as client:
        client.hello()

        with pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch"):
            client.starttls(pool.certificate(), name="127.0.0.12")


def test_hosts_have_different_certificates(pool: RunningPool) -> None:
    with connect(pool, "127.0.0.13") as client:
        client.hello()

        with pytest.raises(ssl.SSLCertVerificationError):
            client.starttls(pool.certificate("xcp1"), name="xcp2.sim")


def test_an_impostor_shows_another_certificate(pool: RunningPool) -> None:
    pool.set("nbd.impostor", "xcp1")
    with connect(pool) as client:
        client.hello()

        with pytest.raises(ssl.SSLCertVerificationError):
            client.starttls(pool.certificate())
    assert pool.stolen() == []


def test_stripping_starttls_catches_who_goes_on_without(
    pool: RunningPool, api: Api, snapshot: str
) -> None:
    pool.set("nbd.strip", "xcp1")
    name = info(api, snapshot)[0]["exportname"]
    with connect(pool) as client:
        client.hello()
        assert client.option(nbdclient.STARTTLS) == nbdclient.ERR_UNSUP
        assert pool.stolen() == []

        client.export_name(name)

        assert pool.stolen() == [name]
        client.disconnect()


def test_no_tls_though_the_purpose_is_nbd(pool: RunningPool) -> None:
    pool.set("nbd.no_tls", "xcp1")
    with connect(pool) as client:
        client.hello()

        assert client.option(nbdclient.STARTTLS) == nbdclient.ERR_POLICY


def test_silence_before_the_greeting_ends_with_the_fault(pool: RunningPool) -> None:
    pool.set("nbd.silent", "xcp1")
    with connect(pool) as client:
        client.connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.connection.recv(1)
        client.connection.settimeout(10)

        pool.set("nbd.silent", "")

        assert client.at_end()


def test_drop_after_cuts_in_the_middle_of_data(pool: RunningPool, api: Api, snapshot: str) -> None:
    pool.set("nbd.drop_after", "100K")
    pool.set("nbd.drop_count", "1")
    with opened(pool, api, snapshot) as client:
        client.request(nbdclient.READ, 0, 256 * KiB)
        assert client.reply() == 0
        with pytest.raises(Closed) as closed:
            client.exactly(256 * KiB)
        assert len(closed.value.got) == 100 * KiB

    with opened(pool, api, snapshot) as again:
        assert len(again.read(0, 256 * KiB)) == 256 * KiB


def test_close_after_ends_between_two_reads(pool: RunningPool, api: Api, snapshot: str) -> None:
    pool.control("reset-counters")
    pool.set("nbd.close_after", "2")
    pool.set("nbd.drop_count", "1")
    with opened(pool, api, snapshot) as client:
        client.read(0, 100 * KiB)
        client.read(0, 100 * KiB)
        assert client.at_end()
    with opened(pool, api, snapshot) as again:  # only one connection was to be ended
        for _ in range(3):
            again.read(0, KiB)
    counters = pool.control("counters")
    assert isinstance(counters, dict)
    assert counters["nbd"]["dropped"] == 1


def test_a_delay_ends_with_the_fault(pool: RunningPool, api: Api, snapshot: str) -> None:
    pool.set("nbd.delay", "1h")
    with opened(pool, api, snapshot) as client:
        client.request(nbdclient.READ, 0, KiB)
        pool.set("nbd.delay", "")
        assert client.reply() == 0


def test_requests_are_answered_in_order(pool: RunningPool, api: Api, snapshot: str) -> None:
    with opened(pool, api, snapshot) as client:
        for offset in (0, MiB):
            client.request(nbdclient.READ, offset, 4096)

        assert client.reply() == 0
        first = client.exactly(4096)
        assert client.reply() == 0
        second = client.exactly(4096)

        assert first == client.read(0, 4096)
        assert second == client.read(MiB, 4096)
        client.disconnect()


def test_get_nbd_info_lists_each_address_of_each_host(
    pool: RunningPool, api: Api, snapshot: str
) -> None:
    rows = info(api, snapshot)

    assert [row["address"] for row in rows if "." in row["address"]] == ["127.0.0.12", "127.0.0.13"]
    assert all(row["address"].endswith("/64") for row in rows if ":" in row["address"])
    assert sum(":" in row["address"] for row in rows) == 2
    assert {row["port"] for row in rows} == {str(pool.nbd_port)}
    assert [row["subject"] for row in rows] == ["xcp1"] * 2 + ["xcp2"] * 2
    assert len({row["exportname"] for row in rows}) == 1


def test_nbdinfo_connects_over_tls(pool: RunningPool, api: Api, snapshot: str) -> None:
    done = subprocess.run(
        ["nbdinfo", uri(pool, api, snapshot)], capture_output=True, text=True, check=True
    )

    assert "newstyle-fixed with TLS, using simple packets" in done.stdout
    assert "can_multi_conn: false" in done.stdout
    assert "is_read_only: true" in done.stdout


def test_nbdcopy_reads_the_whole_disk(
    pool: RunningPool, api: Api, snapshot: str, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.raw"

    subprocess.run(["nbdcopy", uri(pool, api, snapshot), copy], check=True)

    assert copy.stat().st_size == 512 * MiB
    table = subprocess.run(
        ["/usr/sbin/sfdisk", "--dump", copy], capture_output=True, text=True, check=True
    )
    assert "type=83" in table.stdout


def test_nbdcopy_reads_an_odd_size(pool: RunningPool, api: Api, tmp_path: Path) -> None:
    copy = tmp_path / "copy.raw"

    subprocess.run(["nbdcopy", uri(pool, api, api.named("VDI", "odd size")), copy], check=True)

    assert copy.stat().st_size == ODD_SIZE


def test_nbdinfo_refuses_another_hosts_certificate(
    pool: RunningPool, api: Api, snapshot: str
) -> None:
    where = uri(pool, api, snapshot).replace("pki-xcp1", "pki-xcp2")
    pool.tls_directory("xcp2")

    done = subprocess.run(["nbdinfo", where], capture_output=True, text=True, check=False)

    assert done.returncode != 0
    assert "certificate" in done.stderr


def test_many_connections_at_once(pool: RunningPool, api: Api) -> None:
    vdis = [snapshot_of(api, name) for name in ("web1 root", "web1 data")]
    read: list[int] = []

    def copy(vdi: str) -> None:
        with opened(pool, Api(pool).login(), vdi) as client:
            read.append(sum(len(client.read(i * MiB, MiB)) for i in range(8)))
            client.disconnect()

    threads = [threading.Thread(target=copy, args=(vdi,)) for vdi in vdis]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert read == [8 * MiB, 8 * MiB]
