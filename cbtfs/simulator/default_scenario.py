"""The default scenario: a small pool with one of everything that makes life hard.

=============  ========  ===========================================================================
VM             state     disks
=============  ========  ===========================================================================
web1           running   xvda 512 MiB, MBR, ext4 full of files, CBT on; xvdb 256 MiB, GPT, ext4;
                         a CD; two snapshots
db1            running   xvda 512 MiB, LVM (group vg_db1: root and data, ext4 each), CBT on
app1           running   xvda on 4096-byte sectors, xvdb of an odd size, xvdc without CBT, xvdd raw
mail           halted    xvda 64 MiB on the second host's local storage
kiosk          halted    xvda that is reset at each boot
node-a node-b  halted    one disk in common, sharable
twin  twin     halted    equal names of VM and disk
…              halted    names that are a trap; each with one small disk
=============  ========  ===========================================================================

Besides: the template ``Debian 12`` with a hidden base copy, an ISO, the tools ISO, two detached
disks (one 8 MiB and 12 KiB long), and a VDI of type ``metadata``.
"""

import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from . import filesystem, lvm, partitions
from .builder import Builder
from .disk import Disk
from .filesystem import Tree, noise
from .lvm import LogicalVolume
from .topology import Topology

KiB = 1 << 10
MiB = 1 << 20

SEED = uuid.uuid5(uuid.NAMESPACE_DNS, "default.sim")
ODD_SIZE = 8 * MiB + 12 * KiB

HOSTILE_NAMES = (
    "../../etc",
    "a/b",
    "",
    ".",
    "..",
    "line\nbreak",
    "colour \x1b[31mred\u009b0m",
    "\u202egnorw yaw",
    "latest",
    "snapshots",
    "x" * 300,
    "Grüße ☃ " + "é" * 140,
    "-rf *",
    "$(reboot)",
)
"""Names of VMs that are a trap, each also the name of the VM's disk."""

VOLUMES = (LogicalVolume("root", 0, 40), LogicalVolume("data", 40, 60))
"""The logical volumes of db1."""


def populate(builder: Builder, topology: Topology) -> None:
    """Add the VMs and disks of the default scenario."""
    with tempfile.TemporaryDirectory(prefix="cbtfs-sim-") as folder:
        scratch = Path(folder)
        _web1(builder, topology, scratch)
        _db1(builder, topology, scratch)
    _app1(builder, topology)
    _halted(builder, topology)
    _template(builder, topology)
    _detached(builder, topology)
    for name in HOSTILE_NAMES:
        _small_vm(builder, topology.shared, name, disk=name)


def web1_files(version: int) -> Tree:
    """Return the files on web1's system disk, before (1) or after (2) its upgrade."""
    sizes = (0, 1, 4095, 4096, 4097, 64 * KiB, 200_001, MiB, 5 * MiB)
    tree: dict[str, bytes | str] = {
        "etc/hostname": b"web1\n",
        "etc/issue": f"simulated system {version}\n".encode(),
        "etc/fstab": b"/dev/xvda1 / ext4 defaults 0 1\n/dev/xvdb1 /srv ext4 defaults 0 2\n",
        "var/www/index.html": f"<h1>web1, version {version}</h1>\n".encode(),
        "var/www/current": f"releases/{version}",
        "usr/share/grüße/weiß.txt": "Zwölf Boxkämpfer\n".encode(),
        **{f"usr/lib/file-{size}.bin": noise(f"web1 {size}", size) for size in sizes},
        **{f"usr/share/doc/{n:03d}.txt": f"document {n}\n".encode() * n for n in range(200)},
    }
    for release in range(1, version + 1):
        tree[f"var/www/releases/{release}/app.bin"] = noise(f"release {release}", 12 * MiB)
    return filesystem.with_checksums(tree)


def web1_data_files() -> Tree:
    """Return the files on web1's data disk."""
    tree = {f"photos/{n:02d}.raw": noise(f"photo {n}", 777_777) for n in range(16)}
    return filesystem.with_checksums({**tree, "lost/and/found.txt": b"here\n"})


def db1_files(volume: str) -> Tree:
    """Return the files in one of db1's logical volumes."""
    size = 2 * MiB if volume == "root" else 9 * MiB
    tree = {"etc/hostname": b"db1\n", f"{volume}.bin": noise(f"db1 {volume}", size)}
    return filesystem.with_checksums(tree)


def _web1(builder: Builder, topology: Topology, scratch: Path) -> None:
    root = builder.add_vdi(topology.shared, "web1 root", size=512 * MiB, cbt=True)
    data = builder.add_vdi(topology.shared, "web1 data", size=256 * MiB)
    iso = builder.add_vdi(
        topology.isos, "installer.iso", size=4 * MiB, fields={"read_only": True, "type": "user"}
    )
    builder.pool.disk(iso).write(32 * KiB, b"\x01CD001\x01\0" + noise("iso", 60 * KiB))
    vm = builder.add_vm("web1", running_on=topology.hosts[0], fields={"tags": ["gold", "web"]})
    builder.add_vbd(vm, root, userdevice="0", bootable=True)
    builder.add_vbd(vm, data, userdevice="1")
    builder.add_vbd(vm, iso, userdevice="3", type="CD", mode="RO")
    builder.add_vif(vm, topology.management, device="0", mac="02:5e:00:00:00:01")
    disk = builder.pool.disk(root)
    _write(disk, partitions.mbr(size=disk.size, disk_id=0x5E1F0001))
    _write(disk, _web1_system(scratch, version=1))
    disk = builder.pool.disk(data)
    _write(disk, partitions.gpt(size=disk.size, seed=SEED))
    size = partitions.partition_size(disk.size, table="gpt")
    image = _ext4(scratch, "web1-data", size=size, tree=web1_data_files())
    _write(disk, filesystem.runs(image, offset=partitions.ALIGNMENT))
    builder.start(vm)
    builder.snapshot(vm, "before upgrade", taken="20251010T020000Z")
    _write(builder.pool.disk(root), _web1_system(scratch, version=2))
    builder.snapshot(vm, "nightly", taken="20251011T020000Z")
    builder.pool.disk(data).write(200 * MiB, noise("written after the last snapshot", 128 * KiB))


def _web1_system(scratch: Path, *, version: int) -> Iterator[tuple[int, bytes]]:
    """Yield what upgrading to ``version`` writes to web1's system disk."""
    size = partitions.partition_size(512 * MiB, table="mbr")
    image = _ext4(scratch, f"web1-{version}", size=size, tree=web1_files(version))
    written = dict(filesystem.runs(image, offset=partitions.ALIGNMENT))
    if version == 1:
        yield from written.items()
        return
    before = dict(filesystem.runs(scratch / f"web1-{version - 1}", offset=partitions.ALIGNMENT))
    for offset in sorted(before.keys() | written.keys()):
        new = written.get(offset) or bytes(len(before[offset]))
        if before.get(offset) != new:
            yield offset, new


def _db1(builder: Builder, topology: Topology, scratch: Path) -> None:
    vdi = builder.add_vdi(topology.shared, "db1 disk", size=512 * MiB, cbt=True)
    disk = builder.pool.disk(vdi)
    group = lvm.physical_volume(
        size=disk.size, group="vg_db1", volumes=VOLUMES, seed=SEED, created=filesystem.EPOCH
    )
    _write(disk, group)
    for volume in VOLUMES:
        image = _ext4(scratch, f"db1-{volume.name}", size=volume.size, tree=db1_files(volume.name))
        _write(disk, filesystem.runs(image, offset=volume.offset))
    vm = builder.add_vm("db1", running_on=topology.hosts[1], fields={"tags": ["gold"]})
    builder.add_vbd(vm, vdi, userdevice="0", bootable=True)
    builder.add_vif(vm, topology.management, device="0", mac="02:5e:00:00:00:02")
    builder.start(vm)


def _app1(builder: Builder, topology: Topology) -> None:
    vm = builder.add_vm("app1", running_on=topology.hosts[0])
    disks = (
        builder.add_vdi(topology.sectors_4k, "app1 4k", size=32 * MiB, cbt=True),
        builder.add_vdi(topology.fine, "app1 odd", size=ODD_SIZE, cbt=True),
        builder.add_vdi(topology.without_cbt, "app1 linstor", size=16 * MiB),
        builder.add_vdi(topology.half_attached, "app1 raw", size=16 * MiB, raw=True),
    )
    for device, vdi in enumerate(disks):
        builder.add_vbd(vm, vdi, userdevice=str(device), bootable=device == 0)
        disk = builder.pool.disk(vdi)
        disk.write(0, noise(f"app1 {device}", 300 * KiB))
        disk.write(disk.size - 8 * KiB, noise(f"app1 {device} end", 8 * KiB))
    builder.start(vm)


def _halted(builder: Builder, topology: Topology) -> None:
    _small_vm(builder, topology.local[1], "mail", disk="mail root", size=64 * MiB)
    _small_vm(builder, topology.half_attached, "kiosk", disk="kiosk root", on_boot="reset")
    _small_vm(builder, topology.shared, "twin", disk="twin disk")
    _small_vm(builder, topology.shared, "twin", disk="twin disk")
    common = builder.add_vdi(topology.shared, "quorum", size=4 * MiB, fields={"sharable": True})
    builder.pool.disk(common).write(0, noise("quorum", 64 * KiB))
    for name in ("node-a", "node-b"):
        builder.add_vbd(builder.add_vm(name), common, userdevice="0")


def _template(builder: Builder, topology: Topology) -> None:
    vdi = builder.add_vdi(topology.local[0], "Debian 12 root", size=32 * MiB)
    builder.pool.disk(vdi).write(0, noise("template", MiB))
    template = builder.add_vm("Debian 12", template=True)
    builder.add_vbd(template, vdi, userdevice="0", bootable=True)
    # turns the template's disk into a hidden base copy with two children
    builder.snapshot(template, "golden image", taken="20251009T120000Z")


def _detached(builder: Builder, topology: Topology) -> None:
    archive = builder.add_vdi(topology.local[0], "old archive", size=128 * MiB)
    builder.pool.disk(archive).write(MiB, noise("archive", 3 * MiB))
    odd = builder.add_vdi(topology.fine, "odd size", size=ODD_SIZE)
    builder.pool.disk(odd).write(ODD_SIZE - 4 * KiB, noise("odd", 4 * KiB))
    tools = {"is_tools_iso": True, "read_only": True}
    builder.add_vdi(topology.tools, "guest-tools.iso", size=2 * MiB, fields={**tools})
    builder.add_vdi(topology.shared, "Metadata for DR", size=4 * MiB, fields={"type": "metadata"})


def _small_vm(
    builder: Builder, sr: str, name: str, *, disk: str, size: int = 4 * MiB,
    on_boot: str = "persist",
) -> None:  # fmt: skip
    vdi = builder.add_vdi(sr, disk, size=size, fields={"on_boot": on_boot})
    builder.pool.disk(vdi).write(64 * KiB, noise(f"small {name}", 100 * KiB))
    vm = builder.add_vm(name)
    builder.add_vbd(vm, vdi, userdevice="0", bootable=True)


def _ext4(scratch: Path, name: str, *, size: int, tree: Tree) -> Path:
    image = scratch / name
    seed = uuid.uuid5(SEED, name.partition("-")[0] + name.rpartition("-")[2].rstrip("12"))
    filesystem.make_ext4(image, size=size, label=name[:16], seed=seed, tree=tree)
    return image


def _write(disk: Disk, pieces: Iterator[tuple[int, bytes]]) -> None:
    for offset, data in pieces:
        disk.write(offset, data)
