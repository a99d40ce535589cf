"""Builder: puts a pool together for a scenario."""

import uuid as uuids
from collections import Counter
from collections.abc import Mapping, Sequence

from . import attachments, operations, snapshots, vms, volumes
from .methods import Call, known
from .pool import SimulatedPool
from .state import PLUGINS, Geometry
from .values import NULL, Timestamp, Value

_SPACE = uuids.UUID("6f2c1ad0-52b1-4d0c-9d0a-d1f7c0a4e3b5")


class Builder:
    """Makes objects with uuids derived from ``seed`` and a label: two builds give equal pools.

    Every method returns a ref. Equal labels get a counter, so names may repeat. The order is
    the pool, hosts, networks, SRs, then the rest.
    """

    def __init__(self, pool: SimulatedPool, *, seed: str) -> None:
        self.pool = pool
        self._seed = seed
        self._labels: Counter[str] = Counter()
        self._running_on: dict[str, str] = {}

    def add_pool(self, name: str) -> str:
        """Add the pool object and the SM plugins."""
        with self.pool.lock:
            for kind, plugin in PLUGINS.items():
                self._add(
                    "SM",
                    kind,
                    {
                        "name_label": plugin.label,
                        "type": kind,
                        "vendor": "simulated",
                        "version": "1.0",
                        "required_api_version": "1.0",
                        "features": _features(kind),
                        "capabilities": [*_features(kind)],
                    },
                )
            return self._add(
                "pool",
                name,
                {
                    "name_label": name,
                    "master": NULL,
                    "restrictions": {"restrict_cbt": "false", "restrict_nbd": "false"},
                },
            )

    def add_host(self, name: str, *, address: str) -> str:
        """Add a host and its control domain; the first becomes the master."""
        pool = self.pool
        with pool.lock:
            host = self._add(
                "host",
                name,
                {
                    "name_label": name,
                    "hostname": name,
                    "address": address,
                    "enabled": True,
                    "API_version_major": 2,
                    "API_version_minor": 21,
                    "API_version_vendor": "XenSource",
                    "edition": "xcp-ng",
                    "software_version": {"product_brand": "XCP-ng", "product_version": "8.3.0"},
                    "tls_verification_enabled": True,
                },
            )
            ref, uuid = self._identity("VM", f"dom0 of {name}")
            dom0 = vms.add(
                pool,
                {
                    "name_label": f"Control domain on host: {name}",
                    "is_control_domain": True,
                    "power_state": "Running",
                    "domid": 0,
                    "domain_type": "pv",
                    "resident_on": host,
                },
                ref=ref,
                uuid=uuid,
            )
            pool.db.set("host", host, control_domain=dom0)
            if not known(pool.master):
                pool.db.set("pool", pool.db.only("pool"), master=host)
            return host

    def add_network(self, name: str, *, purpose: Sequence[str] = ()) -> str:
        """Add a network; purposes are ``nbd`` or ``insecure_nbd``."""
        with self.pool.lock:
            return self._add(
                "network",
                name,
                {
                    "name_label": name,
                    "bridge": f"xenbr{len(self.pool.db.records('network'))}",
                    "MTU": 1500,
                    "managed": True,
                    "default_locking_mode": "unlocked",
                    "purpose": [*purpose],
                },
            )

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
        """Add a network interface; IPv6 addresses carry their prefix length (``/64``)."""
        db = self.pool.db
        with self.pool.lock:
            number = len(db.refs("host", host, "PIFs"))
            label = f"{db.text('host', host, 'uuid')} {number}"
            return self._add(
                "PIF",
                label,
                {
                    "host": host,
                    "network": network,
                    "device": f"eth{number}",
                    "MAC": f"52:54:00:00:{len(db.records('PIF')):02x}:{number:02x}",
                    "MTU": 1500,
                    "VLAN": -1,
                    "physical": True,
                    "currently_attached": attached,
                    "ip_configuration_mode": "Static" if ip else "None",
                    "IP": ip,
                    "netmask": "255.0.0.0" if ip else "",
                    "ipv6_configuration_mode": "Static" if ipv6 else "None",
                    "IPv6": [*ipv6],
                    "primary_address_type": "IPv4",
                    "management": management,
                    "managed": True,
                },
            )

    def add_sr(  # noqa: PLR0913 (an SR has that many properties)
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
        """Add an SR with a PBD for each host.

        Args:
            name: its label.
            type: a key of ``state.PLUGINS``; tells whether changes are tracked.
            hosts: that have it attached.
            detached: that have a PBD which is not.
            size: in bytes.
            granularity: sizes of its disks are multiples of it; 2 MiB is VHD's.
            sector: of its disks, in bytes.
        """
        pool = self.pool
        with pool.lock:
            tools = type == "iso" and "tools" in name.lower()
            sr = self._add(
                "SR",
                name,
                {
                    "name_label": name,
                    "type": type,
                    "content_type": "iso" if type == "iso" else "user",
                    "shared": PLUGINS[type].shared and len([*hosts, *detached]) > 1,
                    "physical_size": size,
                    "is_tools_sr": tools,
                },
            )
            pool.geometry[sr] = Geometry(granularity, sector)
            for host in (*hosts, *detached):
                self._add(
                    "PBD",
                    f"{pool.db.text('host', host, 'uuid')} {sr}",
                    {
                        "host": host,
                        "SR": sr,
                        "currently_attached": host in hosts,
                        "device_config": {"location": f"/srv/{name}"},
                    },
                )
            pool.db.set("SR", sr, allowed_operations=operations.allowed_on_sr(pool, sr))
            self._set_default_sr(sr)
            return sr

    def add_vdi(
        self,
        sr: str,
        name: str,
        *,
        size: int,
        cbt: bool = False,
        raw: bool = False,
        fields: Mapping[str, Value] | None = None,
    ) -> str:
        """Add an empty VDI; its contents are written through ``pool.disk(ref).write``.

        Args:
            sr: where.
            name: its label.
            size: in bytes, rounded up as the SR does.
            cbt: track changes from now on.
            raw: not a VHD: cannot be tracked.
            fields: of the record: type, sharable, read_only, other_config, tags, …
        """
        pool = self.pool
        with pool.lock:
            ref, uuid = self._identity("VDI", name)
            values: dict[str, Value] = {"name_label": name, "virtual_size": size}
            if raw:
                values["sm_config"] = {"type": "raw"}
            vdi = volumes.add(pool, sr, {**values, **(fields or {})}, ref=ref, uuid=uuid)
            if cbt:
                pool.storage.enable_cbt(uuid, active=False)
                pool.db.set("VDI", vdi, cbt_enabled=True)
            return vdi

    def add_vm(
        self,
        name: str,
        *,
        running_on: str = "",
        template: bool = False,
        memory: int = 1 << 30,
        fields: Mapping[str, Value] | None = None,
    ) -> str:
        """Add a VM; ``start`` starts it on ``running_on`` once its VBDs are there."""
        with self.pool.lock:
            ref, uuid = self._identity("VM", name)
            values: dict[str, Value] = {
                "name_label": name,
                "is_a_template": template,
                "memory_target": memory,
                "memory_static_max": memory,
                "memory_dynamic_max": memory,
                "memory_dynamic_min": memory,
                "affinity": running_on or NULL,
                "actions_after_shutdown": "destroy",
                "actions_after_reboot": "restart",
                "actions_after_crash": "restart",
                "HVM_boot_policy": "BIOS order",
                "platform": {"viridian": "false"},
                **(fields or {}),
            }
            vm = vms.add(self.pool, values, ref=ref, uuid=uuid)
            self._running_on[vm] = running_on
            return vm

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
        """Add a VBD; ``vdi`` is "" for an empty drive."""
        pool = self.pool
        with pool.lock:
            label = f"{pool.db.text('VM', vm, 'uuid')} {userdevice}"
            ref, uuid = self._identity("VBD", label)
            values: dict[str, Value] = {
                "VM": vm,
                "VDI": vdi or NULL,
                "userdevice": userdevice,
                "type": type,
                "mode": "RO" if type == "CD" else mode,
                "bootable": bootable,
            }
            return attachments.create(pool, values, ref=ref, uuid=uuid)

    def add_vif(self, vm: str, network: str, *, device: str, mac: str) -> str:
        """Add a network card to a VM."""
        with self.pool.lock:
            label = f"{self.pool.db.text('VM', vm, 'uuid')} {device}"
            return self._add(
                "VIF",
                label,
                {
                    "VM": vm,
                    "network": network,
                    "device": device,
                    "MAC": mac,
                    "MTU": 1500,
                    "locking_mode": "network_default",
                },
            )

    def start(self, vm: str) -> None:
        """Start a VM on its ``running_on`` host."""
        vms.start_on_host(self.pool, vm, self._running_on[vm])

    def snapshot(self, vm: str, name: str, *, taken: str = "20260101T000000Z") -> str:
        """Take a VM snapshot with derived uuids, as if at ``taken`` (``20260101T000000Z``)."""
        pool = self.pool
        call = Call(pool, "VM.snapshot", pool.master, "", {"new_name": name})
        label = f"{pool.db.text('VM', vm, 'uuid')} {name}"
        moment = Timestamp(f"{taken[:4]}{taken[4:8]}T{taken[9:11]}:{taken[11:13]}:{taken[13:15]}Z")
        return snapshots.take_snapshot(
            call, vm, names=lambda kind: self._identity(kind, label), at=moment
        )

    def _set_default_sr(self, sr: str) -> None:
        """Make the first SR that takes disks the pool's default."""
        db = self.pool.db
        known_default = known(db.text("pool", db.only("pool"), "default_SR"))
        if self.pool.plugin(sr).disks and not known_default:
            db.set("pool", db.only("pool"), default_SR=sr)

    def _add(self, kind: str, label: str, values: Mapping[str, Value]) -> str:
        ref, uuid = self._identity(kind, label)
        return self.pool.db.create(kind, ref, {**values, "uuid": uuid})

    def _identity(self, kind: str, label: str) -> tuple[str, str]:
        """Return the ref and uuid of the next object with this label."""
        key = f"{self._seed}\0{kind}\0{label}"
        self._labels[key] += 1
        name = f"{key}\0{self._labels[key]}".encode("utf-8", "surrogatepass").hex()
        return f"OpaqueRef:{uuids.uuid5(_SPACE, f'ref {name}')}", str(uuids.uuid5(_SPACE, name))


def _features(kind: str) -> dict[str, Value]:
    plugin = PLUGINS[kind]
    names = ["SR_PROBE", "SR_UPDATE", "VDI_ATTACH", "VDI_DETACH", "VDI_ACTIVATE", "VDI_DEACTIVATE"]
    if plugin.disks:
        names += ["VDI_CREATE", "VDI_DELETE", "VDI_RESIZE", "VDI_SNAPSHOT", "VDI_CLONE"]
        names += ["VDI_RESET_ON_BOOT", "VDI_UPDATE", "VDI_GENERATE_CONFIG"]
    if plugin.cbt:
        names.append("VDI_CONFIG_CBT")
    return dict.fromkeys(names, 1)
