"""OVA XML: what xapi needs to make a VM's records again, taken apart for disks that are new.

``vm.xml`` of a point is one XML-RPC value: a struct with ``version`` and ``objects``, each of these
a struct of class, id and the record as ``snapshot``; references in it are ids such as ``Ref:3``
(xen-api, export.ml, importexport.ml).

xapi maps disks by pairs of uuids in the request, whose head may have 1024 bytes: enough for nine.
And an import that is no ``restore`` gives every network card a new address. So disks and cards are
taken out of the metadata here, to be made by calls of their own, of which each can be as long as it
likes; everything else of the VM, known to cbtfs or not, stays as xapi wrote it.

It comes out of a store, and is hostile input.
"""

import io
import tarfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from . import errors

FILE = "vm.xml"
"""Its name in a restore point."""

_NULL = "OpaqueRef:NULL"
_DISK_FIELDS = (
    "userdevice", "bootable", "mode", "type", "unpluggable", "other_config", "qos_algorithm_type",
    "qos_algorithm_params",
)  # fmt: skip
_CARD_FIELDS = (
    "device", "MTU", "other_config", "qos_algorithm_type", "qos_algorithm_params", "locking_mode",
    "ipv4_allowed", "ipv6_allowed",
)  # fmt: skip

Value = str | bool | list["Value"] | dict[str, "Value"]
"""What a field holds, as a call of xapi takes it: numbers are text."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A disk's place in its VM; ``fields`` are those of ``VBD.create``, without VM and VDI."""

    vdi_uuid: str
    fields: Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Card:
    """A network card; ``fields`` are those of ``VIF.create``, without VM, network and address."""

    mac: str
    network_uuid: str
    network_name: str
    network_bridge: str
    fields: Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Metadata:
    """A VM taken apart.

    Attributes:
        archive: the tar for ``/import_metadata``: the VM without disks and cards.
        slots: its disks, in the order of their devices.
        cards: its network cards, in the order of their devices.
    """

    archive: bytes
    slots: tuple[Slot, ...]
    cards: tuple[Card, ...]


def take_apart(
    content: bytes,
    *,
    name: str,
    other_config: Mapping[str, str] | None = None,
    is_ours: Callable[[str], bool] = lambda _: False,
) -> Metadata:
    """Return the VM in ``content``, the bytes of a ``vm.xml``.

    Args:
        content: of the file.
        name: what the VM is to be called.
        other_config: what is to be added to its ``other_config``, in place of what is there.
        is_ours: tells which reasons for blocking an operation are not to be taken over.

    Raises:
        StoreError: it is no such file.
    """
    try:
        if b"<!" in content:  # xapi writes neither; entities could grow without bounds
            raise ValueError("it has a document type or a comment")
        taken = _Taken(ET.fromstring(content))
        taken.change_maps(other_config or {}, is_ours)
        return taken.metadata(name)
    except (ET.ParseError, ValueError, RecursionError) as exc:
        raise errors.StoreError(
            f"{FILE} of the restore point is not as xapi wrote it ({exc}); restore without"
            " --vm-name, and give the disks to a VM of your own"
        ) from exc


class _Taken:
    """One ``vm.xml``: its objects by class and id."""

    def __init__(self, root: ET.Element) -> None:
        self._root = root
        self._list = _child(_field(root, "objects"), "array", "data")
        self._objects: dict[str, dict[str, ET.Element]] = {}
        self._elements: dict[str, ET.Element] = {}
        for element in self._list.findall("value"):
            kind, key = _text(_field(element, "class")), _text(_field(element, "id"))
            self._objects.setdefault(kind, {})[key] = _field(element, "snapshot")
            self._elements[key] = element

    def metadata(self, name: str) -> Metadata:
        vms = list(self._of("VM").values())
        if len(vms) != 1:
            raise ValueError(f"it has {len(vms)} VMs")
        slots, cards = self._slots(), self._cards()
        _set(vms[0], name_label=name, power_state="Halted", suspend_VDI=_NULL)
        self._strip()
        text = ET.tostring(self._root, encoding="unicode").replace("\r", "&#13;")
        return Metadata(_archive(text.encode()), slots, cards)

    def change_maps(self, other_config: Mapping[str, str], is_ours: Callable[[str], bool]) -> None:
        """Add to the VM's ``other_config``, and drop those of its blocks that are ours."""
        for vm in self._of("VM").values():
            for field, value in _members(vm):
                if field == "other_config":
                    _put(_child(value, "struct"), other_config)
                elif field == "blocked_operations":
                    blocked = _child(value, "struct")
                    _drop(blocked, [key for key, why in _members(value) if is_ours(_text(why))])

    def _slots(self) -> tuple[Slot, ...]:
        found: list[Slot] = []
        for vbd in self._of("VBD").values():
            vdi = self._of("VDI").get(_string(vbd, "VDI"))
            if _string(vbd, "type") == "Disk" and vdi is not None:
                found.append(Slot(_string(vdi, "uuid"), _fields(vbd, _DISK_FIELDS)))
        return tuple(sorted(found, key=lambda slot: _order(slot.fields.get("userdevice"))))

    def _cards(self) -> tuple[Card, ...]:
        found: list[Card] = []
        for vif in self._of("VIF").values():
            network = self._of("network").get(_string(vif, "network"))
            found.append(
                Card(
                    mac=_string(vif, "MAC"),
                    network_uuid=_string(network, "uuid"),
                    network_name=_string(network, "name_label"),
                    network_bridge=_string(network, "bridge"),
                    fields=_fields(vif, _CARD_FIELDS),
                )
            )
        return tuple(sorted(found, key=lambda card: _order(card.fields.get("device"))))

    def _strip(self) -> None:
        """Take out disks and cards, and what only they refer to; CD drives stay."""
        drives = {k: v for k, v in self._of("VBD").items() if _string(v, "type") != "Disk"}
        inserted = {_string(vbd, "VDI") for vbd in drives.values()}
        images = {k: v for k, v in self._of("VDI").items() if k in inserted}
        kept = {*drives, *images, *(_string(vdi, "SR") for vdi in images.values())}
        for vbd in drives.values():
            _set(vbd, currently_attached=False)
        for kind in ("VBD", "VDI", "SR", "VIF", "network"):
            for key in self._of(kind):
                if key not in kept:
                    self._list.remove(self._elements[key])

    def _of(self, kind: str) -> Mapping[str, ET.Element]:
        return self._objects.get(kind, {})


def _order(device: Value | None) -> tuple[int, str]:
    """Return what devices are sorted by: ``2`` before ``10``."""
    text = str(device or "")
    return len(text), text


# ── XML-RPC ──────────────────────────────────────────────────────────────────────────────────


def _child(element: ET.Element, *path: str) -> ET.Element:
    for tag in path:
        found = element.find(tag)
        if found is None:
            raise ValueError(f"a {tag} is missing")
        element = found
    return element


def _members(value: ET.Element) -> Iterator[tuple[str, ET.Element]]:
    for member in _child(value, "struct").findall("member"):
        yield _child(member, "name").text or "", _child(member, "value")


def _field(value: ET.Element, name: str) -> ET.Element:
    for key, found in _members(value):
        if key == name:
            return found
    raise ValueError(f"{name} is missing")


def _text(value: ET.Element) -> str:
    """Return what a scalar holds, with its type around it or without."""
    return (value[0].text if len(value) else value.text) or ""


def _string(record: ET.Element | None, name: str) -> str:
    if record is None:
        return ""
    return next((_text(value) for key, value in _members(record) if key == name), "")


def _fields(record: ET.Element, names: tuple[str, ...]) -> dict[str, Value]:
    return {name: _value(value) for name, value in _members(record) if name in names}


def _value(value: ET.Element) -> Value:
    kind = value[0].tag if len(value) else "string"
    if kind == "struct":
        return {name: _value(part) for name, part in _members(value)}
    if kind == "array":
        return [_value(part) for part in _child(value, "array", "data").findall("value")]
    if kind == "boolean":
        return _text(value) == "1"
    return _text(value)


def _set(record: ET.Element, **changes: str | bool) -> None:
    """Change fields of a record, those that it has."""
    for name, value in _members(record):
        if name in changes:
            new = changes[name]
            for child in list(value):
                value.remove(child)
            value.text = None if isinstance(new, bool) else new
            if isinstance(new, bool):
                ET.SubElement(value, "boolean").text = str(int(new))


def _drop(struct: ET.Element, keys: Collection[str]) -> None:
    for member in struct.findall("member"):
        if _child(member, "name").text in keys:
            struct.remove(member)


def _put(struct: ET.Element, entries: Mapping[str, str]) -> None:
    _drop(struct, entries.keys())
    for key, text in entries.items():
        member = ET.SubElement(struct, "member")
        ET.SubElement(member, "name").text = key
        ET.SubElement(member, "value").text = text


def _archive(content: bytes) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        info = tarfile.TarInfo("ova.xml")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return target.getvalue()
