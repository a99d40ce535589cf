"""What an increment costs the pool and our memory: what changed and a sample, not the disk's size.

What was read is what the hosts have sent, by their own count.
"""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cbtfs import units
from cbtfs.sample import Sample

from . import bigdisks
from .bigdisks import BLOCK, Cost
from .commands import Shell

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not Path("/usr/bin/time").exists(), reason="needs GNU time"),
]

SIZES = {"small": units.GiB, "middle": 16 * units.GiB, "huge": 16 * units.TiB}
SHARES = {"nothing": 0.0, "a thousandth": 0.001, "a hundredth": 0.01}

MEMORY = 256 * units.MiB


def allowed(size: int, *, changed: int) -> float:
    """Return the bytes to be read of a disk of which ``changed`` blocks changed.

    These, a sample of the others, and a little that lies between and comes along.
    """
    return 1.1 * (changed + Sample().count(size // BLOCK - changed)) * BLOCK


@pytest.fixture(scope="module")
def shell(reflink_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A pool with an empty disk of each size, and a store that can have files of 16 TiB."""
    store = reflink_root / "increment-cost"
    with bigdisks.running(tmp_path_factory.mktemp("big") / "pool", SIZES) as pool:
        yield Shell(pool, store)
    shutil.rmtree(store, ignore_errors=True)


# ── By what changed ──────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def first(shell: Shell) -> Cost:
    return bigdisks.sync(shell, "middle")


@pytest.fixture(scope="module")
def increments(shell: Shell, first: Cost) -> dict[str, Cost]:
    """The cost of an increment of 16 GiB, by what changed."""
    assert first.disk.method == "full"
    rng = random.Random(3)
    costs: dict[str, Cost] = {}
    for name, share in SHARES.items():
        blocks = int(share * SIZES["middle"] / BLOCK)
        bigdisks.write_scattered(shell.pool, "middle", size=SIZES["middle"], blocks=blocks, rng=rng)
        costs[name] = bigdisks.sync(shell, "middle")
    return costs


def test_of_an_empty_disk_only_a_sample_is_read(first: Cost) -> None:
    assert first.served == first.disk.blocks_sampled * BLOCK
    assert first.served <= allowed(SIZES["middle"], changed=0)


@pytest.mark.parametrize("changed", SHARES)
def test_what_changed_is_read_and_a_sample(increments: dict[str, Cost], changed: str) -> None:
    cost = increments[changed]
    blocks = int(SHARES[changed] * SIZES["middle"] / BLOCK)

    assert cost.disk.method == "incremental"
    assert cost.disk.bytes_changed == blocks * BLOCK
    assert cost.served == (blocks + cost.disk.blocks_sampled) * BLOCK
    assert cost.served <= allowed(SIZES["middle"], changed=blocks)


@pytest.mark.parametrize("changed", SHARES)
def test_an_increment_needs_little_memory(increments: dict[str, Cost], changed: str) -> None:
    assert increments[changed].rss < MEMORY


# ── By the size of the disk ──────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def unchanged(shell: Shell) -> dict[str, Cost]:
    """The cost of an increment without changes, by the disk."""
    costs: dict[str, Cost] = {}
    for name in ("small", "huge"):
        bigdisks.seed(shell, name)
        costs[name] = bigdisks.sync(shell, name)
        assert costs[name].disk.method == "incremental"
    return costs


def test_without_changes_the_calls_are_the_same_for_16_tib(unchanged: dict[str, Cost]) -> None:
    assert unchanged["huge"].calls == unchanged["small"].calls


@pytest.mark.parametrize("name", ["small", "huge"])
def test_without_changes_only_a_sample_is_read(unchanged: dict[str, Cost], name: str) -> None:
    assert unchanged[name].served == unchanged[name].disk.blocks_sampled * BLOCK
    assert unchanged[name].served <= allowed(SIZES[name], changed=0) < 20 * units.MiB


def test_16_tib_without_changes_need_little_memory(unchanged: dict[str, Cost]) -> None:
    assert unchanged["huge"].rss < MEMORY


@pytest.mark.usefixtures("unchanged")
def test_16_tib_with_a_few_changes_need_little_memory(shell: Shell) -> None:
    size = SIZES["huge"]
    written = bigdisks.write_scattered(
        shell.pool, "huge", size=size, blocks=300, rng=random.Random(5)
    )

    cost = bigdisks.sync(shell, "huge")

    assert cost.served <= allowed(size, changed=len(written))
    assert cost.rss < MEMORY
    assert bigdisks.holds(shell.image("huge", "xvda"), written)
