"""Fixtures for all tests: directories to put stores in, pools, and a store with its commands."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cbtfs import image, store as stores
from cbtfs.store import Store

from .program import Program, untouched_process
from .simulated import RunningPool, running_pool

PARTS = {
    "long": {
        "test_agreement",
        "test_budget",
        "test_clean",
        "test_distrust",
        "test_events",
        "test_faults",
        "test_follow",
        "test_follow_many",
        "test_mount_faults",
        "test_restore_pool",
    },
    "deep": {
        "test_cancelled",
        "test_draft",
        "test_history",
        "test_kill_matrix",
        "test_killed",
        "test_killpoints",
        "test_sync",
        "test_sync_many",
    },
}
"""Modules whose tests mostly wait for something, and those that try one thing in many ways: each
part takes about as long as all others together, and contrib/test runs the three side by side."""

pytest.register_assert_rewrite(
    "tests.history_sync", "tests.history_world", "tests.killmatrix", "tests.faulted"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in ``PARTS``."""
    for item in items:
        for part, modules in PARTS.items():
            if item.path.stem in modules:
                item.add_marker(getattr(pytest.mark, part))


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPool]:
    """A simulated pool that the tests of a module share; each puts it in good order first."""
    with running_pool(tmp_path_factory.mktemp("pool")) as pool:
        yield pool


@pytest.fixture(scope="session")
def reflink_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory where FICLONE works: the usual one, or an XFS image mounted for the session."""
    root = tmp_path_factory.mktemp("reflink")
    if image.reflink_supported(root):
        yield root
        return
    if os.geteuid() != 0 or shutil.which("mkfs.xfs") is None:
        pytest.skip("no reflinks here: needs root and xfsprogs to mount an XFS image")
    disk = in_memory(512 << 20) or root / "xfs.img"
    mounted = root / "mounted"
    mounted.mkdir()
    with disk.open("wb") as file:
        file.truncate(512 << 20)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", disk], check=True)
    done = subprocess.run(["mount", "-o", "loop", disk, mounted], check=False)
    if done.returncode != 0:
        pytest.skip("no reflinks here: the kernel cannot mount an XFS image")
    try:
        yield mounted
    finally:
        subprocess.run(["umount", mounted], check=True)
        disk.unlink()


def in_memory(size: int) -> Path | None:
    """Return a new file where no disk is waited for, if there is room; tests flush a lot."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or shutil.disk_usage(memory).free < 4 * size:
        return None
    handle, path = tempfile.mkstemp(prefix="cbtfs-test-", suffix=".img", dir=memory)
    os.close(handle)
    return Path(path)


@pytest.fixture
def reflink_dir(reflink_root: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A fresh directory where FICLONE works."""
    path = reflink_root / f"test-{abs(hash(request.node.nodeid)):x}"
    path.mkdir()
    yield path
    shutil.rmtree(path)


@pytest.fixture(params=["usual", "reflink"])
def any_dir(request: pytest.FixtureRequest) -> Path:
    """A fresh directory, once on the usual file system and once where FICLONE works."""
    name = "tmp_path" if request.param == "usual" else "reflink_dir"
    path = request.getfixturevalue(name)
    assert isinstance(path, Path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where ``store`` and ``cbtfs`` have a store."""
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    """An empty store."""
    with stores.open_store(root) as opened:
        yield opened


@pytest.fixture
def cbtfs(capsys: pytest.CaptureFixture[str], root: Path) -> Iterator[Program]:
    """The command line for that store, in this process, without a pool."""
    config = root.parent / "cbtfs.toml"
    config.touch()
    with untouched_process():
        yield Program(capsys, "--config", str(config), "--store", str(root))
