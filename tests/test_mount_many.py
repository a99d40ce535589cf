"""Many readers of many disks at the same time: what they get, and what it costs."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from cbtfs import cache, connections, units

from .faulted import bytes_served, counters_of
from .simulated import RunningPool
from .smallvm import running_small
from .test_mounted import User, run

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(600)]

DISKS = 64
SIZE = 8 * units.MiB
BEYOND = 256 * units.MiB
"""Memory that a mount may take beyond its cache."""


@dataclass(frozen=True)
class Many:
    """A pool with many disks: the digest of each by uuid."""

    pool: RunningPool
    digests: dict[str, str]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Many]:
    """Snapshots of four disks, which were written anew before each: chains have their limits."""
    devices = {"v 0": "xvda", "v 1": "xvdb", "v 2": "xvdc", "v 3": "xvdd"}
    digests: dict[str, str] = {}
    with running_small(tmp_path_factory.mktemp("sim") / "pool", sizes=[SIZE] * 4) as small:
        for number in range(DISKS):
            name = f"v {number % 4}"
            content = random.Random(number).randbytes(SIZE)
            guest = small.pool.open_guest("v", devices[name])
            guest.pwrite(content, 0)
            guest.shutdown()
            snapshot = small.api.text("VDI.snapshot", small.disk(name), {})
            uuid = small.api.text("VDI.get_uuid", snapshot)
            digests[uuid] = hashlib.sha256(content).hexdigest()
        yield Many(small.pool, digests)


@pytest.fixture
def user(many: Many, tmp_path: Path) -> User:
    return User(many.pool, tmp_path)


def peak_memory(pid: int) -> int:
    """Return the most memory that a process ever had, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    (peak,) = (int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return peak * units.KiB


def most_connections(pool: RunningPool) -> int:
    """Return how many NBD connections there were at a time, at most, over all hosts."""
    nbd = msgspec.convert(counters_of(pool)["nbd"], dict[str, object])
    return sum(msgspec.convert(nbd["peak"], dict[str, int]).values())


@pytest.mark.parametrize("options", ["cache=96M", "cache=1M"])
def test_many_disks_are_read_at_once_byte_for_byte_and_once(
    many: Many, user: User, options: str
) -> None:
    with user.mounted(options) as top:
        many.pool.control("reset-counters")

        def digest(uuid: str) -> str:
            return run("sha256sum", top / f"by-uuid/{uuid}.raw").split()[0]

        with ThreadPoolExecutor(DISKS) as readers:
            found = dict(zip(many.digests, readers.map(digest, many.digests), strict=True))

        assert found == many.digests
        assert bytes_served(many.pool) <= 1.1 * DISKS * SIZE
        assert most_connections(many.pool) <= connections.LIMIT
        limit = units.parse_size(options.removeprefix("cache="))
        assert peak_memory(user.pid) < limit + BEYOND


def test_a_read_somewhere_fetches_no_more_than_a_chunk(many: Many, user: User) -> None:
    rng = random.Random(1)
    with user.mounted("tune=off") as top:
        many.pool.control("reset-counters")
        for uuid in list(many.digests)[:8]:
            read_at(top / f"by-uuid/{uuid}.raw", [rng.randrange(SIZE // 4096) for _ in range(8)])

        assert bytes_served(many.pool) <= 8 * 8 * cache.CHUNK


def read_at(path: Path, blocks: Sequence[int]) -> None:
    """Read a file at some of its blocks of 4 KiB."""
    with path.open("rb", buffering=0) as file:
        for block in blocks:
            file.seek(block * 4096)
            assert len(file.read(4096)) == 4096
