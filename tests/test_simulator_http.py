"""The simulated hosts' HTTPS servers and handlers, through plain sockets, curl and qemu-img."""

import http.client
import io
import json
import socket
import ssl
import struct
import subprocess
import tarfile
import xmlrpc.client
from collections.abc import Iterator
from pathlib import Path

import pytest
import XenAPI

from cbtfs.simulator.default_scenario import ODD_SIZE

from .simulated import Api, Failure, RunningPool, running_pool

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


def connect(pool: RunningPool, host: int = 0) -> http.client.HTTPSConnection:
    context = ssl.create_default_context(cafile=str(pool.ca_file))
    return http.client.HTTPSConnection(
        f"127.0.0.{2 + host}", pool.https_port, context=context, timeout=20
    )


def raw_exchange(pool: RunningPool, request: bytes) -> bytes:
    context = ssl.create_default_context(cafile=str(pool.ca_file))
    with socket.create_connection(("127.0.0.2", pool.https_port), timeout=20) as plain:
        with context.wrap_socket(plain, server_hostname="127.0.0.2") as connection:
            connection.sendall(request)
            return b"".join(iter(lambda: connection.recv(65536), b""))


def get(
    pool: RunningPool, target: str, *, host: int = 0
) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = connect(pool, host)
    connection.request("GET", target)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, response.headers, body


def put(
    pool: RunningPool, target: str, body: bytes, *, headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    connection = connect(pool)
    connection.request("PUT", target, body=body, headers=headers or {})
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    return response.status, answer


def finished(api: Api, task: str) -> dict[str, object]:
    """Return a task's record once it is no longer pending; the answer may end a moment earlier."""
    while True:
        record = api.call("task.get_record", task)
        assert isinstance(record, dict)
        if record["status"] != "pending":
            return record


def new_task(api: Api) -> str:
    return api.text("task.create", "test", "")


def new_vdi(api: Api, size: int = 8 * MiB, sr: str = "Shared NFS") -> str:
    record = {
        "name_label": "made by a test",
        "name_description": "",
        "SR": api.named("SR", sr),
        "virtual_size": str(size),
        "type": "user",
        "sharable": False,
        "read_only": False,
        "other_config": {},
    }
    return api.text("VDI.create", record)


def old_snapshot(api: Api) -> str:
    found = [
        (str(record["snapshot_time"]), ref)
        for ref, record in api.records("VDI").items()
        if record["name_label"] == "web1 root" and record["is_a_snapshot"]
    ]
    return min(found)[1]


# ── the server ───────────────────────────────────────────────────────────────────────────


def test_one_connection_carries_many_calls(pool: RunningPool) -> None:
    connection = connect(pool)
    for _ in range(3):
        body = json.dumps({"id": 1, "jsonrpc": "2.0", "method": "x.y", "params": []})
        connection.request("POST", "/jsonrpc", body=body)
        answer = json.loads(connection.getresponse().read())
        assert answer["error"]["message"] == "MESSAGE_METHOD_UNKNOWN"
    connection.close()


def test_a_long_head_is_431(pool: RunningPool) -> None:
    status, headers, body = get(pool, "/x?" + "y" * 1100)

    assert status == 431
    assert headers["Content-Type"] == "text/html"
    assert b"<html>" in body


def test_an_unknown_address_is_403(pool: RunningPool) -> None:
    assert get(pool, "/nothing")[0] == 403


def test_a_call_needs_content_length(pool: RunningPool) -> None:
    answer = raw_exchange(pool, b"POST / HTTP/1.1\r\nHost: x\r\n\r\n")

    assert answer.startswith(b"HTTP/1.1 400 ")


def test_a_call_of_more_than_300_kib_is_refused(pool: RunningPool) -> None:
    head = b"POST / HTTP/1.1\r\nContent-Length: 307201\r\n\r\n"

    assert raw_exchange(pool, head).startswith(b"HTTP/1.1 400 ")


def test_nonsense_is_400(pool: RunningPool) -> None:
    assert raw_exchange(pool, b"hello\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_tls_1_3_is_not_spoken(pool: RunningPool) -> None:
    context = ssl.create_default_context(cafile=str(pool.ca_file))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    with socket.create_connection(("127.0.0.2", pool.https_port)) as plain:
        with pytest.raises(ssl.SSLError):
            context.wrap_socket(plain, server_hostname="127.0.0.2")


def test_openssl_sees_the_curve_and_the_certificate(pool: RunningPool) -> None:
    done = subprocess.run(
        ["openssl", "s_client", "-connect", f"127.0.0.2:{pool.https_port}", "-CAfile",
         pool.certificate(), "-verify_return_error", "-verify_ip", "127.0.0.2"],
        capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip

    # "Server Temp Key" until OpenSSL 3.4, "Peer Temp Key" since
    assert "Temp Key: ECDH, secp384r1, 384 bits" in done.stdout
    assert "Verify return code: 0 (ok)" in done.stdout
    assert "Protocol  : TLSv1.2" in done.stdout


def test_an_impostor_has_another_certificate(pool: RunningPool) -> None:
    pool.set("http.impostor", "xcp1")

    with pytest.raises(ssl.SSLCertVerificationError):
        get(pool, "/")
    assert pool.stolen() == []


def test_curl_verifies_the_host(pool: RunningPool) -> None:
    body = '{"id":1,"jsonrpc":"2.0","method":"x.y","params":[]}'
    done = subprocess.run(
        ["curl", "-sS", "--cacert", pool.certificate(), "-d", body, f"{pool.url}/jsonrpc"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert "MESSAGE_METHOD_UNKNOWN" in done.stdout


def test_xenapi_package_logs_in(pool: RunningPool) -> None:
    context = ssl.create_default_context(cafile=str(pool.ca_file))
    transport = xmlrpc.client.SafeTransport(context=context)
    session = XenAPI.Session(pool.url, transport=transport)

    session.login_with_password("root", "simulated", "1.0", "test")

    assert session.xenapi.VM.get_by_name_label("web1")
    session.xenapi.session.logout()
    transport.close()


def test_supporter_sends_to_the_master(pool: RunningPool) -> None:
    with pytest.raises(Failure) as failure:
        Api(pool, host=1).login()

    assert (failure.value.code, failure.value.params) == ("HOST_IS_SLAVE", ["127.0.0.2"])


# ── authentication of handlers ───────────────────────────────────────────────────────────


def test_without_session_401_and_the_task_fails(pool: RunningPool, api: Api) -> None:
    task = new_task(api)

    status, headers, _ = get(pool, f"/export_raw_vdi?vdi=x&session_id=wrong&task_id={task}")

    assert status == 401
    assert headers["WWW-Authenticate"].startswith("Basic")
    assert finished(api, task)["error_info"] == ["SESSION_AUTHENTICATION_FAILED"]


def test_http_basic_is_a_temporary_session(pool: RunningPool, api: Api) -> None:
    uuid = api.text("VDI.get_uuid", api.named("VDI", "odd size"))
    sessions = pool.control("counters")

    done = subprocess.run(
        ["curl", "-sS", "--fail", "--cacert", pool.certificate(), "-u", "root:simulated", "-o",
         "/dev/null", "-w", "%{size_download}", f"{pool.url}/export_raw_vdi?vdi={uuid}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert int(done.stdout) == ODD_SIZE
    assert isinstance(sessions, dict)


def test_a_session_in_a_cookie(pool: RunningPool, api: Api) -> None:
    uuid = api.text("VM.get_uuid", api.named("VM", "mail"))
    connection = connect(pool)
    connection.request(
        "GET", f"/export_metadata?uuid={uuid}", headers={"Cookie": f"session_id={api.session}"}
    )

    assert connection.getresponse().status == 200
    connection.close()


def test_rbac_refusal_is_403(pool: RunningPool, api: Api) -> None:
    pool.set("xapi.fail", "export_raw_vdi:RBAC_PERMISSION_DENIED:http/get_export_raw_vdi:no")
    task = new_task(api)
    vdi = api.named("VDI", "odd size")

    target = f"/export_raw_vdi?vdi={vdi}&session_id={api.session}&task_id={task}"

    assert get(pool, target)[0] == 403
    assert finished(api, task)["error_info"] == [
        "RBAC_PERMISSION_DENIED", "http/get_export_raw_vdi", "no",
    ]  # fmt: skip


def test_an_unknown_task_is_500(pool: RunningPool, api: Api) -> None:
    vdi = api.named("VDI", "odd size")
    target = f"/export_raw_vdi?vdi={vdi}&session_id={api.session}&task_id=OpaqueRef:none"

    assert get(pool, target)[0] == 500


# ── export of disks ──────────────────────────────────────────────────────────────────────


def test_raw_export_is_the_disk_without_a_length(pool: RunningPool, api: Api) -> None:
    vdi = api.named("VDI", "odd size")
    uuid = api.text("VDI.get_uuid", vdi)

    status, headers, body = get(pool, f"/export_raw_vdi?vdi={uuid}&session_id={api.session}")

    assert status == 200
    assert "Content-Length" not in headers
    assert headers["Content-Type"] == "application/octet-stream"
    assert f'"{uuid}.raw"' in headers["Content-Disposition"]
    assert len(body) == ODD_SIZE
    assert body[:4096] == bytes(4096)
    assert finished(api, headers["Task-id"])["status"] == "success"


def test_vhd_export_holds_the_same_bytes(pool: RunningPool, api: Api, tmp_path: Path) -> None:
    vdi = old_snapshot(api)
    _, _, raw = get(pool, f"/export_raw_vdi?vdi={vdi}&session_id={api.session}")
    file = tmp_path / "disk.vhd"

    status, headers, body = get(
        pool, f"/export_raw_vdi?vdi={vdi}&format=vhd&session_id={api.session}"
    )
    file.write_bytes(body)
    subprocess.run(["qemu-img", "convert", "-O", "raw", file, tmp_path / "disk.raw"], check=True)

    assert status == 200
    assert headers["Content-Type"] == "application/vhd"
    assert len(body) < 100 * MiB  # of 512: allocated blocks only
    assert (tmp_path / "disk.raw").read_bytes() == raw


def apply_vhd(delta: bytes, base: bytes) -> bytes:
    """Return ``base`` with the sectors that a differencing VHD holds put over it."""
    disk = bytearray(base)
    (table,) = struct.unpack_from(">Q", delta, 512 + 16)
    (count,) = struct.unpack_from(">I", delta, 512 + 28)
    for number, sector in enumerate(struct.unpack_from(f">{count}I", delta, table)):
        if sector == 0xFFFFFFFF:
            continue
        bitmap = delta[sector * 512 : (sector + 1) * 512]
        for place in (n for n in range(4096) if bitmap[n // 8] & (0x80 >> n % 8)):
            held = (sector + 1 + place) * 512
            at = number * 2 * MiB + place * 512
            disk[at : at + 512] = delta[held : held + 512]
    return bytes(disk)


def test_a_vhd_delta_over_its_base_is_the_newer_disk(pool: RunningPool, api: Api) -> None:
    base = old_snapshot(api)
    newer = next(
        ref
        for ref, record in api.records("VDI").items()
        if record["name_label"] == "web1 root" and record["is_a_snapshot"] and ref != base
    )
    target = f"/export_raw_vdi?session_id={api.session}&vdi="

    delta = get(pool, f"{target}{newer}&format=vhd&base={base}")[2]

    assert struct.unpack_from(">I", delta, 60)[0] == 4  # differencing
    uuid = api.text("VDI.get_uuid", base)
    assert delta[512 + 40 : 512 + 56].hex() == uuid.replace("-", "")
    assert len(delta) < 30 * MiB
    assert apply_vhd(delta, get(pool, target + base)[2]) == get(pool, target + newer)[2]


def test_unknown_format_is_404_and_on_the_task(pool: RunningPool, api: Api) -> None:
    task = new_task(api)
    vdi = api.named("VDI", "odd size")

    status, _, _ = get(
        pool, f"/export_raw_vdi?vdi={vdi}&format=x&session_id={api.session}&task_id={task}"
    )

    assert status == 404
    assert finished(api, task)["error_info"] == ["INTERNAL_ERROR", "Unknown format x"]


def test_a_host_without_the_sr_redirects(pool: RunningPool, api: Api) -> None:
    vdi = api.named("VDI", "odd size")
    target = f"/export_raw_vdi?vdi={vdi}&session_id={api.session}"

    status, headers, _ = get(pool, target, host=1)

    assert status == 302
    assert not any(record["status"] == "pending" for record in api.records("task").values())
    assert headers["Location"] == f"https://127.0.0.2:{pool.https_port}{target}"


def test_a_failed_attach_is_html_inside_the_200(pool: RunningPool, api: Api) -> None:
    vdi = api.named("VDI", "odd size")
    pool.set("nbd.attach_fail", api.text("VDI.get_uuid", vdi))
    task = new_task(api)

    status, _, body = get(
        pool, f"/export_raw_vdi?vdi={vdi}&session_id={api.session}&task_id={task}"
    )

    assert status == 200
    assert body.startswith(b"<html>")
    assert finished(api, task)["status"] == "failure"


def test_a_truncated_export_shows_on_the_task_only(pool: RunningPool, api: Api) -> None:
    pool.set("http.truncate", "1M")
    task = new_task(api)
    vdi = api.named("VDI", "odd size")

    status, _, body = get(
        pool, f"/export_raw_vdi?vdi={vdi}&session_id={api.session}&task_id={task}"
    )

    assert (status, len(body)) == (200, MiB)
    assert finished(api, task)["error_info"] == ["VDI_IO_ERROR", "Device I/O errors"]


def test_the_disk_is_in_use_until_after_the_answer(pool: RunningPool, api: Api) -> None:
    pool.set("nbd.detach_delay", "300ms")
    vdi = new_vdi(api)

    _, headers, _ = get(pool, f"/export_raw_vdi?vdi={vdi}&session_id={api.session}")
    during = api.call("VDI.get_VBDs", vdi)
    task = finished(api, headers["Task-id"])

    assert isinstance(during, list)
    assert len(during) == 1
    assert task["status"] == "success"
    assert api.call("VDI.get_VBDs", vdi) == []


def test_the_table_of_a_vhd_lies_where_vhd_tool_puts_it(pool: RunningPool, api: Api) -> None:
    vdi = new_vdi(api)
    _, _, body = get(pool, f"/export_raw_vdi?vdi={vdi}&format=vhd&session_id={api.session}")

    assert struct.unpack_from(">Q", body, 512 + 16) == (2048,)
    assert body[1536:2048] == bytes(512)
    assert body[2048:2064] == b"\xff" * 16  # 4 blocks, none of them there
    assert len(body) == 2048 + 512 + 512


def test_an_sr_that_does_not_know_exports_every_block(pool: RunningPool, api: Api) -> None:
    pool.set("vhd.full", "Shared NFS")
    vdi = new_vdi(api)
    _, _, body = get(pool, f"/export_raw_vdi?vdi={vdi}&format=vhd&session_id={api.session}")

    assert len(body) == 2048 + 512 + 4 * (512 + 2 * MiB) + 512


def test_a_flipped_byte_is_the_only_one_that_differs(pool: RunningPool, api: Api) -> None:
    target = f"/export_raw_vdi?vdi={api.named('VDI', 'odd size')}&session_id={api.session}"
    whole = get(pool, target)[2]
    pool.set("http.flip", "5M")
    flipped = get(pool, target)[2]

    assert [n for n in (5 * MiB - 1, 5 * MiB, 5 * MiB + 1) if whole[n] != flipped[n]] == [5 * MiB]
    assert (whole[: 5 * MiB], whole[5 * MiB + 1 :]) == (flipped[: 5 * MiB], flipped[5 * MiB + 1 :])


def test_a_stalled_export_holds_the_disk_until_the_client_hangs_up(
    pool: RunningPool, api: Api
) -> None:
    pool.set("http.stall", "1M")
    vdi = new_vdi(api)
    connection = connect(pool)
    connection.request("GET", f"/export_raw_vdi?vdi={vdi}&session_id={api.session}")
    response = connection.getresponse()

    assert len(response.read(MiB)) == MiB
    assert api.call("VDI.get_VBDs", vdi) != []
    response.close()
    connection.close()

    assert finished(api, response.headers["Task-id"])["error_info"] == [
        "VDI_IO_ERROR", "Device I/O errors",
    ]  # fmt: skip
    assert api.call("VDI.get_VBDs", vdi) == []


def test_a_host_may_be_told_to_send_everybody_elsewhere(pool: RunningPool, api: Api) -> None:
    pool.set("http.redirect", "127.0.0.9")
    vdi = api.named("VDI", "odd size")

    status, headers, _ = get(pool, f"/export_raw_vdi?vdi={vdi}&session_id={api.session}")

    assert status == 302
    assert headers["Location"].startswith(f"https://127.0.0.9:{pool.https_port}/export_raw_vdi")


# ── import of disks ──────────────────────────────────────────────────────────────────────


def chunks(*parts: tuple[int, bytes]) -> bytes:
    body = b"".join(struct.pack("<QI", offset, len(data)) + data for offset, data in parts)
    return body + bytes(12)


def test_chunked_import_writes_any_order_and_nothing_else(pool: RunningPool, api: Api) -> None:
    vdi = new_vdi(api)
    task = new_task(api)
    body = chunks((5 * MiB, b"b" * 3 * MiB), (1024, b"a" * 512))

    status, _ = put(
        pool, f"/import_raw_vdi?vdi={vdi}&chunked&session_id={api.session}&task_id={task}", body
    )

    assert status == 200
    assert finished(api, task)["result"] == f"<value>{vdi}</value>"
    _, _, disk = get(pool, f"/export_raw_vdi?vdi={vdi}&session_id={api.session}")
    assert disk == bytes(1024) + b"a" * 512 + bytes(5 * MiB - 1536) + b"b" * 3 * MiB


def test_a_chunk_beyond_the_end_fails_on_the_task(pool: RunningPool, api: Api) -> None:
    vdi = new_vdi(api)
    task = new_task(api)

    put(
        pool,
        f"/import_raw_vdi?vdi={vdi}&chunked&session_id={api.session}&task_id={task}",
        chunks((8 * MiB - 512, bytes(1024))),
    )

    assert finished(api, task)["error_info"] == ["VDI_IO_ERROR", "Device I/O errors"]


def test_a_missing_terminator_fails_on_the_task(pool: RunningPool, api: Api) -> None:
    vdi = new_vdi(api)
    task = new_task(api)
    target = f"/import_raw_vdi?vdi={vdi}&chunked&session_id={api.session}&task_id={task}"
    head = f"PUT {target} HTTP/1.1\r\nContent-Length: 524\r\n\r\n".encode()
    context = ssl.create_default_context(cafile=str(pool.ca_file))
    with socket.create_connection(("127.0.0.2", pool.https_port), timeout=20) as plain:
        with context.wrap_socket(plain, server_hostname="127.0.0.2") as connection:
            connection.sendall(head + struct.pack("<QI", 0, 512) + bytes(512))

    assert finished(api, task)["status"] == "failure"


def test_raw_import_into_an_sr_creates_a_disk(pool: RunningPool, api: Api) -> None:
    sr = api.text("SR.get_uuid", api.named("SR", "Shared NFS"))
    task = new_task(api)

    put(
        pool,
        f"/import_raw_vdi?sr_uuid={sr}&session_id={api.session}&task_id={task}",
        b"x" * 2 * MiB,
    )

    vdi = str(finished(api, task)["result"]).removeprefix("<value>").removesuffix("</value>")
    assert api.text("VDI.get_name_label", vdi) == "Imported VDI"
    _, _, disk = get(pool, f"/export_raw_vdi?vdi={vdi}&session_id={api.session}")
    assert disk == b"x" * 2 * MiB


def test_transfer_encoding_is_refused(pool: RunningPool, api: Api) -> None:
    vdi = new_vdi(api)

    status, body = put(
        pool,
        f"/import_raw_vdi?vdi={vdi}&session_id={api.session}",
        b"",
        headers={"Transfer-Encoding": "chunked"},
    )

    assert status == 404
    assert b"Cannot handle encoding" in body


def test_import_without_disk_or_sr_is_400(pool: RunningPool, api: Api) -> None:
    task = new_task(api)

    status, _ = put(pool, f"/import_raw_vdi?session_id={api.session}&task_id={task}", b"")

    assert status == 400
    assert finished(api, task)["error_info"] == ["VDI_MISSING"]


def test_chunked_vhd_is_404(pool: RunningPool, api: Api) -> None:
    vdi = new_vdi(api)

    status, body = put(
        pool, f"/import_raw_vdi?vdi={vdi}&format=vhd&chunked&session_id={api.session}", b""
    )

    assert status == 404
    assert b"Cannot handle chunked VHD" in body


# ── metadata ─────────────────────────────────────────────────────────────────────────────


def exported(pool: RunningPool, api: Api, vm: str, **options: str) -> bytes:
    extra = "".join(f"&{name}={value}" for name, value in options.items())
    uuid = api.text("VM.get_uuid", vm)
    status, headers, body = get(
        pool, f"/export_metadata?uuid={uuid}{extra}&session_id={api.session}"
    )
    assert status == 200
    assert int(headers["Content-Length"]) == len(body)
    return body


def ova(archive: bytes) -> list[dict[str, object]]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        member = tar.extractfile("ova.xml")
        assert member is not None
        text = f"<params><param>{member.read().decode()}</param></params>"
    (content,), _ = xmlrpc.client.loads(text)
    assert isinstance(content, dict)
    objects: list[dict[str, object]] = content["objects"]
    return objects


def test_exported_metadata_names_vm_disks_and_networks(pool: RunningPool, api: Api) -> None:
    objects = ova(exported(pool, api, api.named("VM", "db1"), export_snapshots="false"))

    assert [item["class"] for item in objects] == ["VM", "VBD", "VIF", "VDI", "SR", "network"]
    vm, vbd = objects[0]["snapshot"], objects[1]["snapshot"]
    assert isinstance(vm, dict)
    assert isinstance(vbd, dict)
    assert vm["name_label"] == "db1"
    assert vbd["VM"] == objects[0]["id"]
    assert vm["memory_static_max"] == str(1 << 30)  # an int is a string here too


def test_snapshots_are_exported_by_default(pool: RunningPool, api: Api) -> None:
    web1 = next(
        ref
        for ref, record in api.records("VM").items()
        if record["name_label"] == "web1" and not record["is_a_snapshot"]
    )

    kinds = [item["class"] for item in ova(exported(pool, api, web1))]

    assert kinds.count("VM") == 3


def test_import_makes_a_new_vm_on_the_mapped_disk(pool: RunningPool, api: Api) -> None:
    mail = api.named("VM", "mail")
    archive = exported(pool, api, mail)
    old = api.text("VDI.get_uuid", api.named("VDI", "mail root"))
    disk = new_vdi(api, size=64 * MiB)
    new = api.text("VDI.get_uuid", disk)
    task = new_task(api)

    status, _ = put(
        pool, f"/import_metadata?vdi:{old}={new}&session_id={api.session}&task_id={task}", archive
    )

    assert status == 200
    result = str(finished(api, task)["result"])
    assert result.startswith("<value><array><data><value>OpaqueRef:")
    vm = result.removeprefix("<value><array><data><value>").partition("<")[0]
    assert api.text("VM.get_name_label", vm) == "mail"
    assert api.text("VM.get_uuid", vm) != api.text("VM.get_uuid", mail)
    (vbd,) = list(api.call("VM.get_VBDs", vm))  # type: ignore[call-overload]
    assert api.text("VBD.get_VDI", vbd) == disk
    api.call("VM.destroy", vm)


def test_import_without_the_disk_fails_on_the_task(pool: RunningPool, api: Api) -> None:
    mail = api.named("VM", "mail")
    disk = new_vdi(api)
    vbd = {
        "VM": mail, "VDI": disk, "userdevice": "5", "bootable": False, "mode": "RW",
        "type": "Disk", "empty": False, "other_config": {}, "qos_algorithm_type": "",
        "qos_algorithm_params": {}, "unpluggable": True, "device": "",
    }  # fmt: skip
    created = api.text("VBD.create", vbd)
    location = api.text("VDI.get_location", disk)
    archive = exported(pool, api, mail)
    api.call("VBD.destroy", created)
    api.call("VDI.destroy", disk)
    task = new_task(api)

    put(pool, f"/import_metadata?session_id={api.session}&task_id={task}", archive)

    sr = api.text("SR.get_uuid", api.named("SR", "Shared NFS"))
    assert finished(api, task)["error_info"] == ["VDI_LOCATION_MISSING", sr, location]


def test_restoring_an_existing_vm_is_refused(pool: RunningPool, api: Api) -> None:
    mail = api.named("VM", "mail")
    task = new_task(api)

    put(
        pool,
        f"/import_metadata?restore=true&session_id={api.session}&task_id={task}",
        exported(pool, api, mail),
    )

    assert finished(api, task)["error_info"] == ["DUPLICATE_VM", mail]
