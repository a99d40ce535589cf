"""A simulated pool that runs for a test, and third parties' ways into it.

with running_pool(tmp_path) as pool:
    api = Api(pool).login()
    pool.set("nbd.delay", "2ms")
    subprocess.run(["nbdcopy", "image.raw", pool.guest("web1", "xvda")])
"""

import contextlib
import ssl
import xmlrpc.client
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import nbd

from cbtfs import simulator


class GuestDisk(Protocol):
    """What a test does with a guest's disk: some of libnbd's methods."""

    def connect_unix(self, path: str) -> None: ...
    def pread(self, length: int, offset: int) -> bytearray: ...
    def pwrite(self, data: bytes | bytearray, offset: int) -> None: ...
    def trim(self, length: int, offset: int) -> None: ...
    def zero(self, length: int, offset: int) -> None: ...
    def set_strict_mode(self, flags: int) -> None: ...
    def shutdown(self) -> None: ...


@dataclass(frozen=True)
class RunningPool:
    """A pool that runs in ``directory``."""

    directory: Path
    url: str
    https_port: int
    nbd_port: int

    @property
    def config(self) -> Path:
        """The configuration for cbtfs that the pool wrote."""
        return self.directory / "cbtfs.toml"

    @property
    def ca_file(self) -> Path:
        """All hosts' certificates."""
        return self.directory / "ca.pem"

    def set(self, key: str, value: str) -> None:
        """Set a fault; an empty value sets it back."""
        simulator.set_values(self.directory, {key: value})

    def control(self, command: str, *arguments: str) -> object:
        """Carry out a command of the simulator."""
        return simulator.control(self.directory, command, *arguments)

    def faults(self) -> list[str]:
        """Return the keys of the faults that are set."""
        current = simulator.status(self.directory)["faults"]
        return list(current) if isinstance(current, dict) else []

    def stolen(self) -> list[str]:
        """Return what impostors and attackers received from clients since the last call."""
        found = self.control("stolen")
        return [str(item) for item in found] if isinstance(found, list) else []

    def host_url(self, number: int) -> str:
        """Return the URL of the first (0) or second (1) host."""
        return f"https://127.0.0.{2 + number}:{self.https_port}"

    def certificate(self, host: str = "xcp1") -> Path:
        """Return the file of a host's certificate."""
        return self.directory / "hosts" / f"{host}.pem"

    def guest_socket(self, vm: str, device: str) -> Path:
        """Return the socket of a running VM's disk, there once this returns."""
        self.control("sockets")
        return self.directory / "guest" / vm / f"{device}.sock"

    def guest(self, vm: str, device: str) -> str:
        """Return the NBD URI of a running VM's disk."""
        return f"nbd+unix:///?socket={self.guest_socket(vm, device)}"

    def open_guest(self, vm: str, device: str) -> GuestDisk:
        """Return a libnbd handle of a running VM's disk; the caller shuts it down."""
        handle = cast(GuestDisk, nbd.NBD())
        handle.connect_unix(str(self.guest_socket(vm, device)))
        return handle

    def proxy(self, number: int = 0) -> xmlrpc.client.ServerProxy:
        """Return a plain XML-RPC client for a host, which trusts the pool's certificates."""
        context = ssl.create_default_context(cafile=str(self.ca_file))
        return xmlrpc.client.ServerProxy(self.host_url(number), context=context)

    def tls_directory(self, host: str = "xcp1") -> Path:
        """Return a folder for ``tls-certificates`` of an NBD URI that trusts one host."""
        folder = self.directory / f"pki-{host}"
        folder.mkdir(exist_ok=True)
        (folder / "ca-cert.pem").write_bytes(self.certificate(host).read_bytes())
        return folder


class Api:
    """XML-RPC as any third party would speak it: results as they come, failures as `Failure`."""

    def __init__(self, pool: RunningPool, *, host: int = 0, session: str = "") -> None:
        self._pool = pool
        self._host = host
        self.session = session

    def login(self, user: str = "root", password: str = "simulated") -> "Api":
        """Log in; calls carry the session from now on."""
        self.session = str(self.raw("session.login_with_password", user, password, "1.0", "test"))
        return self

    def raw(self, method: str, *params: object) -> object:
        """Call without a session; raise `Failure` if the pool says so."""
        with self._pool.proxy(self._host) as proxy:  # a connection per call: nothing to close
            answer = getattr(proxy, method)(*params)
        assert isinstance(answer, dict)
        if answer["Status"] != "Success":
            raise Failure([str(part) for part in answer["ErrorDescription"]])
        value: object = answer["Value"]
        return value

    def call(self, method: str, *params: object) -> object:
        """Call with the session."""
        return self.raw(method, self.session, *params)

    def text(self, method: str, *params: object) -> str:
        """Call for a string or a reference."""
        value = self.call(method, *params)
        assert isinstance(value, str)
        return value

    def records(self, kind: str) -> dict[str, dict[str, object]]:
        """Return all records of a class."""
        value = self.call(f"{kind}.get_all_records")
        assert isinstance(value, dict)
        return value

    def named(self, kind: str, name: str) -> str:
        """Return the only object of a class with that name."""
        found = self.call(f"{kind}.get_by_name_label", name)
        assert isinstance(found, list)
        assert len(found) == 1, (kind, name, found)
        return str(found[0])


class Failure(Exception):
    """xapi's failure: code and parameters."""

    def __init__(self, details: Sequence[str]) -> None:
        self.code = details[0]
        self.params = list(details[1:])
        super().__init__(" ".join(details))


@contextlib.contextmanager
def running_pool(directory: Path, scenario: str = "default") -> Iterator[RunningPool]:
    """Run a pool in ``directory`` and end it, whatever happens; start it again to go on."""
    status = simulator.start(directory, scenario=scenario)
    try:
        yield RunningPool(
            directory=directory,
            url=str(status["url"]),
            https_port=int(str(status["https_port"])),
            nbd_port=int(str(status["nbd_port"])),
        )
    finally:
        simulator.stop(directory)
