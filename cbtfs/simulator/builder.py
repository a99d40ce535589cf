"""Builder: puts a pool together for a scenario. (Skeleton: signatures are final.)"""

from collections.abc import Mapping, Sequence

from .disk import Disk
from .pool import SimulatedPool, Value


class Builder:
    """Makes records with uuids derived from ``seed`` and a label: two builds give equal pools.

    Every method returns the ref. A twin label gets a counter, so names may repeat.
    """

    def __init__(self, pool: SimulatedPool, *, seed: str) -> None:
        self.pool = pool
        raise NotImplementedError

    def add_pool(self, name: str) -> str:
        """First call; makes the pool object and the SM plugins."""
        raise NotImplementedError

    def add_host(self, name: str, *, address: str) -> str:
        """Add a host and its control domain; the first becomes master."""
        raise NotImplementedError

    def add_network(self, name: str, *, purpose: Sequence[str] = ()) -> str:
        """Add a network; purposes ``nbd`` or ``insecure_nbd``."""
        raise NotImplementedError

    def add_pif(
        self,
        host: str,
        network: str,
        *,
        ip: str = "",
        ipv6: Sequence[str] = (),
        management: bool = False,
        attached: bool = True,
    ) -> str:
        """Add a network interface; IPv6 addresses carry ``/64``."""
        raise NotImplementedError

    def add_sr(
        self,
        name: str,
        *,
        type: str,  # noqa: A002 (xapi's name of the field)
        hosts: Sequence[str],
        detached: Sequence[str] = (),
        size: int = 1 << 40,
        granularity: int = 2 << 20,
        sector: int = 512,
    ) -> str:
        """Add an SR with a PBD per host; CBT, content_type, shared follow from ``type``."""
        raise NotImplementedError

    def add_vdi(
        self,
        sr: str,
        name: str,
        *,
        size: int,
        cbt: bool = False,
        raw: bool = False,
        fields: Mapping[str, Value] | None = None,
        content: Disk | None = None,
    ) -> str:
        """Add a VDI; write its contents through ``pool.disk(ref).write``.

        ``fields`` overrides record fields (type, sharable, other_config, tags, on_boot, …).
        """
        raise NotImplementedError

    def add_vm(
        self,
        name: str,
        *,
        running_on: str = "",
        template: bool = False,
        memory: int = 1 << 30,
        fields: Mapping[str, Value] | None = None,
    ) -> str:
        """Add a VM; started by ``start`` once its VBDs are there."""
        raise NotImplementedError

    def add_vbd(
        self,
        vm: str,
        vdi: str,
        *,
        userdevice: str,
        type: str = "Disk",  # noqa: A002 (xapi's name of the field)
        mode: str = "RW",
        bootable: bool = False,
    ) -> str:
        """Add a VBD; ``vdi`` "" for an empty drive."""
        raise NotImplementedError

    def add_vif(self, vm: str, network: str, *, device: str, mac: str) -> str:
        """Add a network card of a VM."""
        raise NotImplementedError

    def start(self, vm: str) -> None:
        """Start the VM on its ``running_on`` host."""
        raise NotImplementedError

    def snapshot(self, vm: str, name: str) -> str:
        """Take a VM snapshot with derived uuids."""
        raise NotImplementedError
