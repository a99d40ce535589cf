"""What happens on the wires when hosts of the simulated pool fail or change roles."""

import contextlib
import http.client
import json
import socket
import ssl
import subprocess
import time
import xmlrpc.client
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import nbdclient
from .nbdclient import Closed, NbdClient
from .simulated import Api, Failure, RunningPool, running_pool

MiB = 1 << 20


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[RunningPool]:
    with running_pool(tmp_path / "pool", "huge") as running:
        yield running


def opened(pool: RunningPool, api: Api) -> NbdClient:
    """Return a client that reads a snapshot of the disk through the first host."""
    snapshot = api.text("VDI.snapshot", api.named("VDI", "huge disk"), {})
    rows = api.call("VDI.get_nbd_info", snapshot)
    assert isinstance(rows, list)
    client = NbdClient("127.0.0.12", pool.nbd_port)
    client.hello()
    client.starttls(pool.certificate())
    client.export_name(rows[0]["exportname"])
    return client


def test_failover_moves_the_master_and_ends_sessions(pool: RunningPool) -> None:
    api = Api(pool).login()

    pool.control("failover", "xcp2")

    with pytest.raises(Failure) as failure:
        api.login()
    assert (failure.value.code, failure.value.params) == ("HOST_IS_SLAVE", ["127.0.0.3"])
    with pytest.raises(Failure, match="SESSION_INVALID"):
        Api(pool, host=1, session=api.session).records("VM")
    assert Api(pool, host=1).login().records("VM")


def test_after_failover_another_certificate_appears(pool: RunningPool) -> None:
    pool.control("failover", "xcp2")
    context = ssl.create_default_context(cafile=str(pool.certificate("xcp1")))
    connection = http.client.HTTPSConnection("127.0.0.3", pool.https_port, context=context)

    with pytest.raises(ssl.SSLCertVerificationError), contextlib.closing(connection):
        connection.request("POST", "/jsonrpc", body="{}")


def test_failover_cuts_https_connections(pool: RunningPool) -> None:
    context = ssl.create_default_context(cafile=str(pool.ca_file))
    connection = http.client.HTTPSConnection("127.0.0.2", pool.https_port, context=context)
    with contextlib.closing(connection):
        call = json.dumps({"id": 1, "jsonrpc": "2.0", "method": "x.y", "params": []})
        connection.request("POST", "/jsonrpc", body=call)
        connection.getresponse().read()

        pool.control("failover", "xcp2")

        with pytest.raises((ConnectionError, ssl.SSLError, http.client.HTTPException)):
            connection.request("POST", "/jsonrpc", body=call)
            connection.getresponse()


def test_failover_leaves_open_exports_alone(pool: RunningPool) -> None:
    with opened(pool, Api(pool).login()) as client:
        pool.control("failover", "xcp2")

        assert len(client.read(0, MiB)) == MiB
        client.disconnect()


def test_a_host_that_dies_cuts_a_read(pool: RunningPool) -> None:
    pool.set("nbd.trickle", "10s")
    with opened(pool, Api(pool).login()) as client:
        client.request(nbdclient.READ, 0, 2 * MiB)
        assert client.reply() == 0
        client.exactly(MiB // 2)

        pool.control("kill-host", "xcp1")

        with pytest.raises(Closed):
            client.exactly(MiB)


def test_a_dead_host_refuses_connections_until_it_is_revived(pool: RunningPool) -> None:
    pool.control("kill-host", "xcp2")
    with pytest.raises(ConnectionRefusedError):
        NbdClient("127.0.0.13", pool.nbd_port)

    pool.control("revive-host", "xcp2")
    with NbdClient("127.0.0.13", pool.nbd_port) as client:
        assert client.hello().startswith(b"NBDMAGIC")


def test_a_renewed_certificate_is_shown_and_told_at_once(pool: RunningPool) -> None:
    host = Api(pool).login().named("host", "xcp1")
    old = pool.certificate().read_text()
    pool.control("renew-certificate", "xcp1")
    new = pool.certificate().read_text()

    assert new != old
    assert ssl.get_server_certificate(("127.0.0.2", pool.https_port)).split() == new.split()
    assert pool.control("call", "host.get_server_certificate", host) == new
    assert pool.ca_file.read_text().startswith(old)  # a user has to learn of it


def test_drop_nbd_frees_the_disk(pool: RunningPool) -> None:
    api = Api(pool).login()
    with opened(pool, api) as client:
        assert pool.control("drop-nbd") == 1
        assert client.at_end()

    attached = [vbd for vbd in api.records("VBD").values() if vbd["currently_attached"]]
    assert [vbd["mode"] for vbd in attached] == ["RW"]  # the guest's own


def test_a_reset_connection_is_reset(pool: RunningPool) -> None:
    pool.set("http.reset", "xcp1")

    context = ssl.create_default_context(cafile=str(pool.ca_file))
    with socket.create_connection(("127.0.0.2", pool.https_port), timeout=10) as connection:
        with pytest.raises(ConnectionResetError):
            context.wrap_socket(connection, server_hostname="127.0.0.2")


def test_a_silent_host_answers_when_the_fault_ends(pool: RunningPool) -> None:
    pool.set("http.silent", "xcp1")
    context = ssl.create_default_context(cafile=str(pool.ca_file))
    with socket.create_connection(("127.0.0.2", pool.https_port), timeout=0.3) as connection:
        with pytest.raises(TimeoutError):
            context.wrap_socket(connection, server_hostname="127.0.0.2")
    pool.set("http.silent", "")

    assert Api(pool).login().session


def test_any_http_status_can_be_ordered(pool: RunningPool) -> None:
    pool.set("http.status", "503")

    with pytest.raises(xmlrpc.client.ProtocolError) as failure:
        Api(pool).login()

    assert failure.value.errcode == 503


def test_reads_can_be_delayed(pool: RunningPool) -> None:
    pool.set("nbd.delay", "150ms")
    with opened(pool, Api(pool).login()) as client:
        before = time.monotonic()
        client.read(0, 4096)

        assert time.monotonic() - before >= 0.15
        client.disconnect()


def test_a_counter_tells_how_many_connections_there_were(pool: RunningPool) -> None:
    api = Api(pool).login()
    pool.control("reset-counters")
    with opened(pool, api) as client, NbdClient("127.0.0.12", pool.nbd_port) as other:
        other.hello()
        client.disconnect()

    counts = pool.control("counters")
    assert isinstance(counts, dict)
    assert counts["nbd"] == {
        "connections": 2, "turned_away": 0, "dropped": 0, "peak": {"xcp1": 2}, "stolen": [],
    }  # fmt: skip


def test_nbdcopy_notices_a_dropped_connection(pool: RunningPool, tmp_path: Path) -> None:
    api = Api(pool).login()
    snapshot = api.text("VDI.snapshot", api.named("VDI", "huge disk"), {})
    rows = api.call("VDI.get_nbd_info", snapshot)
    assert isinstance(rows, list)
    export = rows[0]["exportname"].replace("?", "%3F")
    uri = f"nbds://127.0.0.2:{pool.nbd_port}/{export}"
    pool.set("nbd.drop_after", "4M")

    done = subprocess.run(
        ["nbdcopy", f"{uri}?tls-certificates={pool.tls_directory()}", "null:"],
        capture_output=True,
        check=False,
    )

    assert done.returncode != 0
