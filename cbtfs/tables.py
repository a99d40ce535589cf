"""The tables of the configuration file: which keys they have, of which type, with which default.

Every default stands here with its unit and its reason. Decoding is strict: an unknown key or a
wrong type is an error that names the file and the path of the key.
"""

import difflib
from collections.abc import Callable, Mapping
from typing import Annotated, TypeVar
from urllib.parse import urlsplit

import msgspec

from . import errors
from .retention import Keep


class PoolTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[pool.NAME]``: how to reach a pool.

    Attributes:
        url: any host of the pool, ``https://host[:port]``; the master is found from there.
        user: who to log in as. The role vm-power-admin is enough; ``root`` always exists.
        password_file: file whose contents, without the final newline, are the password.
        password_command: program and arguments that print the password (no shell is used).
        ca_file: PEM file to trust instead of the system's CAs.
        fingerprint: SHA-256 of a host's certificate, ``sha256:…``, instead of a CA; one or several.
        connections_per_host: NBD connections at once to one host. xapi-nbd takes 16 in all, and
            four are left for others.
    """

    url: str
    user: str = "root"
    password_file: str = ""
    password_command: str | tuple[str, ...] = ()
    ca_file: str = ""
    fingerprint: str | tuple[str, ...] = ()
    connections_per_host: Annotated[int, msgspec.Meta(ge=1, le=16)] = 12


class StoreTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[store.NAME]``: a directory of restore points.

    Attributes:
        path: the directory; best on XFS or btrfs, where unchanged blocks are shared.
    """

    path: str


class HooksTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``hooks = { … }`` of a job: programs to run before and after it."""

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


class JobTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[job.NAME]``: what ``cbtfs sync NAME`` does.

    Attributes:
        pool: name of a pool; "" if the file has only one.
        store: name of a store; "" if the file has only one.
        vms: names or globs, uuids, ``tag:…``, ``sr:…``.
        exclude_disks: globs of disk names or ``VM/DEVICE`` that are left out.
        keep: which restore points stay, after each sync of the job and by ``prune``.
        limit_rate: bytes per second to read from the pool, over all disks of the job, such as
            ``200M``; "" for no limit.
        verify_sample: share of the blocks that the pool calls unchanged to read and compare, such
            as ``0.1%``, or ``0%`` for none; "" for 0.1 %, but at most 256 blocks of a disk, so that
            a sync without changes costs the same whatever the size of the disk.
        hooks: programs to run (not carried out yet).
    """

    pool: str = ""
    store: str = ""
    vms: tuple[str, ...] = ()
    exclude_disks: tuple[str, ...] = ()
    keep: Keep | None = None
    limit_rate: str = ""
    verify_sample: str = ""
    hooks: HooksTable | None = None


_TEXTS = {"limit_rate": "200M", "verify_sample": "0.1%"}
"""Keys whose value is a text with a unit, with an example; a number there is a likely mistake."""

_T = TypeVar("_T", bound=msgspec.Struct)


def decode(values: Mapping[str, object], table: type[_T], *, where: str, prefix: str) -> _T:
    """Return ``values`` as a table.

    Args:
        values: what TOML has.
        table: the Struct to make.
        where: the file, for messages.
        prefix: path of the table with a final dot, ``pool.prod.``.

    Raises:
        ConfigError: a key is unknown, missing, or has a wrong value.
    """
    names = tuple(f.name for f in msgspec.structs.fields(table))
    check_keys(values, names, where=where, prefix=prefix)
    for key, inner in (("keep", Keep), ("hooks", HooksTable)):
        nested = values.get(key)
        if isinstance(nested, dict):
            known = tuple(f.name for f in msgspec.structs.fields(inner))
            check_keys(
                msgspec.convert(nested, dict[str, object]),
                known,
                where=where,
                prefix=f"{prefix}{key}.",
            )
    for key, example in _TEXTS.items():
        if isinstance(values.get(key, ""), int | float):  # TOML has numbers, but not these units
            raise errors.ConfigError(
                f"{where}: {prefix}{key}: {values[key]} has no unit; write for example {example!r}"
            )
    try:
        return msgspec.convert(values, table)
    except msgspec.ValidationError as exc:
        what, _, place = str(exc).partition(" - at `$")
        key = prefix + place.strip(".`") if place else prefix.rstrip(".")
        raise errors.ConfigError(f"{where}: {key}: {what}") from None


def check_keys(
    values: Mapping[str, object], known: tuple[str, ...], *, where: str, prefix: str
) -> None:
    """Raise ConfigError, naming the nearest valid key, for a key that is not ``known``."""
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(known)}"
            raise errors.ConfigError(f"{where}: {prefix}{key}: unknown key, {hint}")


def check_url(url: str) -> None:
    """Raise UsageError unless ``url`` is ``https://host[:port]`` and nothing more."""
    if "@" in url:  # before anything that would show it
        raise errors.UsageError("a url holds no user or password; use user and password_file")
    try:
        parts = urlsplit(url)
        bad = parts.scheme != "https" or not parts.hostname or (parts.port == 0)
    except ValueError:  # a port that is no number
        raise errors.UsageError(
            f"{url!r} is no url; write https://host or https://host:port"
        ) from None
    if bad or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise errors.UsageError(
            f"{url!r} is no url of a host; write https://host or https://host:port"
        )


def checked(check: Callable[[str], object], text: str, *, where: str) -> None:
    """Call ``check`` on ``text``, its UsageError becoming a ConfigError that says ``where``."""
    try:
        check(text)
    except errors.UsageError as exc:
        raise errors.ConfigError(f"{where}: {exc}") from None


def parse_share(text: str) -> float:
    """Return the share, 0 to 1, that ``text`` (``0.1%``) means.

    Raises:
        UsageError: it is not a percentage from 0 to 100.
    """
    number, percent, rest = text.strip().partition("%")
    try:
        share = float(number) / 100
    except ValueError:
        share = -1.0
    if not percent or rest or not 0 <= share <= 1:
        raise errors.UsageError(f"{text!r} is not a percentage; write for example 0.1%")
    return share
