"""The hosts of a pool: where they are, and how each proves that it is one.

The user says whom to believe (a ``Trust``). Each host of a pool has a certificate of its own, and a
redirect or a failover leads to a host that the user's setting may not cover. So the certificates of
all hosts are learned through the authenticated session, kept in a file, and count from then on::

    configured:  fingerprints, else ca_file, else the system's CAs
    learned:     address → certificate, valid only beside the configuration it was learned under

Rules of this file:

1. To choose how to verify a host takes handshakes only; nothing is sent to it before.
2. Whoever matches neither what is configured nor what was learned is refused, with the fingerprint
   it showed, so that a person can compare it on the host.
"""

import contextlib
import errno
import hashlib
import logging
import os
import ssl
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import trio

from . import errors, tls

logger = logging.getLogger(__name__)

_PROBE_TIMEOUT = 20.0
"""Seconds that a host gets for a handshake; with several known, a dead one must not cost more."""

_COMPARE = "openssl x509 -in /etc/xensource/xapi-ssl.pem -noout -fingerprint -sha256"


@dataclass(frozen=True, slots=True)
class Trust:
    """Whom to believe: fingerprints if there are any, else a CA file, else the system's CAs."""

    ca_file: str = ""
    fingerprints: tuple[str, ...] = ()


class _State(msgspec.Struct, frozen=True):
    """What is kept between runs: ``trust`` names the configuration under which it was learned."""

    schema: int
    trust: str
    hosts: dict[str, str]


class Peers:
    """The known addresses of one pool, and a verifying TLS context for each.

    Args:
        url: ``https://host[:port]`` of any host of the pool; its port is every host's.
        trust: what the user configured.
        state_dir: directory for what is learned, made if missing; None keeps it in memory.

    Raises:
        ConfigError: ``url`` or ``trust`` cannot be used.
    """

    def __init__(self, url: str, *, trust: Trust, state_dir: str | None = None) -> None:
        self.url = url
        self.host, self.port = _parse(url)
        self._fingerprints = frozenset(tls.parse_fingerprint(text) for text in trust.fingerprints)
        self._ca_file = trust.ca_file
        self._ca = None if self._fingerprints else tls.ca(trust.ca_file)
        self._key = self._trust_key()
        self._file = _state_file(state_dir, url) if state_dir else None
        self._learned = self._load()
        self._contexts: dict[str, ssl.SSLContext] = {}

    def __repr__(self) -> str:
        return f"<Peers of {self.url}, {len(self._learned)} learned>"

    def addresses(self) -> tuple[str, ...]:
        """Return every known address: the configured one first, then the learned ones."""
        return tuple(dict.fromkeys((self.host, *self._learned)))

    async def context(self, host: str) -> ssl.SSLContext:
        """Return the TLS context that verifies ``host``; shakes hands with it the first time.

        Raises:
            AuthenticationFailed: its certificate is neither configured nor learned.
            OSError: it does not answer.
        """
        if host not in self._contexts:
            choose = self._by_fingerprint if self._ca is None else self._by_ca
            with trio.move_on_after(_PROBE_TIMEOUT) as scope:
                self._contexts[host] = await choose(host)
            if scope.cancelled_caught:
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        return self._contexts[host]

    def learn(self, certificates: Mapping[str, str]) -> None:
        """Remember the certificate (PEM) of each address; told by an authenticated session.

        A host with a new one is verified anew. What is no certificate is left out.
        """
        news = {
            host: pem
            for host, pem in certificates.items()
            if self._learned.get(host) != pem and _is_certificate(pem, host)
        }
        if news:
            self._learned = {**self._learned, **news}
            for host in news:
                self._contexts.pop(host, None)
            self._save()

    # ── choosing ─────────────────────────────────────────────────────────────────────────────────

    async def _by_fingerprint(self, host: str) -> ssl.SSLContext:
        shown = await tls.fetch_certificate(host, self.port)
        learned = self._learned.get(host)
        told = tls.fingerprint(shown)
        if told not in self._fingerprints and not (learned and told == tls.fingerprint(learned)):
            raise errors.AuthenticationFailed(
                self._refusal(host, shown, "is not the configured one")
            )
        return tls.pin(shown)

    async def _by_ca(self, host: str) -> ssl.SSLContext:
        context = self._ca or tls.ca(self._ca_file)
        try:
            await tls.probe(host, self.port, context=context)
        except errors.AuthenticationFailed as refused:
            pinned = await self._by_learned(host)
            if pinned is None:
                shown = await tls.fetch_certificate(host, self.port)
                why = str(getattr(refused.__cause__, "verify_message", ""))
                by = self._ca_file or "a CA of this system"
                text = self._refusal(host, shown, f"is not vouched for by {by}: {why}")
                raise errors.AuthenticationFailed(text) from refused
            return pinned
        return context

    async def _by_learned(self, host: str) -> ssl.SSLContext | None:
        if host not in self._learned:
            return None
        context = tls.pin(self._learned[host])
        try:
            await tls.probe(host, self.port, context=context)
        except errors.AuthenticationFailed:
            return None
        return context

    def _refusal(self, host: str, shown: str, why: str) -> str:
        told = tls.fingerprint(shown)
        where = f"{host}:{self.port}"
        if host != self.host:
            where += f" (a host of the pool of {self.host}, not known from an earlier session)"
        return (
            f"{where} shows the certificate {told}, which {why.strip(' :')}; if `{_COMPARE}` on "
            "that host prints the same, add it to the pool's fingerprint setting"
        )

    # ── memory ───────────────────────────────────────────────────────────────────────────────────

    def _trust_key(self) -> str:
        """Return a digest of everything that decides whom to believe."""
        digest = hashlib.sha256(f"{self.host}:{self.port}".encode())
        for fingerprint in sorted(self._fingerprints):
            digest.update(fingerprint.encode())
        if self._ca is not None and self._ca_file:
            digest.update(Path(self._ca_file).read_bytes())
        return digest.hexdigest()

    def _load(self) -> dict[str, str]:
        if self._file is None:
            return {}
        try:
            state = msgspec.json.decode(_own_bytes(self._file), type=_State)
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.MsgspecError) as exc:
            logger.info("%s cannot be used, and is learned anew: %s", self._file, exc)
            return {}
        return state.hosts if (state.schema, state.trust) == (1, self._key) else {}

    def _save(self) -> None:
        """Write the file by rename; what cannot be kept is only learned again next time."""
        if self._file is None:
            return
        data = msgspec.json.encode(_State(schema=1, trust=self._key, hosts=self._learned))
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._file.parent)
            try:
                with os.fdopen(handle, "wb") as stream:
                    stream.write(data)
                Path(name).replace(self._file)
            except OSError:
                with contextlib.suppress(OSError):
                    Path(name).unlink()
                raise
        except OSError as exc:
            logger.info("cannot keep the certificates of %s: %s", self.url, exc)


def _is_certificate(pem: str, host: str) -> bool:
    try:
        tls.pin(pem)
    except errors.PoolError as exc:
        logger.info("%s: %s", host, exc)
        return False
    return True


def _own_bytes(path: Path) -> bytes:
    """Return what is in a file that nobody else can have written: it says whom to believe.

    Raises:
        OSError: it cannot be read, or others may write to it.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if status.st_uid not in {0, os.geteuid()} or status.st_mode & 0o022:
            raise PermissionError(errno.EPERM, "others may write to it", str(path))
        return file.read()


def netloc(host: str, port: int) -> str:
    """Return ``host:port`` as a URL wants it, IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


_WANTED = "url of the pool must be https://HOST[:PORT] of any of its hosts, without a login"


def _parse(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 443
    except ValueError:  # its text may hold a part of a password
        raise errors.ConfigError(_WANTED) from None
    if parts.scheme != "https" or not host or parts.username is not None:
        raise errors.ConfigError(_WANTED)
    return host, port


def _state_file(state_dir: str, url: str) -> Path:
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    return Path(state_dir) / f"hosts-{name}.json"
