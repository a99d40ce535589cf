"""Names of things in a pool, made into names of files and into text on a terminal.

Whoever may rename a VM or a disk chooses the name, so it is hostile input: ``safe_names`` is total,
injective within a folder, and leaves names alone that were made by it; ``shown`` lets nothing
through that could drive a terminal or mislead an eye. What was printed can be typed: ``spellings``.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b

NAME_MAX = 255
"""Longest file name in bytes (Linux, linux/limits.h)."""

RESERVED = frozenset({"latest", "snapshots"})
"""Names that mount and store use themselves where names from the pool stand too."""

_BAD = re.compile("[/\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_UNSAFE = re.compile(
    # C0, DEL and C1; soft hyphen; zero-width and directional marks; line separators; directional
    # embeddings, overrides and isolates; byte order mark; lone surrogates; tag characters
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_UUID = re.compile(r"(?:vdi-)?([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")
_SUFFIX_DIGITS = (0, 8, 16, 32)


def safe_names(
    pairs: Sequence[tuple[str, str]],
    *,
    reserved: Collection[str] = RESERVED,
    limit: int = NAME_MAX,
) -> dict[str, str]:
    """Return a file name for every key: valid, unique, and the given name wherever that is both.

    ``/``, control characters and lone surrogates become ``_``. What then is empty, ``.``, ``..``,
    reserved, longer than ``limit``, or not unique gets ``~`` and 8 hex digits of its key; of
    several of one name all do. Should that meet another name still, the one with fewer digits gets
    more. Names that came out of here come out unchanged.

    Args:
        pairs: key (a uuid) and name; the keys are distinct.
        reserved: names not to give.
        limit: longest name in bytes of UTF-8, at least 64.
    """
    plain = {key: _BAD.sub("_", name) for key, name in pairs}
    forbidden = {"", ".", "..", *reserved}
    levels = dict.fromkeys(plain, 0)
    names = dict(plain)
    clashing = _clashing(names, levels, forbidden, limit)
    while clashing:
        for key in clashing:
            levels[key] += 1
            names[key] = _suffixed(plain[key], key, level=levels[key], limit=limit)
        clashing = _clashing(names, levels, forbidden, limit)
    return names


def _clashing(
    names: Mapping[str, str], levels: Mapping[str, int], forbidden: Collection[str], limit: int
) -> list[str]:
    """Return the keys that need (more) digits: of equal names, those that have the fewest."""
    times = Counter(names.values())
    fewest: dict[str, int] = {}
    for key, name in names.items():
        if times[name] > 1:
            fewest[name] = min(levels[key], fewest.get(name, levels[key]))
    return [
        key
        for key, name in names.items()
        if fewest.get(name) == levels[key] or name in forbidden or len(name.encode()) > limit
    ]


def _suffixed(name: str, key: str, *, level: int, limit: int) -> str:
    uuid = _UUID.fullmatch(key)
    if level < len(_SUFFIX_DIGITS):
        digits = uuid[1].replace("-", "") if uuid else _digest(key, size=16).hex()
        digits = digits[: _SUFFIX_DIGITS[level]]
    else:  # two keys with one uuid: "vdi-" and the uuid
        digits = _digest(key, size=20).hex()
    room = limit - len(digits) - 1
    return f"{name.encode()[:room].decode(errors='ignore')}~{digits}"


def shown(text: str) -> str:
    """Return ``text`` with everything that could drive a terminal or mislead an eye escaped."""
    if text.isascii() and text.isprintable():
        return text
    return _UNSAFE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def spellings(name: str, key: str) -> frozenset[str]:
    """Return how a thing called ``name`` with the uuid ``key`` is printed where not as itself.

    With characters escaped, as ``shown`` does it, or as ``safe_names`` makes it valid and tells it
    from its twins.
    """
    plain = _BAD.sub("_", name)
    twin = _suffixed(plain, key, level=1, limit=NAME_MAX)
    return frozenset({shown(name), plain, shown(plain), twin, shown(twin)}) - {name}


def _digest(text: str, *, size: int) -> bytes:
    return blake2b(text.encode(errors="surrogatepass"), digest_size=size).digest()
