"""Simulator: a pool with all its wires, from the ports to the guests' sockets.

One process, a thread per connection. What a directory holds while it runs::

    cbtfs.toml  ca.pem  password      what a client needs
    control.sock  pid  lock  log      what `life` needs
    hosts/  disks/  state.json        certificates, contents, records
    guest/<vm>/<device>.sock          the guests' disks
"""

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from cbtfs import errors

from . import certificates, controlsocket, listener, memory, scenarios
from .certificates import Subject
from .faults import Faults
from .guest import GuestSockets
from .handlers import Handlers
from .listener import Listener
from .memory import Memory, Ports
from .pool import HostAddress, SimulatedPool
from .xapinbd import Identity, NbdCounters, XapiNbd
from .xapiserver import XapiServer

log = logging.getLogger(__name__)

USER = "root"
PASSWORD = "simulated"
DOMAIN = "sim"

_TICK = 0.02
_AUTOSAVE = 5.0
_WATCH = 1.0
_PATIENCE = 0.5
"""How long a dead host waits for its threads in seconds; one may be in a delay that was ordered."""
_NBD_BACKLOG = 5


class _HostServers:
    """The listeners of one host."""

    def __init__(self, host: HostAddress, xapi: XapiServer, nbd: XapiNbd) -> None:
        self.host = host
        self.identity = nbd.identity
        self._xapi = xapi
        self._nbd = nbd
        self._https_listener: Listener | None = None
        self._nbd_listeners: list[Listener] = []

    def up(self, ports: Ports, sockets: Sequence[socket.socket] = ()) -> None:
        """Listen, on sockets reserved before or on new ones."""
        if self._https_listener is not None:
            return
        https, *nbd = sockets or _reserve(self.host, ports)
        name = self.host.name
        self._https_listener = Listener(https, self._xapi.serve, name=f"https {name}")
        self._nbd_listeners = [Listener(one, self._nbd.serve, name=f"nbd {name}") for one in nbd]

    def down(self) -> None:
        """Stop listening and cut everything, as when the host dies."""
        listeners = [*self._nbd_listeners, *filter(None, [self._https_listener])]
        self._https_listener, self._nbd_listeners = None, []
        for one in listeners:
            one.stop(patience=_PATIENCE)

    def drop_nbd(self) -> int:
        """Cut the NBD connections; return how many."""
        return sum(one.drop_connections() for one in self._nbd_listeners)

    def drop_https(self) -> int:
        """Cut the HTTPS connections; return how many."""
        return self._https_listener.drop_connections() if self._https_listener else 0


class Simulator:
    """A running pool; made by `open_simulator`, ended by `close`.

    Args:
        pool: loaded or freshly built.
        scenario: its name, for the status.
        ports: where every host listens; sockets are reserved in the constructor.
    """

    def __init__(self, pool: SimulatedPool, *, scenario: str, ports: Ports) -> None:
        self.stopping = threading.Event()
        self._pool = pool
        self._directory = pool.directory
        self._scenario = scenario
        self._counters = NbdCounters()
        self._hosts: dict[str, _HostServers] = {}
        self._closing = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            hosts = pool.hosts()
            identities = _identities(self._directory, pool, hosts)
            self.ports, reserved = _reserve_all(hosts, ports)
            pool.https_port, pool.nbd_port = self.ports.https, self.ports.nbd
            for host in hosts:
                servers = self._servers(host, identities[host.ref])
                servers.up(self.ports, reserved[host.ref])
                stack.callback(servers.down)
                self._hosts[host.name] = servers
            self._guests = GuestSockets(self._directory / "guest")
            stack.callback(self._guests.stop)
            self._refreshing = threading.Lock()
            self._refresh()
            self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)
            self._keeper.start()
            stack.callback(self._keeper.join, 10)
            stack.callback(self.stopping.set)
            _write_client_files(self._directory, hosts, self.ports)
            stack.callback(controlsocket.serve(self._directory, self.execute).stop)
            self._closing = stack.pop_all()

    def close(self) -> None:
        """Cut everything, save the state; safe to call twice."""
        self.stopping.set()
        self._pool.closing.set()  # calls that wait give up, so that their threads can end
        with self._pool.lock:
            self._pool.db.changed.notify_all()
        self._closing.close()
        self._pool.close()

    def execute(self, command: str, arguments: list[str]) -> object:
        """Carry out a command of the control socket."""
        own = self._commands().get(command)
        if own is not None:
            return own(arguments)
        answer = self._pool.control(command, *arguments)
        if command in {"failover", "restart-xapi"}:
            for servers in self._hosts.values():
                servers.drop_https()
        return answer

    def status(self) -> dict[str, object]:
        """Return what runs here, as JSON can carry it."""
        return {
            "scenario": self._scenario,
            "url": _url(self._pool.hosts(), self.ports),
            "https_port": self.ports.https,
            "nbd_port": self.ports.nbd,
            "hosts": {
                host.name: {"address": host.address, "nbd": list(host.nbd_addresses)}
                for host in self._pool.hosts()
            },
            "faults": dict(self._pool.faults.current()),
        }

    def _commands(self) -> dict[str, Callable[[list[str]], object]]:
        return {
            "stop": lambda _: self.stopping.set(),
            "set": self._set,
            "status": lambda _: self.status(),
            "sockets": lambda _: self._refresh(),
            "counters": lambda _: self._counts(),
            "reset-counters": lambda _: self._reset_counts(),
            "stolen": lambda _: self._counters.take_stolen(),
            "drop-nbd": lambda names: sum(s.drop_nbd() for s in self._chosen(names)),
            "kill-host": self._kill,
            "revive-host": self._revive,
            "renew-certificate": self._renew,
        }

    def _set(self, pairs: list[str]) -> None:
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals:
                raise errors.UsageError(f"write KEY=VALUE, not {pair!r}")
            self._pool.faults.set(key, value)

    def _kill(self, names: list[str]) -> None:
        for servers in self._chosen(names):
            servers.down()

    def _revive(self, names: list[str]) -> None:
        for servers in self._chosen(names):
            servers.up(self.ports)

    def _renew(self, names: list[str]) -> None:
        for servers in self._chosen(names):
            folder, context = self._directory / "hosts", servers.identity.context
            pem = certificates.renew(folder, servers.host.name, context)
            self._pool.set_certificate(servers.host.ref, pem, subject=servers.host.hostname)
            servers.drop_https()  # stunnel is restarted

    def _counts(self) -> object:
        counts = msgspec.convert(self._pool.control("counters"), dict[str, object])
        return {**counts, "nbd": self._counters.report()}

    def _reset_counts(self) -> object:
        self._counters.reset()
        return self._pool.control("reset-counters")

    def _chosen(self, names: list[str]) -> list[_HostServers]:
        unknown = set(names) - set(self._hosts)
        if unknown:
            raise errors.UsageError(
                f"no host {unknown.pop()!r}; there are {', '.join(self._hosts)}"
            )
        return [servers for name, servers in self._hosts.items() if name in names or not names]

    def _servers(self, host: HostAddress, identity: Identity) -> _HostServers:
        xapi = XapiServer(
            self._pool, host, identity=identity, stopping=self.stopping, counters=self._counters,
            handlers=Handlers(self._pool, host).table(),
        )  # fmt: skip
        nbd = XapiNbd(
            self._pool, host.ref, identity=identity, stopping=self.stopping,
            counters=self._counters,
        )  # fmt: skip
        return _HostServers(host, xapi, nbd)

    def _refresh(self) -> list[str]:
        """Bring the guests' sockets up to date; return their paths."""
        with self._refreshing:
            self._guests.refresh(self._pool.live_disks())
            return sorted(str(path) for path in (self._directory / "guest").glob("*/*.sock"))

    def _keep(self) -> None:
        """Follow the pool's changes: guests' sockets at once, the state file soon."""
        chores = (
            _Chore(self._refresh, pause=_TICK),
            _Chore(self._pool.save, pause=_AUTOSAVE),
        )
        watched = 0.0
        seen = False
        while not self.stopping.wait(_TICK):
            now = time.monotonic()
            for chore in chores:
                chore.run(now, self._pool.generation())
            if now - watched > _WATCH:
                watched = now
                there = (self._directory / controlsocket.NAME).exists()
                seen = seen or there  # on a slow machine it is made only after the first look
                if not there and (seen or not self._directory.exists()):
                    log.warning("the directory is gone: ending")
                    self.stopping.set()


class _Chore:
    """Something to do after changes, with pauses between; a long one pauses longer.

    Args:
        work: called without arguments.
        pause: the shortest pause in seconds; also at least ten times what ``work`` took.
    """

    def __init__(self, work: Callable[[], object], *, pause: float) -> None:
        self._work = work
        self._pause = pause
        self._due = 0.0
        self._seen = -1

    def run(self, now: float, generation: int) -> None:
        """Do it if there is a new ``generation`` and the pause is over."""
        if generation == self._seen or now < self._due:
            return
        self._seen = generation
        try:
            self._work()
        except Exception:  # a full or a vanished directory must not end the keeper
            log.exception("a chore failed; it is tried again after the next change")
        took = time.monotonic() - now
        self._due = now + took + max(self._pause, 10 * took)


def open_simulator(
    directory: Path, *, scenario: str = "default", ports: Ports | None = None,
    address: str = memory.FIRST_ADDRESS,
) -> Simulator:  # fmt: skip
    """Build or load the pool of ``directory`` and open all its servers.

    Args:
        directory: an empty or absent one is filled by ``scenario``; else its state goes on.
        scenario: a name of `scenarios.SCENARIOS`.
        ports: those of the last time or free ones if not given.
        address: of the first host, in 127.0.0.0/8.

    Raises:
        CbtfsError: a tool is missing, a port is taken, the state is damaged.
    """
    memory.check_scenario(directory, scenario)
    (directory / "hosts").mkdir(parents=True, exist_ok=True)
    known = memory.recall(directory)
    pool = SimulatedPool(directory, faults=Faults())
    pool.users = {USER: PASSWORD}
    if pool.load():
        scenario = known.scenario or scenario
    else:
        scenarios.build(pool, scenario, address=address)
        pool.save()
    last = Ports(known.https_port, known.nbd_port)
    simulator = Simulator(pool, scenario=scenario, ports=ports or last)
    memory.keep(directory, Memory(scenario, simulator.ports.https, simulator.ports.nbd))
    return simulator


def _identities(
    directory: Path, pool: SimulatedPool, hosts: Sequence[HostAddress]
) -> dict[str, Identity]:
    folder = directory / "hosts"
    subjects = [
        Subject(host.name, (f"{host.hostname}.{DOMAIN}",), (host.address,)) for host in hosts
    ]
    everybody = Subject(
        "impostor",
        tuple(name for subject in subjects for name in subject.hostnames),
        tuple(address for host in hosts for address in (host.address, *host.nbd_addresses)),
    )
    certificates.ensure(folder, [*subjects, everybody])
    impostor = certificates.server_context(folder, everybody.file)
    identities: dict[str, Identity] = {}
    for host in hosts:
        pem = certificates.certificate_path(folder, host.name).read_text(encoding="ascii")
        # xapi answers the smallest of the certificate's names: the short one
        pool.set_certificate(host.ref, pem, subject=host.hostname)
        identities[host.ref] = Identity(
            names=(host.name, host.hostname, host.uuid, host.address, *host.nbd_addresses),
            context=certificates.server_context(folder, host.name),
            impostor=impostor,
        )
    return identities


def _reserve(host: HostAddress, ports: Ports) -> list[socket.socket]:
    """Return listening sockets: HTTPS, then NBD on every address of the host."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(listener.listen_tcp(host.address, ports.https))]
        for address in dict.fromkeys((host.address, *host.nbd_addresses)):
            one = listener.listen_tcp(address, ports.nbd, backlog=_NBD_BACKLOG)
            sockets.append(stack.enter_context(one))
        stack.pop_all()
        return sockets


def _reserve_all(
    hosts: Sequence[HostAddress], wanted: Ports
) -> tuple[Ports, dict[str, list[socket.socket]]]:
    """Reserve the same two ports on all hosts, other ones where the wanted are taken."""
    for attempt in range(20):
        ports = wanted if attempt == 0 and wanted.https else _free_ports(hosts[0].address)
        try:
            return ports, _reserve_pool(hosts, ports)
        except OSError as exc:
            log.info("ports %s: %s", ports, exc)
    raise errors.CbtfsError(
        f"no two ports are free on all of {', '.join(host.address for host in hosts)}; "
        "choose another first address"
    )


def _reserve_pool(hosts: Sequence[HostAddress], ports: Ports) -> dict[str, list[socket.socket]]:
    reserved: dict[str, list[socket.socket]] = {}
    with contextlib.ExitStack() as stack:
        for host in hosts:
            reserved[host.ref] = _reserve(host, ports)
            for one in reserved[host.ref]:
                stack.callback(one.close)
        stack.pop_all()
    return reserved


def _free_ports(address: str) -> Ports:
    with listener.listen_tcp(address, 0) as one, listener.listen_tcp(address, 0) as other:
        return Ports(one.getsockname()[1], other.getsockname()[1])


def _url(hosts: Sequence[HostAddress], ports: Ports) -> str:
    return f"https://{hosts[0].address}:{ports.https}"


def _write_client_files(directory: Path, hosts: Sequence[HostAddress], ports: Ports) -> None:
    folder = directory / "hosts"
    pems = [certificates.certificate_path(folder, host.name).read_bytes() for host in hosts]
    (directory / "ca.pem").write_bytes(b"".join(pems))
    password = directory / "password"
    password.touch(mode=0o600)
    password.write_text(PASSWORD + "\n", encoding="ascii")
    toml = (
        "# written at each start of the simulated pool\n"
        f"[pool.sim]\nurl = {_quoted(_url(hosts, ports))}\nuser = {_quoted(USER)}\n"
        f"password_file = {_quoted(password)}\nca_file = {_quoted(directory / 'ca.pem')}\n\n"
        f"[store.main]\npath = {_quoted(directory / 'store')}\n"
    )
    (directory / "cbtfs.toml").write_text(toml, encoding="utf-8")


def _quoted(value: object) -> str:
    # a JSON string is a TOML basic string as long as DEL is not in it
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
