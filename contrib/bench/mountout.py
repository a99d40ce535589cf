"""Mount NBD exports as a pool's snapshots are mounted.

A process of its own for contrib/bench/mount, where there is a server but no pool: mount.serve with
all that it makes (disks, cache, file system), over a pool that is only an address.

    python mountout.py '{"address": {"host": "127.0.0.1", "port": 10809, …}, "options": "",
        "disks": {"disk.raw": 2147483648}}' MOUNTPOINT

``address`` has the fields of nbd.NbdAddress but the export's name, ``options`` are those of
``cbtfs mount -o``, and ``disks`` are the exports with their sizes in bytes. The first is
``by-uuid/00000000-0000-0000-0000-000000000001.raw``, and so on. Ends when it is unmounted.
"""

import json
import sys
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

import trio

from cbtfs import errors, mount, nbd
from cbtfs.bitmap import ChangeBitmap
from cbtfs.follow import View
from cbtfs.inventory import Inventory, Owned
from cbtfs.records import VDI, Pool


class Exports:
    """As much of a pool as the mount of snapshots needs: a reference is the name of an export."""

    def __init__(self, address: nbd.NbdAddress) -> None:
        self._address = address

    def open_export(self, vdi_ref: str) -> AbstractAsyncContextManager[nbd.Export]:
        """Connect to an export."""
        return nbd.open_export(replace(self._address, export_name=vdi_ref))

    async def allocated(self, vdi_ref: str, *, size: int) -> ChangeBitmap:
        """Raise AllocationUnknown: an NBD server has no tables to show."""
        raise errors.AllocationUnknown(f"nobody knows of {vdi_ref}, {size} bytes")

    async def snapshot_vdi(self, vdi_ref: str, *, name: str, owner: Owned) -> str:
        """Never happens: there are snapshots only."""
        del name, owner
        raise NotImplementedError(vdi_ref)

    async def destroy_vdi(self, vdi_ref: str) -> None:
        """Never happens either."""
        raise NotImplementedError(vdi_ref)


def inventory_of(disks: Mapping[str, int]) -> Inventory:
    """Return an inventory of snapshots with these names and sizes in bytes."""
    vdis = {
        name: VDI(
            ref=name,
            uuid=f"00000000-0000-0000-0000-{number:012x}",
            name=name,
            size=size,
            used=size,
            is_a_snapshot=True,
        )
        for number, (name, size) in enumerate(disks.items(), start=1)
    }
    return Inventory(pool=Pool(uuid="00000000-0000-0000-0000-000000000000"), vdis=vdis)


async def serve(
    address: nbd.NbdAddress, disks: Mapping[str, int], mountpoint: Path, options: str
) -> None:
    """Mount ``disks`` until they are unmounted."""
    await mount.serve(
        Exports(address),
        view=View(inventory_of(disks)),
        mountpoint=mountpoint,
        options=mount.MountOptions.parse(options),
    )


def main() -> None:
    """Mount what the command line names."""
    told, mountpoint = json.loads(sys.argv[1]), Path(sys.argv[2])
    address = nbd.NbdAddress(export_name="", **told["address"])
    trio.run(serve, address, told["disks"], mountpoint, told["options"])


main()
