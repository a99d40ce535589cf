"""A small simulated pool inside the test's process, and clients that talk to its API in bytes.

Two hosts; SRs ``shared`` (nfs), ``local`` (ext, on xcp1), ``odd`` (sizes in multiples of 512),
``plain`` (no change tracking) and ``tools``; ``web1`` runs on xcp1 with two disks, ``idle`` is
halted. Nothing listens on a port.
"""

import base64
import json
import xmlrpc.client
from pathlib import Path
from typing import cast

from cbtfs.simulator import api
from cbtfs.simulator.builder import Builder
from cbtfs.simulator.disk import Disk
from cbtfs.simulator.pool import SimulatedPool

MiB = 1 << 20
BLOCK = 64 << 10

Json = bool | int | float | str | list["Json"] | dict[str, "Json"]


class Failed(Exception):
    """A call failed; ``code`` and ``params`` as received."""

    def __init__(self, code: str, params: list[str]) -> None:
        self.code = code
        self.params = params
        super().__init__(code, *params)


class Client:
    """Calls the API of one host over JSON-RPC 2, with a session of its own."""

    def __init__(self, pool: SimulatedPool, host: str) -> None:
        self.pool = pool
        self.host = host
        self.session = ""

    def login(self, originator: str = "test") -> "Client":
        """Log in; return self."""
        found = self.bare("session.login_with_password", "root", "root", "1.0", originator)
        self.session = str(found)
        return self

    def bare(self, method: str, *params: Json) -> Json:
        """Call without a session."""
        body = {"jsonrpc": "2.0", "id": 7, "method": method, "params": list(params)}
        status, _, reply = self.post("/jsonrpc", json.dumps(body).encode())
        assert status == 200
        answer = json.loads(reply)
        assert answer["id"] == 7
        if "error" in answer:
            raise Failed(answer["error"]["message"], answer["error"]["data"])
        return cast(Json, answer["result"])

    def call(self, method: str, *params: Json) -> Json:
        """Call with the session."""
        return self.bare(method, self.session, *params)

    def text(self, method: str, *params: Json) -> str:
        """Call what returns a string."""
        return str(self.call(method, *params))

    def texts(self, method: str, *params: Json) -> list[str]:
        """Call what returns a set of strings."""
        found = self.call(method, *params)
        assert isinstance(found, list)
        return [str(item) for item in found]

    def record(self, kind: str, ref: str) -> dict[str, Json]:
        """Return a record."""
        found = self.call(f"{kind}.get_record", ref)
        assert isinstance(found, dict)
        return found

    def changed(self, older: str, newer: str) -> set[int]:
        """Return the numbers of the blocks changed, decoded here, highest bit first."""
        bitmap = base64.b64decode(self.text("VDI.list_changed_blocks", older, newer), validate=True)
        return {i for i in range(len(bitmap) * 8) if bitmap[i // 8] & (0x80 >> i % 8)}

    def post(self, path: str, body: bytes) -> tuple[int, str, bytes]:
        """Send a body as it is."""
        return api.handle_rpc(self.pool, self.host, path=path, body=body, client="127.0.0.1")

    def xml(self, method: str, *params: str) -> dict[str, object]:
        """Call over XML-RPC; return Status and Value or ErrorDescription as Python sees them."""
        body = xmlrpc.client.dumps(params, method)
        status, kind, reply = self.post("/RPC2", body.encode())
        assert (status, kind) == (200, "text/xml")
        (answer,), _ = xmlrpc.client.loads(reply)
        return cast(dict[str, object], answer)


class SmallPool:
    """The pool, and the refs of what is in it."""

    def __init__(self, directory: Path) -> None:
        self.pool = SimulatedPool(directory)
        self.pool.faults.set("vdi.data_destroy_wait", "50ms")
        self.pool.faults.set("xapi.auth_delay", "1ms")
        self.pool.faults.set("xapi.batch", "1ms")
        b = Builder(self.pool, seed="small")
        b.add_pool("small")
        self.host1 = b.add_host("xcp1", address="127.0.0.2")
        self.host2 = b.add_host("xcp2", address="127.0.0.3")
        management = b.add_network("management")
        self.network = b.add_network("storage", purpose=["nbd"])
        b.add_pif(self.host1, management, ip="127.0.0.2", management=True)
        b.add_pif(self.host2, management, ip="127.0.0.3", management=True)
        b.add_pif(self.host1, self.network, ip="127.0.0.12", ipv6=["fd00::12/64"])
        b.add_pif(self.host2, self.network, ip="127.0.0.13")
        both = [self.host1, self.host2]
        self.shared = b.add_sr("shared", type="nfs", hosts=both)
        self.local = b.add_sr("local", type="ext", hosts=[self.host1])
        self.odd = b.add_sr("odd", type="zfs", hosts=both, granularity=512)
        self.plain = b.add_sr("plain", type="linstor", hosts=both)
        self.tools = b.add_sr("XenServer Tools", type="iso", hosts=both)
        self._add_machines(b)
        self.builder = b
        self.client = Client(self.pool, self.host1).login()

    def _add_machines(self, b: Builder) -> None:
        self.root = b.add_vdi(self.shared, "root", size=64 * MiB, cbt=True)
        self.data = b.add_vdi(self.shared, "data", size=32 * MiB, cbt=True)
        self.iso = b.add_vdi(self.tools, "guest-tools.iso", size=4 * MiB)
        self.web1 = b.add_vm("web1", running_on=self.host1)
        b.add_vbd(self.web1, self.root, userdevice="0", bootable=True)
        b.add_vbd(self.web1, self.data, userdevice="1")
        b.add_vbd(self.web1, self.iso, userdevice="3", type="CD")
        b.start(self.web1)
        self.idle_disk = b.add_vdi(self.shared, "idle", size=16 * MiB, cbt=True)
        self.idle = b.add_vm("idle", running_on=self.host2)
        b.add_vbd(self.idle, self.idle_disk, userdevice="0")

    def disk(self, vdi: str) -> Disk:
        """Return the contents of a VDI."""
        return self.pool.disk(vdi)

    def write(self, vdi: str, *blocks: int) -> None:
        """Write a byte into each of these blocks."""
        for block in blocks:
            self.disk(vdi).write(block * BLOCK + 17, b"!")

    def snapshot(self, vdi: str) -> str:
        """Take a VDI snapshot."""
        return self.client.text("VDI.snapshot", vdi)

    def uuid(self, vdi: str) -> str:
        """Return a VDI's uuid."""
        return self.pool.db.text("VDI", vdi, "uuid")

    def export(self, vdi: str, host: str = "") -> str:
        """Return an export name for the client's session."""
        return f"/{self.uuid(vdi)}?session_id={self.client.session}"
