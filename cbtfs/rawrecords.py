"""xapi's records as they come over the JSON wire, typed: the ten classes cbtfs asks for.

Field names are xapi's own (xen-api's datamodel), each with the value it has where a server leaves
it out; what we don't use is not decoded. ``inventory.py`` makes friendlier records of these, and is
the only reader.

A name in the pool may hold half of a surrogate pair or bytes that are no UTF-8; msgspec refuses
both. Such a document is repaired once, slowly: each offender becomes ``_``.
"""

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import msgspec

from . import errors

_SURROGATE = re.compile("[\ud800-\udfff]")


class Record(msgspec.Struct, frozen=True, gc=False):
    """What every class has."""

    uuid: str = ""
    name_label: str = ""


class PoolRecord(Record, frozen=True, gc=False):
    """The class ``pool``."""

    master: str = ""
    restrictions: dict[str, str] = {}


class HostRecord(Record, frozen=True, gc=False):
    """The class ``host``."""

    address: str = ""
    hostname: str = ""
    enabled: bool = True


class SRRecord(Record, frozen=True, gc=False):
    """The class ``SR``."""

    type: str = ""
    shared: bool = False
    content_type: str = ""
    allowed_operations: frozenset[str] = frozenset()
    physical_size: int = 0
    physical_utilisation: int = 0


class PBDRecord(Record, frozen=True, gc=False):
    """The class ``PBD``: a host's connection to an SR."""

    host: str = ""
    SR: str = ""
    currently_attached: bool = False


class SMRecord(Record, frozen=True, gc=False):
    """The class ``SM``: a storage driver and what it can do."""

    type: str = ""
    features: dict[str, int] = {}
    capabilities: frozenset[str] = frozenset()


class VMRecord(Record, frozen=True, gc=False):
    """The class ``VM``."""

    power_state: str = "Halted"
    is_a_template: bool = False
    is_a_snapshot: bool = False
    is_control_domain: bool = False
    snapshot_of: str = ""
    snapshot_time: str = ""
    VBDs: tuple[str, ...] = ()
    tags: frozenset[str] = frozenset()
    other_config: dict[str, str] = {}
    blocked_operations: dict[str, str] = {}
    resident_on: str = ""


class VBDRecord(Record, frozen=True, gc=False):
    """The class ``VBD``."""

    VM: str = ""
    VDI: str = ""
    device: str = ""
    userdevice: str = ""
    type: str = "Disk"
    mode: str = "RW"
    currently_attached: bool = False
    empty: bool = False


class VDIRecord(Record, frozen=True, gc=False):
    """The class ``VDI``."""

    name_description: str = ""
    SR: str = ""
    virtual_size: int = 0
    physical_utilisation: int = 0
    type: str = "user"
    managed: bool = True
    missing: bool = False
    is_a_snapshot: bool = False
    snapshot_of: str = ""
    snapshot_time: str = ""
    cbt_enabled: bool = False
    read_only: bool = False
    sharable: bool = False
    on_boot: str = "persist"
    VBDs: tuple[str, ...] = ()
    other_config: dict[str, str] = {}
    tags: frozenset[str] = frozenset()
    allowed_operations: frozenset[str] = frozenset()
    is_tools_iso: bool = False
    location: str = ""
    sm_config: dict[str, str] = {}


class NetworkRecord(Record, frozen=True, gc=False):
    """The class ``network``."""

    purpose: frozenset[str] = frozenset()


class PIFRecord(Record, frozen=True, gc=False):
    """The class ``PIF``."""

    network: str = ""
    host: str = ""
    IP: str = ""
    currently_attached: bool = False


SHAPES: Mapping[str, type[Record]] = {
    "pool": PoolRecord,
    "host": HostRecord,
    "SR": SRRecord,
    "PBD": PBDRecord,
    "SM": SMRecord,
    "VM": VMRecord,
    "VBD": VBDRecord,
    "VDI": VDIRecord,
    "network": NetworkRecord,
    "PIF": PIFRecord,
}
"""Each class by xapi's name."""

_R = TypeVar("_R", bound=Record)
_T = TypeVar("_T")


def decode_record(data: bytes | memoryview, shape: type[_R], *, name: str) -> _R:
    """Return one record of the class ``name``.

    Raises:
        PoolError: ``data`` is no such record.
    """
    return _decoded(bytes(data), shape, name)


def decode(data: bytes, table: type[dict[str, _R]], *, name: str) -> dict[str, _R]:
    """Return the records of one class by reference, in the order of references.

    Args:
        data: JSON of the map from reference to record.
        table: type of the result.
        name: xapi's name of the class, for the error.

    Raises:
        PoolError: ``data`` is no such map.
    """
    return dict(sorted(_decoded(data, table, name).items()))


READERS: Mapping[str, Callable[[bytes], Mapping[str, Record]]] = {
    "pool": partial(decode, table=dict[str, PoolRecord], name="pool"),
    "host": partial(decode, table=dict[str, HostRecord], name="host"),
    "SR": partial(decode, table=dict[str, SRRecord], name="SR"),
    "PBD": partial(decode, table=dict[str, PBDRecord], name="PBD"),
    "SM": partial(decode, table=dict[str, SMRecord], name="SM"),
    "VM": partial(decode, table=dict[str, VMRecord], name="VM"),
    "VBD": partial(decode, table=dict[str, VBDRecord], name="VBD"),
    "VDI": partial(decode, table=dict[str, VDIRecord], name="VDI"),
    "network": partial(decode, table=dict[str, NetworkRecord], name="network"),
    "PIF": partial(decode, table=dict[str, PIFRecord], name="PIF"),
}
"""``decode`` for each class."""


def _decoded(data: bytes, shape: type[_T], name: str) -> _T:
    try:
        try:
            return msgspec.json.decode(data, type=shape)
        except msgspec.ValidationError:
            raise
        except ValueError:
            return msgspec.json.decode(_repaired(data), type=shape)
    except (ValueError, RecursionError) as exc:
        raise errors.PoolError(
            f"the pool sent {name} records that cannot be understood: {exc}"
        ) from None


def _repaired(data: bytes) -> bytes:
    """Return ``data`` with ``_`` for whatever in its strings cannot be UTF-8.

    Raises:
        ValueError: it is not JSON even so.
    """
    document: object = json.loads(data.decode(errors="surrogateescape"))
    text = json.dumps(document, ensure_ascii=False)
    return _SURROGATE.sub("_", text).encode()
