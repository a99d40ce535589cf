"""Faults: the awkwardness a simulated pool can be told to show, by name.

The keys are the table ``KEYS``: one line each with kind, default and meaning. ``sim set DIR
KEY=VALUE`` sets one, ``KEY=`` sets it back. Durations are seconds or ``2ms``, ``1.5s``, ``1m``;
sizes take K, M, G, T; a flag is ``on`` or ``off``.
"""

import difflib
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from cbtfs import errors, units

from .failures import SimError


@dataclass(frozen=True)
class Key:
    """One thing that can be set: ``kind`` is duration, size, count, flag, text or rules."""

    kind: str
    default: str
    meaning: str


KEYS: dict[str, Key] = {
    # NBD servers
    "nbd.delay": Key("duration", "0", "wait before the reply to each read"),
    "nbd.drop_after": Key("size", "", "drop a connection after that many bytes of data, once each"),
    "nbd.close_after": Key("count", "", "end a connection once it has answered that many reads"),
    "nbd.drop_count": Key("count", "", "drop or end only that many connections, then behave again"),
    "nbd.fail_read_at": Key(
        "size", "", "header without error, then close, for reads over this offset"
    ),
    "nbd.silent": Key("text", "", "host (or *) that accepts and never greets"),
    "nbd.refuse": Key("text", "", "host (or *) that closes without a byte"),
    "nbd.attach_delay": Key("duration", "0", "time that plugging dom0's VBD takes"),
    "nbd.detach_delay": Key("duration", "0", "time between end of a session and the VBD's removal"),
    "nbd.attach_fail": Key("text", "", "VDI uuid (or *) that cannot be attached in dom0"),
    "nbd.leak": Key("flag", "off", "dom0's VBD stays after the session, plugged"),
    "nbd.race": Key(
        "flag", "on", "two plugs of one VDI at a time: the second fails, as on real hosts"
    ),
    "nbd.slots": Key("count", "16", "connections a host serves at a time"),
    "nbd.impostor": Key("text", "", "host (or *) that shows another certificate on NBD"),
    "nbd.strip": Key("text", "", "host (or *) with an attacker that strips STARTTLS"),
    "nbd.no_tls": Key("text", "", "host (or *) that serves plain text though the purpose is nbd"),
    "nbd.trickle": Key("duration", "0", "wait between the 512 KiB pieces of a reply"),
    # xapi's HTTPS servers
    "http.impostor": Key("text", "", "host (or *) that shows another certificate on HTTPS"),
    "http.reset": Key("text", "", "host (or *) that resets HTTPS connections after accept"),
    "http.silent": Key("text", "", "host (or *) that accepts HTTPS and never answers"),
    "http.status": Key("text", "", "answer every request with this HTTP status"),
    "http.truncate": Key("size", "", "cut bodies of disk exports after that many bytes"),
    "http.stall": Key("size", "", "bodies of disk exports go silent after that many bytes"),
    "http.flip": Key("size", "", "flip the bits of that byte in bodies of disk exports"),
    "http.upload_cut": Key("size", "", "a disk's import fails after that many bytes"),
    "http.upload_stall": Key(
        "size", "", "a disk's import does not end, and keeps nothing after that many bytes"
    ),
    "http.upload_flip": Key("size", "", "flip the bits of that byte in a disk's import"),
    "http.redirect": Key(
        "text", "", "address to which exports and imports of disks are sent, by 302"
    ),
    "vhd.full": Key("text", "", "SR uuid or name (or *) whose VHD exports hold every block"),
    # xapi
    "xapi.delay": Key("rules", "", "METHOD:SECONDS,…: a call takes longer (METHOD may be VDI.*)"),
    "xapi.fail": Key("rules", "", "METHOD[*COUNT]:CODE[:PARAM…],…: a call fails, COUNT times"),
    "xapi.fail_after": Key("rules", "", "as xapi.fail, but the call is carried out first"),
    "xapi.auth_delay": Key("duration", "0.2", "delay of a failed login (5 s on real hosts)"),
    "xapi.booting": Key("text", "", "host (or *) that answers HOST_STILL_BOOTING"),
    "xapi.idle": Key("duration", "24h", "a session unused for so long ends"),
    "xapi.batch": Key("duration", "50ms", "event.from gathers events for so long"),
    "licence.restrict_cbt": Key("flag", "off", "enable_cbt answers LICENCE_RESTRICTION"),
    "host.down": Key("text", "", "host (or *) that nobody can reach: get_nbd_info fails"),
    # storage
    "sr.delay": Key("duration", "0", "each locked operation of an SR takes that much longer"),
    "sr.lock": Key("duration", "0", "somebody else holds every SR's lock for so long from now"),
    "sr.gc": Key("flag", "on", "coalesce chains at once; off: they grow up to 30, then fault 109"),
    "sr.no_space": Key("text", "", "SR uuid or name (or *) without space left: fault 44"),
    "sr.fail": Key("rules", "", "as xapi.fail, for the storage's part of VDI.data_destroy"),
    "vdi.data_destroy_wait": Key("duration", "4s", "how long data_destroy waits for VBDs"),
    "cbt.snapshot_fail": Key("text", "", "VDI uuid (or *) whose log fails at its next snapshot"),
    "cbt.resize_fail": Key("text", "", "VDI uuid (or *) whose log fails at its next resize"),
    "cbt.drop_bits": Key("count", "", "forget that many changed blocks of each bitmap returned"),
    "cbt.garble": Key("text", "", "short, long or base64: return a malformed bitmap"),
}


class Faults:
    """The settings of a simulated pool; thread-safe, unset keys have their default."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._spent: dict[str, int] = {}
        self._since: dict[str, float] = {}
        self._lock = threading.Lock()

    def set(self, key: str, value: str) -> None:
        """Set ``key`` to ``value``, or back to its default if ``value`` is empty.

        Raises:
            UsageError: no such key (the text names the nearest), or ``value`` does not fit it.
        """
        known = KEYS.get(key)
        if known is None:
            near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.0)[0]
            raise errors.UsageError(
                f"the simulated pool has no setting {key!r}; nearest is {near!r}"
            )
        if value:
            _check(key, known, value)
        with self._lock:
            self._values.pop(key, None)
            self._since[key] = time.monotonic()
            self._spent = {k: n for k, n in self._spent.items() if not k.startswith(f"{key}=")}
            if value:
                self._values[key] = value

    def current(self) -> Mapping[str, str]:
        """Return the keys that are set, with their values as given."""
        with self._lock:
            return dict(self._values)

    def text(self, key: str) -> str:
        """Return the value of ``key`` as it was written, or its default."""
        return self._values.get(key, KEYS[key].default)

    def duration(self, key: str) -> float:
        """Return a duration in seconds."""
        return _seconds(self.text(key))

    def remaining(self, key: str) -> float:
        """Return what is left of a duration since it was set, in seconds."""
        return max(self.duration(key) - time.monotonic() + self._since.get(key, 0.0), 0.0)

    def size(self, key: str) -> int | None:
        """Return a size in bytes, None if not set."""
        text = self.text(key)
        return units.parse_size(text) if text else None

    def count(self, key: str) -> int | None:
        """Return a number, None if not set."""
        text = self.text(key)
        return int(text) if text else None

    def flag(self, key: str) -> bool:
        """Return whether ``key`` is on."""
        return self.text(key) in _TRUE

    def hits(self, key: str, *names: str) -> bool:
        """Return whether the text of ``key`` is ``*`` or lists one of ``names``."""
        listed = self.text(key).split(",")
        return "*" in listed or any(name in listed for name in names if name)

    def take(self, key: str, *, limit: int) -> bool:
        """Count one use of ``key``; return False when it was used ``limit`` times already."""
        with self._lock:
            used = self._spent.get(f"{key}=", 0)
            self._spent[f"{key}="] = used + 1
            return used < limit

    def delay_of(self, method: str) -> float:
        """Return how much longer ``method`` takes, in seconds."""
        rules = [rule.partition(":") for rule in self.text("xapi.delay").split(",") if rule]
        return sum(_seconds(value) for name, _, value in rules if _matches(name, method))

    def check(self, method: str, *, key: str = "xapi.fail") -> None:
        """Raise what ``key`` says ``method`` fails with; return if nothing.

        Raises:
            SimError: the failure that was ordered.
        """
        for rule in filter(None, self.text(key).split(",")):
            name, _, failure = rule.partition(":")
            name, _, count = name.rpartition("*") if name[-1:].isdigit() else (name, "", "")
            if not _matches(name, method):
                continue
            if count and not self._spend(f"{key}={rule}", int(count)):
                continue
            code, *params = failure.split(":")
            raise SimError(code, *params)

    def _spend(self, rule: str, limit: int) -> bool:
        with self._lock:
            used = self._spent.get(rule, 0)
            self._spent[rule] = used + 1
            return used < limit


_TRUE = ("on", "1", "true", "yes")
_FALSE = ("off", "0", "false", "no")


def _seconds(text: str) -> float:
    return float(text) if text.replace(".", "", 1).isdigit() else units.parse_duration(text)


def _matches(pattern: str, method: str) -> bool:
    return pattern in ("*", method) or (pattern.endswith(".*") and method.startswith(pattern[:-1]))


def _check(key: str, known: Key, value: str) -> None:
    if known.kind == "duration":
        _seconds(value)
    elif known.kind == "size":
        units.parse_size(value)
    elif known.kind == "count" and not value.isdigit():
        raise errors.UsageError(f"{key} takes a number, not {value!r}")
    elif known.kind == "flag" and value not in (*_TRUE, *_FALSE):
        raise errors.UsageError(f"{key} takes on or off, not {value!r}")
    elif known.kind == "rules":
        _check_rules(key, value)


def _check_rules(key: str, value: str) -> None:
    for rule in value.split(","):
        method, colon, rest = rule.partition(":")
        if not method or not colon or not rest:
            raise errors.UsageError(f"{key} takes METHOD:…, not {rule!r}")
        if key == "xapi.delay":
            _seconds(rest)
