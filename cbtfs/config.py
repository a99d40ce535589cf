"""Configuration: a TOML file and the environment become what the lower nouns take as options.

::

    option > environment > file > default

The file's tables, with their keys, units and defaults, are in ``tables``. Rules:

1. Strict: whatever cannot be carried out as written is an error that names the file and the key.
2. A pool described by ``CBTFS_URL`` is a pool of its own: nothing of the file is mixed in, so a
   password of one pool never goes to another. ``--pool`` chooses from the file instead, and then
   the environment's pool is not read at all.
3. Secrets come from a file, a command, or systemd's ``$CREDENTIALS_DIRECTORY``, are read only when
   a pool is opened, and are never shown.
"""

import difflib
import hashlib
import os
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec
import platformdirs

from . import errors, password, tables, tls, units
from .pool import PoolOptions
from .sample import Sample
from .tables import JobTable, PoolTable, StoreTable

SYSTEM_FILE = Path("/etc/cbtfs/cbtfs.toml")
ENVIRONMENT_POOL = "env"
"""Name of the pool that ``CBTFS_URL`` describes."""

NOT_YET = ("hooks",)
"""Keys of a job that are checked but have no effect in this version; using one is a warning."""

_T = TypeVar("_T", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class Config:
    """A configuration file that has been read and found right; ``path`` is None without a file."""

    path: Path | None = None
    pools: Mapping[str, PoolTable] = field(default_factory=dict[str, PoolTable])
    stores: Mapping[str, StoreTable] = field(default_factory=dict[str, StoreTable])
    jobs: Mapping[str, JobTable] = field(default_factory=dict[str, JobTable])

    @property
    def where(self) -> str:
        """The file, for messages."""
        return str(self.path) if self.path else "no configuration file"


# ── The file ─────────────────────────────────────────────────────────────────────────────────


def user_file() -> Path:
    """Return where a user's own configuration is looked for."""
    return platformdirs.user_config_path("cbtfs") / "cbtfs.toml"


def find(option: str | None, environ: Mapping[str, str]) -> Path | None:
    """Return the configuration file to use, or None if there is none.

    Raises:
        ConfigError: ``option`` or ``CBTFS_CONFIG`` names a file that is not there.
    """
    for given, source in ((option, "--config"), (environ.get("CBTFS_CONFIG"), "CBTFS_CONFIG")):
        if given:
            if not Path(given).is_file():
                raise errors.ConfigError(f"{given}: no such file ({source})")
            return Path(given)
    return next((path for path in (SYSTEM_FILE, user_file()) if path.is_file()), None)


def load(path: Path | None) -> Config:
    """Return what ``path`` says; without a file, an empty configuration.

    Raises:
        ConfigError: it cannot be read, is not TOML, or has an unknown key or a wrong value.
    """
    if path is None:
        return Config()
    try:
        text = path.read_text(encoding="utf-8")
        data: dict[str, object] = tomllib.loads(text)
    except OSError as exc:
        raise errors.ConfigError(f"{path}: cannot be read: {exc.strerror}") from None
    except ValueError as exc:  # not UTF-8, or tomllib's error, which names the line
        raise errors.ConfigError(f"{path}: not TOML: {exc}") from None
    tables.check_keys(data, ("pool", "store", "job"), where=f"{path}", prefix="")
    found = Config(
        path,
        _tables(data, PoolTable, kind="pool", path=path),
        _tables(data, StoreTable, kind="store", path=path),
        _tables(data, JobTable, kind="job", path=path),
    )
    _check_meaning(found)
    return found


def _tables(data: Mapping[str, object], table: type[_T], *, kind: str, path: Path) -> dict[str, _T]:
    named = data.get(kind, {})
    if not isinstance(named, dict):
        raise errors.ConfigError(f"{path}: {kind}: write [{kind}.NAME], with a name of your choice")
    found: dict[str, _T] = {}
    for name, values in msgspec.convert(named, dict[str, object]).items():
        if not isinstance(values, dict):
            raise errors.ConfigError(f"{path}: {kind}.{name}: write it below [{kind}.NAME]")
        found[name] = tables.decode(
            msgspec.convert(values, dict[str, object]),
            table,
            where=str(path),
            prefix=f"{kind}.{name}.",
        )
    return found


def _check_meaning(config: Config) -> None:
    """Check what a type cannot: urls, sizes, and names that refer to other tables."""
    for name, pool in config.pools.items():
        _check_pool(pool, where=f"{config.path}: pool.{name}")
    for name, job in config.jobs.items():
        where = f"{config.path}: job.{name}"
        _check_reference(job.pool, config.pools, where=f"{where}.pool")
        _check_reference(job.store, config.stores, where=f"{where}.store")
        if job.limit_rate:
            tables.checked(units.parse_rate, job.limit_rate, where=f"{where}.limit_rate")
        if job.verify_sample:
            tables.checked(tables.parse_share, job.verify_sample, where=f"{where}.verify_sample")
        if job.keep is not None and not job.keep.rules():
            raise errors.ConfigError(
                f"{where}.keep: it keeps nothing; write for example keep = {{ last = 3, daily = 7 }}"
            )


def _check_pool(pool: PoolTable, *, where: str) -> None:
    tables.checked(tables.check_url, pool.url, where=f"{where}.url")
    if pool.password_file and pool.password_command:
        raise errors.ConfigError(f"{where}: give password_file or password_command, not both")
    _words(pool.password_command, where=f"{where}.password_command")
    for fingerprint in _words(pool.fingerprint, where=f"{where}.fingerprint"):
        tables.checked(tls.parse_fingerprint, fingerprint, where=f"{where}.fingerprint")


def _check_reference(name: str, known: Mapping[str, object], *, where: str) -> None:
    if name and name not in known:
        near = difflib.get_close_matches(name, tuple(known), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known) or 'none'}"
        raise errors.ConfigError(f"{where}: no such table {name!r}, {hint}")


def warnings(config: Config) -> list[str]:
    """Return a sentence for everything in the file that will not do what it seems to."""
    found: list[str] = []
    for name, job in config.jobs.items():
        idle = [key for key in NOT_YET if getattr(job, key)]
        if idle:
            found.append(
                f"{config.path}: job.{name}: {', '.join(idle)} have no effect in this version"
                " of cbtfs"
            )
    for name, pool in config.pools.items():
        for key in ("password_file", "ca_file"):
            value: str = getattr(pool, key)
            if value and not _resolve(value, config).is_file():
                found.append(f"{config.path}: pool.{name}.{key}: there is no file {value}")
    return found


def _resolve(value: str, config: Config) -> Path:
    """Return a path of the file: ``~`` expanded, a relative one beside the file."""
    path = _expanded(value)
    return path if config.path is None else config.path.parent / path


def _expanded(value: str) -> Path:
    """Return ``value`` with ``~`` and ``~user`` replaced.

    Raises:
        ConfigError: there is no such user.
    """
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise errors.ConfigError(f"{value}: there is no such user; write the whole path") from None


# ── Choosing a pool and a store ──────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class ChosenPool:
    """The pool that options, environment and file select; no secret has been read yet."""

    name: str
    table: PoolTable


def choose_pool(config: Config, name: str | None, *, environ: Mapping[str, str]) -> ChosenPool:
    """Return the pool to use.

    Args:
        config: the file.
        name: ``--pool``, or None.
        environ: the environment.

    Raises:
        NotFound: the file has no pool of this name.
        UsageError: none is described anywhere, or several are and none is chosen.
    """
    if name is None and environ.get("CBTFS_URL"):
        return ChosenPool(ENVIRONMENT_POOL, _pool_of_environment(environ))
    name = name or _only(config.pools, kind="pool", where=config.where)
    if name not in config.pools:
        raise errors.NotFound(_unknown(name, config.pools, kind="pool", where=config.where))
    table = _with_paths(config.pools[name], config)
    if not environ.get("CBTFS_URL"):
        table = _overridden(table, environ)
    return ChosenPool(name, table)


def _pool_of_environment(environ: Mapping[str, str]) -> PoolTable:
    table = _overridden(PoolTable(url=environ["CBTFS_URL"]), environ)
    tables.checked(tables.check_url, table.url, where="CBTFS_URL")
    return table


def _overridden(table: PoolTable, environ: Mapping[str, str]) -> PoolTable:
    """Return ``table`` with what the environment says instead of the file."""
    user = environ.get("CBTFS_USER") or table.user
    table = msgspec.structs.replace(table, user=user)
    if password_file := environ.get("CBTFS_PASSWORD_FILE"):
        table = msgspec.structs.replace(table, password_file=password_file, password_command=())
    # whom to trust is one decision: a CA from here replaces a fingerprint from there
    if environ.get("CBTFS_CA") or environ.get("CBTFS_FINGERPRINT"):
        table = msgspec.structs.replace(
            table,
            ca_file=environ.get("CBTFS_CA", ""),
            fingerprint=tuple(environ.get("CBTFS_FINGERPRINT", "").split()),
        )
    return table


def _with_paths(table: PoolTable, config: Config) -> PoolTable:
    return msgspec.structs.replace(
        table,
        password_file=str(_resolve(table.password_file, config)) if table.password_file else "",
        ca_file=str(_resolve(table.ca_file, config)) if table.ca_file else "",
    )


def choose_store(config: Config, name: str | None, *, environ: Mapping[str, str]) -> Path | None:
    """Return the directory of the store to use, or None if none is named and the file has none.

    Args:
        config: the file.
        name: ``--store``: a store's name, or a directory (anything with a slash, or that exists).
        environ: the environment.

    Raises:
        NotFound: ``name`` is neither.
        UsageError: the file has several and none is chosen.
    """
    name = name or environ.get("CBTFS_STORE") or None
    if name is None and not config.stores:
        return None
    name = name or _only(config.stores, kind="store", where=config.where)
    if name in config.stores:
        return _resolve(config.stores[name].path, config).absolute()
    if "/" in name or name in (".", "..") or Path(name).is_dir():
        return _expanded(name).absolute()
    raise errors.NotFound(
        _unknown(name, config.stores, kind="store", where=config.where)
        + "; a directory is written with a slash"
    )


def choose_job(config: Config, name: str) -> JobTable:
    """Return the job called ``name``.

    Raises:
        UsageError: the file has none of this name.
    """
    if name not in config.jobs:
        raise errors.UsageError(_unknown(name, config.jobs, kind="job", where=config.where))
    return config.jobs[name]


def rate_of(job: JobTable) -> int:
    """Return the bytes per second that a job may read from its pool; 0 for no limit."""
    return units.parse_rate(job.limit_rate) if job.limit_rate else 0


def sample_of(job: JobTable) -> Sample:
    """Return how many unchanged blocks a job reads and compares.

    A share that was written down counts without an upper limit; only the default has one.
    """
    if not job.verify_sample:
        return Sample()
    return Sample(share=tables.parse_share(job.verify_sample), at_most=None)


def _only(known: Mapping[str, object], *, kind: str, where: str) -> str:
    if len(known) == 1:
        return next(iter(known))
    if known:
        raise errors.UsageError(
            f"{where} describes {len(known)} {kind}s; choose with --{kind}: {', '.join(known)}"
        )
    variable = {"pool": "CBTFS_URL", "store": "CBTFS_STORE"}[kind]
    raise errors.UsageError(
        f"no {kind} is configured; set {variable} or describe one in {SYSTEM_FILE}"
    )


def _unknown(name: str, known: Mapping[str, object], *, kind: str, where: str) -> str:
    near = difflib.get_close_matches(name, tuple(known), n=1, cutoff=0.4)
    there = f"it has: {', '.join(known)}" if known else f"it has no {kind} at all"
    return f"{where}: no {kind} {name!r}, " + (f"did you mean {near[0]!r}?" if near else there)


# ── What a pool is opened with ─────────────────────────────────────────────────────────────────


def pool_options(
    chosen: ChosenPool, *, environ: Mapping[str, str], warn: password.Warn
) -> PoolOptions:
    """Return the options to open a pool with, its password read now.

    Raises:
        ConfigError: the password cannot be had.
    """
    table = chosen.table
    return PoolOptions(
        name=chosen.name,
        url=table.url,
        user=table.user,
        password=password.read(_password_source(chosen, environ), warn=warn),
        ca_file=table.ca_file,
        fingerprints=_words(table.fingerprint, where=f"pool {chosen.name}: fingerprint"),
        connections_per_host=table.connections_per_host,
        state_dir=str(state_dir(chosen, environ=environ)),
    )


def _password_source(chosen: ChosenPool, environ: Mapping[str, str]) -> password.Source:
    table = chosen.table
    return password.Source(
        chosen.name,
        file=table.password_file,
        command=_words(table.password_command, where=f"pool {chosen.name}: password_command"),
        credentials_directory=environ.get("CREDENTIALS_DIRECTORY", ""),
    )


def _words(value: str | tuple[str, ...], *, where: str) -> tuple[str, ...]:
    """Return the words of ``value``.

    Raises:
        ConfigError: a quote in it is never closed.
    """
    try:
        return tuple(shlex.split(value)) if isinstance(value, str) else value
    except ValueError as exc:
        raise errors.ConfigError(f"{where}: {exc}") from None


def state_dir(chosen: ChosenPool, *, environ: Mapping[str, str]) -> Path:
    """Return where to keep what is learned about a pool: one directory per way of trusting it.

    A pool that is reached by another url or trusted by other certificates is another pool. The
    directory is in systemd's ``$STATE_DIRECTORY`` if that is set.
    """
    table = chosen.table
    identity = "\0".join((chosen.name, table.url, table.ca_file, str(table.fingerprint)))
    digest = hashlib.blake2b(identity.encode(errors="surrogatepass"), digest_size=8).hexdigest()
    return _state_base(environ) / "pools" / digest


def _state_base(environ: Mapping[str, str]) -> Path:
    if given := environ.get("STATE_DIRECTORY", "").split(":")[0]:
        return Path(given)
    if os.geteuid() == 0 and not environ.get("XDG_STATE_HOME"):
        return Path("/var/lib/cbtfs")
    return platformdirs.user_state_path("cbtfs")
