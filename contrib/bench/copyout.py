"""Copy one NBD export into an image as a full sync does, and tell how long that took.

A process of its own for contrib/bench/sync, so that its memory and processor time are those of the
production path alone: nbd.open_export, Copier, and Image with digests and fsync.

    python copyout.py '{"host": "127.0.0.1", "port": 10809, "export_name": "", …}' DIR

The keys of the JSON are the fields of nbd.NbdAddress, and connections, size, request, depth,
writers. Prints one line of JSON.
"""

import json
import sys
import time
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import trio

from cbtfs import copier, nbd
from cbtfs.extents import Extent
from cbtfs.folder import Folder
from cbtfs.image import Image
from cbtfs.imagefiles import ImageFiles


async def copy(address: nbd.NbdAddress, image: Image, *, connections: int) -> copier.Tally:
    """Copy all of the export and bring it to disk."""

    def connect() -> AbstractAsyncContextManager[nbd.Export]:
        return nbd.open_export(address)

    def advanced(read: int, written: int) -> None:
        del read, written

    copying = copier.Copier(connect, image, connections=connections, advanced=advanced)
    tally = await copying.copy([Extent(0, image.size)])
    await trio.to_thread.run_sync(image.finish)
    return tally


def main() -> None:
    """Copy what the command line names."""
    told, directory = json.loads(sys.argv[1]), Path(sys.argv[2])
    size, connections = told.pop("size"), told.pop("connections")
    for name in ("request", "depth", "writers"):  # to try other figures than ours
        if told.get(name):
            setattr(copier, name.upper(), told[name])
        told.pop(name, None)
    address = nbd.NbdAddress(**told)
    with Folder.open(directory) as folder:
        files = ImageFiles(folder, "cbtfs.raw", "cbtfs.b3")
        begun = time.monotonic()
        with Image.create(files, size=size) as image:
            tally = trio.run(lambda: copy(address, image, connections=connections))
        seconds = time.monotonic() - begun
    sys.stdout.write(json.dumps({"copying": round(seconds, 3), "written": tally.written}) + "\n")


main()
