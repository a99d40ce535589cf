"""The published way to back up with CBT, walked by the XenAPI package and nbdcopy alone."""

import base64
import ssl
import subprocess
import urllib.parse
import xmlrpc.client
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import XenAPI

from .simulated import RunningPool, running_pool

BLOCK = 64 << 10
Record = dict[str, object]


class Calls:
    """A logged-in XenAPI session; ``call("VM.snapshot", …)`` as its documentation has it."""

    def __init__(self, pool: RunningPool) -> None:
        context = ssl.create_default_context(cafile=str(pool.ca_file))
        self.transport = xmlrpc.client.SafeTransport(context=context)
        self.session = XenAPI.Session(pool.url, transport=self.transport)
        self.session.login_with_password("root", "simulated", "1.0", "reference")

    @property
    def ref(self) -> str:
        """The session's reference at this moment."""
        return str(self.session._session)

    def call(self, method: str, *params: object) -> object:
        kind, _, name = method.partition(".")
        function = getattr(getattr(self.session.xenapi, kind), name)
        return cast(object, function(*params))

    def text(self, method: str, *params: object) -> str:
        value = self.call(method, *params)
        assert isinstance(value, str)
        return value

    def rows(self, method: str, *params: object) -> list[Record]:
        return cast(list[Record], self.call(method, *params))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPool]:
    with running_pool(tmp_path_factory.mktemp("pool")) as running:
        yield running


@pytest.fixture
def xen(pool: RunningPool) -> Iterator[Calls]:
    calls = Calls(pool)
    yield calls
    calls.call("session.logout")
    calls.transport.close()


def disk_of(xen: Calls, vm: str, userdevice: str) -> str:
    for vbd in cast(list[str], xen.call("VM.get_VBDs", vm)):
        if xen.text("VBD.get_userdevice", vbd) == userdevice:
            return xen.text("VBD.get_VDI", vbd)
    raise LookupError(userdevice)


def export_of(xen: Calls, vdi: str) -> str:
    infos = xen.rows("VDI.get_nbd_info", vdi)
    info = next(i for i in infos if str(i["subject"]).startswith("xcp1"))
    assert isinstance(info["port"], str)
    return str(info["exportname"])


def uri_of(pool: RunningPool, export: str) -> str:
    # The certificate has no NBD address: a third party connects to the management one.
    quoted = urllib.parse.quote(export, safe="")
    pki = pool.tls_directory("xcp1")
    return f"nbds://127.0.0.2:{pool.nbd_port}/{quoted}?tls-certificates={pki}"


def read_over_nbd(pool: RunningPool, xen: Calls, vdi: str, target: Path) -> bytes:
    uri = uri_of(pool, export_of(xen, vdi))
    subprocess.run(["nbdcopy", uri, str(target)], check=True, timeout=60)
    return target.read_bytes()


def changed_extents(text: str) -> list[tuple[int, int]]:
    bitmap = base64.b64decode(text, validate=True)
    blocks = [i for i in range(len(bitmap) * 8) if bitmap[i // 8] & (0x80 >> i % 8)]
    return [(block * BLOCK, (block + 1) * BLOCK) for block in blocks]


def test_an_incremental_backup_by_the_book(pool: RunningPool, xen: Calls, tmp_path: Path) -> None:
    (vm,) = cast(list[str], xen.call("VM.get_by_name_label", "web1"))
    live = disk_of(xen, vm, "1")
    xen.call("VDI.enable_cbt", live)
    first = xen.text("VM.snapshot", vm, "base")
    base = disk_of(xen, first, "1")
    image = bytearray(read_over_nbd(pool, xen, base, tmp_path / "base.raw"))
    xen.call("VM.destroy", first)
    xen.call("VDI.data_destroy", base)
    guest = pool.open_guest("web1", "xvdb")
    guest.pwrite(b"changed", 100 * BLOCK - 3)
    guest.pwrite(bytes(image[:4096]), 0)
    guest.shutdown()

    second = xen.text("VM.snapshot", vm, "next")
    newer = disk_of(xen, second, "1")
    extents = changed_extents(xen.text("VDI.list_changed_blocks", base, newer))
    current = read_over_nbd(pool, xen, newer, tmp_path / "newer.raw")
    for start, stop in extents:
        image[start:stop] = current[start:stop]

    assert extents == [(b * BLOCK, (b + 1) * BLOCK) for b in (0, 99, 100)]
    assert image == current
    assert b"changed" in current
    xen.call("VM.destroy", second)
    xen.call("VDI.data_destroy", newer)
    xen.call("VDI.destroy", base)
    assert xen.call("VDI.get_type", newer) == "cbt_metadata"


def test_the_package_logs_in_again_unseen_and_export_names_die(
    pool: RunningPool, xen: Calls
) -> None:
    def nbdinfo(uri: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["nbdinfo", uri], capture_output=True, text=True, check=False)

    before = xen.ref
    (vm,) = cast(list[str], xen.call("VM.get_by_name_label", "web1"))
    uri = uri_of(pool, export_of(xen, disk_of(xen, vm, "0")))
    assert nbdinfo(uri).returncode == 0
    pool.control("expire-sessions")

    xen.call("VM.get_all")

    assert xen.ref != before
    assert nbdinfo(uri).returncode != 0


def test_types_reach_python_as_from_a_real_pool(xen: Calls) -> None:
    records = cast(dict[str, Record], xen.call("VDI.get_all_records"))
    record = next(r for r in records.values() if r["is_a_snapshot"])

    assert isinstance(record["virtual_size"], str)
    assert isinstance(record["snapshot_time"], xmlrpc.client.DateTime)
    assert record["cbt_enabled"] in (True, False)


def test_a_failure_has_details(xen: Calls) -> None:
    with pytest.raises(XenAPI.Failure) as failure:
        xen.call("VDI.get_record", "OpaqueRef:none")

    assert failure.value.details == ["HANDLE_INVALID", "VDI", "OpaqueRef:none"]
