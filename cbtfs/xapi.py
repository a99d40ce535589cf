"""A session with a pool's xapi: calls, tasks, bulk reads and the metadata handler.

Three wires to the same master, all verified by the same TLS context::

    call        XML-RPC   XenAPI package, worker threads       what changes the pool
    fetch       JSON-RPC  httpx, parsed by msgspec             what reads (an XML-RPC parse of
                                                               10,000 VDIs takes seconds)
    call_async  both      Async.<call>, then the task polled   what may wait for minutes

Rules of this file:

1. One login at a time, and a refused one is never repeated: each costs xapi five seconds and may
   lock an account. From then on every call fails with the same ``AuthenticationFailed``.
2. A call that changes something is sent again only when it cannot have been carried out: the
   session was invalid, the host was not the master, or the connection was refused.
3. A certificate that is refused ends the call; no other host is asked instead.
4. The session reference is a credential: it is never logged. It changes when xapi forgets a
   session, and with it every NBD export name; ``generation`` counts the logins.
"""

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TypeVar

import msgspec
import trio

from . import errors, handlers, tasks, tls, upload, wire
from .handlers import Beginning, Web
from .peers import Peers, Trust
from .tasks import Task
from .upload import Upload
from .wire import NoAnswer

__all__ = ["Credentials", "NoAnswer", "Session", "Trust", "open_session"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

ORIGINATOR = "cbtfs"
"""xapi evicts old sessions per originator; the anonymous share 400 among all."""

CALL_TIMEOUT = 60.0
"""Seconds of silence after which a host does not answer. No call here may take longer: those that
wait for other operations, up to two hours, are asynchronous."""

_KEEP_ALIVE = 900.0  # an idle session lives 24 h, renewed at most every 600 s (xapi_globs.ml)
_LONG = 1 << 20  # bytes of JSON that take milliseconds to parse, and so a thread
_HOPS = 4
_ATTEMPTS = 4
_CLEANUP = 10.0
_UNDO = 60.0
_NOT_READY = {
    "HOST_STILL_BOOTING",
    "HOST_HAS_NO_MANAGEMENT_IP",
    "HOST_ITS_OWN_SLAVE",
    "HOST_UNKNOWN_TO_MASTER",
    "HOST_MASTER_CANNOT_TALK_BACK",
    "HOST_BROKEN",
}


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user of the pool."""

    user: str
    password: str = field(repr=False)


class _Host(msgspec.Struct, frozen=True):
    address: str = ""


@dataclass(slots=True)
class _Sending:
    """What a handler is sent; ``begun`` tells whether one may be at work for its task."""

    wanted: Upload
    begun: bool = False

    def begin(self) -> None:
        self.begun = True


@dataclass(slots=True)
class _Errand:
    """What a handler is asked; ``begun`` tells whether one may be at work for its task."""

    wanted: Beginning
    begun: bool = False

    def begin(self) -> None:
        self.begun = True


class Session:
    """A logged-in session that survives expiry and a change of master.

    ``_ref``, ``_master`` and ``generation`` change together, in ``_login_at``, without a checkpoint
    between; ``_relogin`` is the only caller after the start and holds ``_lock``.
    """

    def __init__(self, peers: Peers, *, credentials: Credentials, timeout: float) -> None:
        self.generation = 0
        self._peers = peers
        self._credentials = credentials
        self._lines = wire.Lines(peers.port, timeout=timeout)
        self._web = Web(peers.port, timeout=timeout)
        self._ref = ""
        self._master = peers.host
        self._refused: errors.AuthenticationFailed | None = None
        self._lock = trio.Lock()

    def __repr__(self) -> str:
        return f"<Session with {self._master}, login {self.generation}>"

    @property
    def ref(self) -> str:
        """The session reference now in use: a credential."""
        return self._ref

    @property
    def master(self) -> str:
        """Address of the host that answers."""
        return self._master

    async def call(self, method: str, *args: object) -> object:
        """Call ``method`` (``VDI.set_name_label``) and return its value; integers come as text.

        Raises:
            XapiFailure: xapi refused.
            AuthenticationFailed: login or certificate refused.
            PoolUnreachable: nobody answers.
        """

        async def send() -> object:
            context = await self._peers.context(self._master)
            return await self._lines.call(self._master, context, method, (self._ref, *args))

        return await self._surviving(send, method)

    async def fetch(
        self,
        method: str,
        *args: object,
        type: type[T],  # noqa: A002 - as msgspec calls it
    ) -> T:
        """Call ``method``, which only reads, and return its value as a ``type``.

        Raises:
            PoolError: the value is of another type; or as ``call``.
        """
        raw = await self._fetch_raw(method, *args)
        try:
            if len(raw) < _LONG:
                return _decoded(raw, type)
            return await trio.to_thread.run_sync(_decoded, raw, type)
        except handlers.NOT_JSON as exc:
            raise errors.PoolError(f"xapi's answer to {method} is not understood: {exc}") from exc

    async def tables(self, classes: Iterable[str]) -> dict[str, bytes]:
        """Return the JSON of ``<class>.get_all_records`` of each class: a map of ref to record."""
        return {name: await self._fetch_raw(f"{name}.get_all_records") for name in classes}

    async def call_async(
        self, method: str, *args: object, undo: Callable[[str], Awaitable[None]] | None = None
    ) -> str:
        """Run ``Async.<method>`` to its end and return its result, a reference or text.

        Its task is destroyed afterwards. If cancelled, the task is cancelled at the pool, as far as
        that is still possible there; if it came to a result all the same, ``undo`` is given it. The
        pool gets ten seconds for this.

        Raises:
            XapiFailure: xapi refused, at once or in the end.
            AuthenticationFailed: login or certificate refused.
            PoolUnreachable: nobody answers.
        """
        task = await tasks.begin(self, f"Async.{method}", *args, what=method)
        try:
            return await task.outcome()
        except trio.Cancelled:
            with trio.move_on_after(tasks.CLEANUP, shield=True):
                await task.cancel()
                if undo is not None:
                    await _undone(task, undo)
            raise
        finally:
            await task.destroy()

    async def export_metadata(self, vm_uuid: str) -> bytes:
        """Return the tar that ``/export_metadata`` makes of a VM, without its snapshots.

        Raises:
            PoolError: xapi refused.
        """
        task = await tasks.create(self, "cbtfs: metadata of a VM", what="export_metadata")
        query = {"uuid": vm_uuid, "export_snapshots": "false", "task_id": task.ref}

        async def get() -> bytes:
            context = await self._peers.context(self._master)
            return await self._web.get(
                self._master, context, "/export_metadata", query=query, session=self._ref
            )

        try:
            return await self._surviving(get, "export_metadata.get_")
        except errors.PoolError:
            if await self.fetch("task.get_status", task.ref, type=str) == "failure":
                await task.outcome()  # says more than HTTP's 500
            raise
        finally:
            await task.destroy()

    async def peek(self, wanted: Beginning, *, label: str) -> None:
        """Ask a handler for the beginning of its answer, and have the pool end there.

        Returns once the pool has undone what the handler did, or after a minute. Whoever sends us
        on to another host is believed, but that host must prove itself as any of the pool.

        Args:
            wanted: what is wanted; a ``task_id`` is added.
            label: what people see in a list of the pool's tasks.

        Raises:
            AuthenticationFailed: login or certificate refused.
            PoolUnreachable: nobody answers.
            PoolError: xapi refused, or ended its answer before there was enough.
        """

        async def attempt() -> None:  # with a task of its own: a bad session fails the task, too
            task = await tasks.create(self, label, what=wanted.path)
            errand = _Errand(replace(wanted, query={**wanted.query, "task_id": task.ref}))
            try:
                await self._run(errand)
            except errors.PoolError as exc:
                if type(exc) is not errors.PoolError:
                    raise
                told = await task.complaint()  # the host ended it, and the task says more than HTTP
                raise errors.PoolError(str(told or exc)) from exc
            else:
                with trio.move_on_after(_UNDO):
                    await task.end()
            finally:
                await (task.abandon() if errand.begun else task.destroy())

        await self._surviving(attempt, wanted.path)

    async def _run(self, errand: _Errand) -> None:
        host = self._master
        for _ in range(_HOPS):
            try:
                context = await self._peers.context(host)
                await self._web.peek(
                    host, context, errand.wanted, session=self._ref, asked=errand.begin
                )
                return
            except handlers.Moved as moved:
                host, errand.begun = moved.host, False
            except (NoAnswer, OSError) as exc:
                if host == self._master:
                    raise
                raise _translated(exc, host) from exc
        raise errors.PoolUnreachable(f"{self._master} sends us from host to host; try again later")

    async def upload(self, wanted: Upload, *, label: str) -> str:
        """Have a handler take a body, and return what came of it: a reference or text.

        If cancelled, the pool has been told to give up.

        Args:
            wanted: what is to be sent; a ``task_id`` is added.
            label: what people see in a list of the pool's tasks.

        Raises:
            XapiFailure: xapi refused, at once or in the end.
            AuthenticationFailed: login or certificate refused.
            PoolUnreachable: nobody answers, or no longer.
            CbtfsError: what the body raises.
        """

        async def attempt() -> str:  # with a task of its own: a bad session fails the task, too
            task = await tasks.create(self, label, what=wanted.path)
            errand = _Sending(replace(wanted, query={**wanted.query, "task_id": task.ref}))
            try:
                return await self._sent(errand, task)
            finally:
                await (task.abandon() if errand.begun else task.destroy())

        return await self._surviving(attempt, wanted.path)

    async def _sent(self, errand: "_Sending", task: Task) -> str:
        address = self._master
        for _ in range(_HOPS):
            try:
                context = await self._peers.context(address)
                host = upload.Host(address, self._peers.port, context, self._ref)
                async with upload.sent(errand.wanted, host, asked=errand.begin):
                    return await task.outcome()
            except handlers.Moved as moved:
                address, errand.begun = moved.host, False
            except (NoAnswer, OSError) as exc:
                if errand.begun and (told := await task.complaint()):
                    raise told from exc  # the host hung up because it failed
                if address == self._master and not errand.begun:
                    raise
                raise _translated(exc, address) from exc
            except errors.PoolError as exc:
                if type(exc) is not errors.PoolError:
                    raise
                told = await task.complaint()  # the host ended it, and the task says more than HTTP
                raise errors.PoolError(str(told or exc)) from exc
        raise errors.PoolUnreachable(f"{self._master} sends us from host to host; try again later")

    # ── surviving expiry, redirects and dead hosts ───────────────────────────────────────────────

    async def _fetch_raw(self, method: str, *args: object) -> bytes:
        async def post() -> bytes:
            context = await self._peers.context(self._master)
            return await self._web.post(self._master, context, method, (self._ref, *args))

        return await self._surviving(post, method)

    async def _surviving(self, send: Callable[[], Awaitable[T]], method: str) -> T:
        """Return what ``send`` does, after another login where that can help."""
        for attempt in range(_ATTEMPTS):
            if self._refused is not None:
                raise errors.AuthenticationFailed(str(self._refused))
            generation = self.generation
            try:
                return await send()
            except (errors.XapiFailure, NoAnswer, OSError) as exc:
                hint = _hint(exc, method)
                if hint is None or attempt == _ATTEMPTS - 1:
                    raise _translated(exc, self._master) from exc
                logger.info("%s is sent again: %s", method, type(exc).__name__)
            await self._relogin(generation, hint=hint)
        raise errors.PoolUnreachable(f"{self._master} sends us from host to host; try again later")

    async def _relogin(self, generation: int, *, hint: str = "") -> None:
        async with self._lock:
            if generation == self.generation:
                await self.login(hint=hint)

    async def login(self, *, hint: str = "") -> None:
        """Log in at ``hint``, the last master or any other known host, or the master they name.

        Raises:
            AuthenticationFailed: login or certificate refused.
            PoolUnreachable: no known host answers.
        """
        queue = [hint] if hint else []
        queue += [self._master, *self._peers.addresses()]
        failures: dict[str, str] = {}
        hops = 0
        while queue:
            host = queue.pop(0)
            if host in failures:
                continue
            try:
                await self._login_at(host)
                return
            except (NoAnswer, OSError) as exc:
                failures[host] = str(_translated(exc, ""))
            except errors.XapiFailure as exc:
                failures[host] = exc.code
                if exc.code == "HOST_IS_SLAVE" and any(exc.params) and hops < _HOPS:
                    hops += 1
                    queue.insert(0, exc.params[0])
                elif exc.code not in {"HOST_IS_SLAVE", *_NOT_READY}:
                    raise
        told = ", ".join(f"{host} ({why})" for host, why in failures.items())
        raise errors.PoolUnreachable(f"no host of the pool answers: {told}; try again later")

    async def _login_at(self, host: str) -> None:
        user = self._credentials
        context = await self._peers.context(host)
        try:
            ref = await self._lines.call(
                host,
                context,
                "session.login_with_password",
                (user.user, user.password, "1.0", ORIGINATOR),
            )
        except errors.XapiFailure as exc:
            if exc.code != "SESSION_AUTHENTICATION_FAILED":
                raise
            self._refused = errors.AuthenticationFailed(
                f"{host} refuses the login of {user.user!r}; check user and password of the pool"
            )
            raise self._refused from exc
        self._ref, self._master = str(ref), host
        self.generation += 1
        logger.info("logged in at %s as %s", host, user.user)

    # ── life ─────────────────────────────────────────────────────────────────────────────────────

    async def learn_hosts(self) -> None:
        """Learn the certificates of the pool's hosts, each told by the host over its master."""
        hosts = await self.fetch("host.get_all_records", type=dict[str, _Host])
        found: dict[str, str] = {}

        async def ask(ref: str, address: str) -> None:
            if not address:
                return
            with suppress(errors.PoolError):  # a host that is down: its old one still counts
                found[address] = await self.fetch("host.get_server_certificate", ref, type=str)

        with trio.move_on_after(_CLEANUP):
            async with trio.open_nursery() as nursery:
                for ref, host in hosts.items():
                    nursery.start_soon(ask, ref, host.address)
        self._peers.learn(found)

    async def keep_alive(self) -> None:
        """Use the session now and then, and follow the hosts' certificates; never returns."""
        while True:
            await trio.sleep(_KEEP_ALIVE)
            try:
                await self.learn_hosts()
            except errors.CbtfsError as exc:
                logger.info("the pool does not answer now: %s", exc)

    async def logout(self) -> None:
        """End the session at the pool as far as it answers, and close every connection."""
        with trio.move_on_after(_CLEANUP, shield=True):
            if self._ref and self._refused is None:
                try:
                    context = await self._peers.context(self._master)
                    await self._lines.call(self._master, context, "session.logout", (self._ref,))
                except (errors.CbtfsError, NoAnswer, OSError) as exc:
                    logger.debug("logout: %s", type(exc).__name__)
            await self._web.close()
        self._lines.close()


@asynccontextmanager
async def open_session(
    url: str,
    *,
    credentials: Credentials,
    trust: Trust,
    state_dir: str | None = None,
    timeout: float = CALL_TIMEOUT,  # noqa: ASYNC109 - of each call's silence, not of this function
) -> AsyncGenerator[Session]:
    """Log in at ``url`` or the master it names, and yield the session; log out on exit.

    Args:
        url: ``https://HOST[:PORT]`` of any host of the pool.
        credentials: who we are there.
        trust: by what its hosts prove who they are.
        state_dir: where the learned certificates of its hosts are kept; None forgets them.
        timeout: seconds of silence after which a host does not answer.

    Raises:
        AuthenticationFailed: login or certificate refused.
        PoolUnreachable: nobody answers.
        ConfigError: ``url`` or ``trust`` cannot be used.
    """
    peers = Peers(url, trust=trust, state_dir=state_dir)
    session = Session(peers, credentials=credentials, timeout=timeout)
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            await session.login()
            await session.learn_hosts()
            nursery.start_soon(session.keep_alive)
            yield session
        except Exception as exc:  # carried out of the nursery, which would wrap it in a group
            failure = exc
        finally:
            await session.logout()
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _undone(task: Task, undo: Callable[[str], Awaitable[None]]) -> None:
    """Give ``undo`` what a cancelled task came to all the same."""
    try:
        await undo(await task.outcome())
    except errors.XapiFailure:
        pass  # no result: the cancel came in time
    except errors.CbtfsError as exc:
        logger.info("cleaning up: %s", exc)


def _hint(exc: errors.XapiFailure | NoAnswer | OSError, method: str) -> str | None:
    """Return where to log in next ("" = anywhere known), or None if that would not help."""
    if isinstance(exc, errors.XapiFailure):
        if exc.code == "HOST_IS_SLAVE":
            return exc.params[0] if exc.params else ""
        return "" if exc.code in {"SESSION_INVALID", *_NOT_READY} else None
    unsent = isinstance(exc, OSError) or not exc.sent
    return "" if unsent or wire.is_repeatable(method) else None


def _translated(exc: errors.XapiFailure | NoAnswer | OSError, host: str) -> Exception:
    if isinstance(exc, errors.XapiFailure):
        return exc
    why = tls.explain(exc) if isinstance(exc, OSError) else str(exc)
    return errors.PoolUnreachable(
        f"{host} does not answer ({why}); try again later" if host else why
    )


def _decoded(raw: bytes, kind: type[T]) -> T:
    return msgspec.json.decode(raw, type=kind)
