"""A pool mounted for a test, and the tools of a user on it."""

import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from cbtfs import mount, mountpoint
from cbtfs.disks import Pool
from cbtfs.follow import Source
from cbtfs.inventory import Inventory
from cbtfs.mount import MountOptions, View


@asynccontextmanager
async def mounted(
    pool: Pool,
    inventory: Inventory,
    path: Path,
    *,
    options: str = "linger=60s",
    backups: mount.Backups | None = None,
    source: Source | None = None,
) -> AsyncGenerator[Path, None]:
    """Mount ``pool`` at ``path``, made if need be; unmounted on exit."""
    await trio.Path(path).mkdir(exist_ok=True)
    ready = trio.Event()

    async def serve() -> None:
        await mount.serve(
            pool,
            view=View(inventory, backups=backups, source=source),
            mountpoint=path,
            options=MountOptions.parse(options),
            ready=ready.set,
        )

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        await ready.wait()
        try:
            yield path
        finally:
            nursery.cancel_scope.cancel()
    assert mountpoint.find(path) is None


async def run(*command: str | Path) -> str:
    """Run a tool without blocking the mount, and return what it printed."""
    done = await trio.run_process(
        [str(word) for word in command], capture_stdout=True, capture_stderr=True, check=False
    )
    if done.returncode != 0:
        raise subprocess.CalledProcessError(
            done.returncode, command, done.stdout, done.stderr.decode(errors="replace")
        )
    return done.stdout.decode()


async def read(path: Path) -> bytes:
    """Read a file without blocking the mount."""
    return await trio.Path(path).read_bytes()
