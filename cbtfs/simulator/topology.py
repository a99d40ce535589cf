"""The hosts, networks and SRs that every scenario starts from.

Two hosts with a management and an NBD address each; the purpose ``nbd`` sits on the NBD network,
whose interfaces also have an IPv6 address where nobody listens, as on real hosts.
"""

import ipaddress
from dataclasses import dataclass

from .builder import Builder

_NBD_DISTANCE = 10
_HOSTS = 2


@dataclass(frozen=True, slots=True)
class Topology:
    """Refs of what a scenario may build on."""

    hosts: tuple[str, ...]
    management: str
    storage_network: str
    shared: str
    """NFS, seen by both hosts, with CBT."""
    local: tuple[str, ...]
    """One ext SR per host, with CBT."""
    half_attached: str
    """lvmoiscsi, shared, its PBD on the second host detached."""
    sectors_4k: str
    """largeblock on the first host: 4096-byte sectors."""
    fine: str
    """zfs on the first host: sizes are multiples of 4 KiB, not of 2 MiB."""
    without_cbt: str
    """linstor on both hosts: no CBT."""
    isos: str
    tools: str


def build_topology(builder: Builder, *, address: str) -> Topology:
    """Add pool, hosts, networks and SRs; ``address`` is the first host's."""
    first = ipaddress.IPv4Address(address)
    builder.add_pool("sim")
    hosts = tuple(
        builder.add_host(f"xcp{number + 1}", address=str(first + number))
        for number in range(_HOSTS)
    )
    management = builder.add_network("Pool-wide network associated with eth0")
    storage = builder.add_network("NBD network", purpose=["nbd"])
    for number, host in enumerate(hosts):
        builder.add_pif(host, management, ip=str(first + number), management=True)
        nbd = first + _NBD_DISTANCE + number
        builder.add_pif(host, storage, ip=str(nbd), ipv6=[f"fd00:5e1:1::{number + 1}/64"])
    return Topology(
        hosts=hosts,
        management=management,
        storage_network=storage,
        shared=builder.add_sr("Shared NFS", type="nfs", hosts=hosts, size=1 << 46),
        local=tuple(builder.add_sr("Local storage", type="ext", hosts=[host]) for host in hosts),
        half_attached=builder.add_sr(
            "iSCSI half attached", type="lvmoiscsi", hosts=hosts[:1], detached=hosts[1:]
        ),
        sectors_4k=builder.add_sr("Large blocks", type="largeblock", hosts=hosts[:1], sector=4096),
        fine=builder.add_sr("ZFS", type="zfs", hosts=hosts[:1], granularity=4096),
        without_cbt=builder.add_sr("Linstor", type="linstor", hosts=hosts),
        isos=builder.add_sr("ISO library", type="iso", hosts=hosts),
        tools=builder.add_sr("XCP-ng Tools", type="iso", hosts=hosts),
    )
