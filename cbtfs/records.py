"""The objects of a pool as frozen records: hosts, SRs, VMs, VBDs, VDIs, networks.

``inventory.py`` fills them from what xapi sends. References are strings, "" for none, and may
dangle; sizes are in bytes; times are aware and in UTC.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
"""``snapshot_time`` of what is no snapshot."""

READABLE_TYPES = frozenset({"user", "system"})
"""VDI types that have contents for a user; ``cbt_metadata``, ``suspend``, … have none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A server of the pool; ``address`` is where its management interface answers."""

    ref: str
    uuid: str
    name: str = ""
    address: str = ""
    hostname: str = ""
    enabled: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SR:
    """A storage repository; ``host_refs`` are the hosts that have it attached now."""

    ref: str
    uuid: str
    name: str = ""
    type: str = ""
    shared: bool = False
    content_type: str = ""
    allowed_operations: frozenset[str] = frozenset()
    physical_size: int = 0
    physical_utilisation: int = 0
    host_refs: tuple[str, ...] = ()
    cbt_capable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VBD:
    """A VDI's place in a VM; ``device`` is safe as a file name, but not always unique in a VM."""

    ref: str
    uuid: str = ""
    vm_ref: str = ""
    vdi_ref: str = ""
    device: str = ""
    userdevice: str = ""
    type: str = "Disk"
    mode: str = "RW"
    currently_attached: bool = False
    empty: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VM:
    """A virtual machine, or a template, a snapshot, a control domain."""

    ref: str
    uuid: str
    name: str = ""
    power_state: str = "Halted"
    is_a_template: bool = False
    is_a_snapshot: bool = False
    is_control_domain: bool = False
    snapshot_of: str = ""
    snapshot_time: datetime = EPOCH
    vbd_refs: tuple[str, ...] = ()
    tags: frozenset[str] = frozenset()
    other_config: Mapping[str, str] = field(default_factory=dict[str, str])
    blocked_operations: Mapping[str, str] = field(default_factory=dict[str, str])
    resident_on: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VDI:
    """A virtual disk: ``size`` is what its guest sees, ``used`` what it takes in its SR."""

    ref: str
    uuid: str
    name: str = ""
    description: str = ""
    sr_ref: str = ""
    size: int = 0
    used: int = 0
    type: str = "user"
    managed: bool = True
    missing: bool = False
    is_a_snapshot: bool = False
    snapshot_of: str = ""
    snapshot_time: datetime = EPOCH
    cbt_enabled: bool = False
    read_only: bool = False
    sharable: bool = False
    on_boot: str = "persist"
    vbd_refs: tuple[str, ...] = ()
    other_config: Mapping[str, str] = field(default_factory=dict[str, str])
    tags: frozenset[str] = frozenset()
    allowed_operations: frozenset[str] = frozenset()
    is_tools_iso: bool = False
    location: str = ""
    sm_config: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def is_readable(self) -> bool:
        """Whether it has contents that can be read: managed, present, of a type with data."""
        return self.managed and not self.missing and self.type in READABLE_TYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A network; ``purpose`` holds ``nbd`` or ``insecure_nbd`` where NBD is served."""

    ref: str
    name: str = ""
    purpose: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class PIF:
    """A host's interface on a network."""

    ref: str
    network_ref: str = ""
    host_ref: str = ""
    ip: str = ""
    currently_attached: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The pool itself; ``restrictions`` are its licence's, such as ``restrict_cbt``."""

    uuid: str
    name: str = ""
    master_ref: str = ""
    restrictions: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk of a VM; ``device`` is unique in the VM and safe as a file name."""

    device: str
    vbd: VBD
    vdi: VDI
