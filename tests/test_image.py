"""Image: clones, sparse writes, digests."""

import ctypes
import errno
import os
import random
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import blake3
import pytest

from cbtfs import digests, errors, image, imagefiles, sparse
from cbtfs.folder import Folder
from cbtfs.image import Image
from cbtfs.imagefiles import ImageFiles

BLOCK = 64 << 10
ODD = 2 * BLOCK + 512
"""Size of a disk that ends within its third block."""


def noise(length: int, *, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def b3(data: bytes) -> bytes:
    return blake3.blake3(data).digest(length=16) if any(data) else bytes(16)


def expected_digests(content: bytes) -> bytes:
    return b"".join(b3(content[at : at + BLOCK]) for at in range(0, len(content), BLOCK))


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def check(files: ImageFiles, content: bytes, root: str) -> None:
    array = (files.folder.path / files.digests).read_bytes()
    assert files.path.read_bytes() == content
    assert array == expected_digests(content)
    assert root == blake3.blake3(array).hexdigest()


@pytest.fixture
def folder(any_dir: Path) -> Iterator[Folder]:
    with Folder.open(any_dir) as opened:
        yield opened


@pytest.fixture
def files(folder: Folder) -> ImageFiles:
    return ImageFiles(folder, "xvda.raw", "xvda.b3")


@pytest.fixture
def second(folder: Folder) -> ImageFiles:
    return ImageFiles(folder, "second.raw", "second.b3")


def make(files: ImageFiles, content: bytes) -> str:
    with Image.create(files, size=len(content)) as made:
        made.write(0, content)
        return made.finish()


def test_a_new_image_is_zeros_without_space(files: ImageFiles) -> None:
    with Image.create(files, size=64 * BLOCK) as made:
        root = made.finish()

    assert made.origin == "new"
    check(files, bytes(64 * BLOCK), root)
    assert allocated(files.path) == 0
    assert allocated(files.folder.path / "xvda.b3") == 0


def test_what_is_written_is_read_back_and_digested(files: ImageFiles) -> None:
    content = noise(5 * BLOCK)

    check(files, content, make(files, content))


def test_the_last_block_is_digested_at_its_true_length(files: ImageFiles) -> None:
    content = noise(ODD)

    check(files, content, make(files, content))


@pytest.mark.parametrize("size", [0, 1, 511, 512, BLOCK - 1, BLOCK, BLOCK + 1])
def test_any_size_will_do(files: ImageFiles, size: int) -> None:
    check(files, noise(size), make(files, noise(size)))


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_will_do(files: ImageFiles, kind: type) -> None:
    content = noise(BLOCK)
    with Image.create(files, size=BLOCK) as made:
        assert made.write(0, kind(content)) == BLOCK
        check(files, content, made.finish())


def test_zero_blocks_stay_holes(files: ImageFiles) -> None:
    content = noise(BLOCK) + bytes(6 * BLOCK) + noise(BLOCK)
    with Image.create(files, size=len(content)) as made:
        written = made.write(0, content)
        root = made.finish()

    assert written == 2 * BLOCK
    check(files, content, root)
    assert allocated(files.path) == 2 * BLOCK


def test_a_block_with_one_last_bit_is_not_zero(files: ImageFiles) -> None:
    content = bytes(BLOCK - 1) + b"\x01"

    check(files, content, make(files, content))


def test_writing_again_replaces(files: ImageFiles) -> None:
    with Image.create(files, size=2 * BLOCK) as made:
        made.write(0, noise(2 * BLOCK))
        made.write(BLOCK, bytes(BLOCK))
        root = made.finish()

    check(files, noise(2 * BLOCK)[:BLOCK] + bytes(BLOCK), root)
    assert allocated(files.path) == BLOCK


def test_zero_punches_image_and_digests(files: ImageFiles) -> None:
    with Image.create(files, size=ODD) as made:
        made.write(0, noise(ODD))
        made.zero(BLOCK, ODD - BLOCK)
        root = made.finish()

    check(files, noise(ODD)[:BLOCK] + bytes(ODD - BLOCK), root)


@pytest.mark.parametrize(
    ("offset", "length"),
    [(512, BLOCK), (0, 512), (-BLOCK, BLOCK), (2 * BLOCK, BLOCK), (BLOCK, ODD)],
)
def test_only_whole_blocks_of_the_disk_are_taken(
    files: ImageFiles, offset: int, length: int
) -> None:
    with Image.create(files, size=ODD) as made:
        with pytest.raises(errors.StoreError, match="whole blocks"):
            made.write(offset, noise(length))
        with pytest.raises(errors.StoreError, match="whole blocks"):
            made.zero(offset, length)


def test_threads_write_one_image(files: ImageFiles) -> None:
    content = noise(64 * BLOCK)
    with Image.create(files, size=len(content)) as made, ThreadPoolExecutor(4) as threads:
        list(
            threads.map(
                lambda at: made.write(at, content[at : at + BLOCK]), range(0, 64 * BLOCK, BLOCK)
            )
        )
        root = made.finish()

    check(files, content, root)


def test_an_existing_image_is_never_overwritten(files: ImageFiles) -> None:
    make(files, noise(BLOCK))

    with pytest.raises(errors.StoreError, match="exists already"):
        Image.create(files, size=BLOCK)
    assert files.path.read_bytes() == noise(BLOCK)


def test_an_image_without_room_for_its_digests_is_not_made(files: ImageFiles) -> None:
    before = open_files()
    (files.folder.path / "xvda.b3").touch()

    with pytest.raises(errors.StoreError, match=r"xvda\.b3: it exists already"):
        Image.create(files, size=BLOCK)
    assert open_files() == before


def test_a_failed_clone_leaves_no_files(
    files: ImageFiles, second: ImageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: int, target: int) -> bool:
        raise OSError(errno.EIO, "no")

    make(files, noise(BLOCK))
    monkeypatch.setattr(sparse, "reflink", fail)
    with pytest.raises(errors.StoreError, match="cannot create"):
        Image.clone(second, base=files, base_size=BLOCK, size=BLOCK)
    assert not second.path.exists()
    make(second, noise(BLOCK))


def test_a_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    with (tmp_path / "short").open("w+b") as file:
        file.write(b"abc")
        file.flush()
        with pytest.raises(OSError, match="ends early"):
            sparse.read_all(file.fileno(), 4, 0)


def test_a_clone_begins_as_its_base(files: ImageFiles, second: ImageFiles) -> None:
    content = noise(BLOCK) + bytes(20 * BLOCK) + noise(ODD, seed=2)
    make(files, content)

    with Image.clone(second, base=files, base_size=len(content), size=len(content)) as made:
        check(second, content, made.finish())
    assert allocated(second.path) < 5 * BLOCK


def test_a_change_in_a_clone_leaves_the_base_alone(files: ImageFiles, second: ImageFiles) -> None:
    base = noise(4 * BLOCK)
    root = make(files, base)

    with Image.clone(second, base=files, base_size=4 * BLOCK, size=4 * BLOCK) as made:
        made.write(BLOCK, noise(BLOCK, seed=2) + bytes(BLOCK))
        changed = made.finish()
    check(files, base, root)
    check(second, base[:BLOCK] + noise(BLOCK, seed=2) + bytes(BLOCK) + base[3 * BLOCK :], changed)


@pytest.mark.parametrize("grown", [ODD, ODD + 100, 3 * BLOCK, 3 * BLOCK + 7, 40 * BLOCK])
def test_a_grown_disk_ends_in_zeros(files: ImageFiles, second: ImageFiles, grown: int) -> None:
    """The old last block, once short, is longer now and needs another digest."""
    make(files, noise(ODD))

    with Image.clone(second, base=files, base_size=ODD, size=grown) as made:
        check(second, noise(ODD) + bytes(grown - ODD), made.finish())


def test_a_last_block_that_rotted_gets_no_new_digest(files: ImageFiles, second: ImageFiles) -> None:
    with Image.create(files, size=ODD) as made:
        made.write(0, noise(ODD))
        made.finish()
    with files.path.open("r+b") as raw:
        raw.seek(ODD - 5)
        raw.write(b"?")

    with pytest.raises(errors.ImageDamaged, match=r"the last block of .*xvda\.raw differs"):
        Image.clone(second, base=files, base_size=ODD, size=3 * BLOCK)
    assert not second.path.exists()


def test_a_clone_cannot_shrink(files: ImageFiles, second: ImageFiles) -> None:
    make(files, noise(ODD))

    with pytest.raises(errors.StoreError, match="smaller than its base"):
        Image.clone(second, base=files, base_size=ODD, size=BLOCK)


def test_a_base_of_another_size_is_damaged(files: ImageFiles, second: ImageFiles) -> None:
    make(files, noise(ODD))

    with pytest.raises(errors.ImageDamaged, match="instead of"):
        Image.clone(second, base=files, base_size=BLOCK, size=BLOCK)
    files.path.unlink()
    with pytest.raises(errors.ImageDamaged, match="missing"):
        Image.clone(second, base=files, base_size=ODD, size=ODD)
    assert not second.path.exists()


def test_a_clone_shares_its_extents(reflink_dir: Path) -> None:
    with Folder.open(reflink_dir) as folder:
        first, second = (ImageFiles(folder, f"{n}.raw", f"{n}.b3") for n in "ab")
        make(first, noise(256 * BLOCK))
        free = os.statvfs(reflink_dir).f_bavail
        with Image.clone(second, base=first, base_size=256 * BLOCK, size=256 * BLOCK) as made:
            made.write(0, noise(BLOCK, seed=2))
            made.finish()

    assert made.origin == "reflink"
    used = (free - os.statvfs(reflink_dir).f_bavail) * os.statvfs(reflink_dir).f_bsize
    assert used < 16 * BLOCK
    listed = subprocess.run(
        ["filefrag", "-v", second.path], check=True, capture_output=True, text=True
    )
    assert "shared" in listed.stdout


def test_without_reflinks_holes_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "reflink", lambda source, target: False)
    content = bytes(300 * BLOCK) + noise(200 * BLOCK) + bytes(300 * BLOCK)
    steps: list[int] = []

    with Folder.open(tmp_path) as folder:
        first, second = (ImageFiles(folder, f"{n}.raw", f"{n}.b3") for n in "ab")
        make(first, content)
        with Image.clone(
            second, base=first, base_size=len(content), size=len(content), copied=steps.append
        ) as made:
            root = made.finish()
        check(second, content, root)

    assert made.origin == "copy"
    assert allocated(second.path) == 200 * BLOCK
    assert sum(steps) == 200 * BLOCK
    assert len(steps) > 1


def test_a_copy_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "reflink", lambda source, target: False)

    def stop(length: int) -> None:
        raise KeyboardInterrupt

    with Folder.open(tmp_path) as folder:
        first, second = (ImageFiles(folder, f"{n}.raw", f"{n}.b3") for n in "ab")
        make(first, noise(BLOCK))
        before = open_files()
        with pytest.raises(KeyboardInterrupt):
            Image.clone(second, base=first, base_size=BLOCK, size=BLOCK, copied=stop)
        assert open_files() == before


def test_a_file_system_without_copy_file_range_is_copied_by_hand(
    files: ImageFiles, second: ImageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: int) -> int:
        raise OSError(errno.EXDEV, "no")

    monkeypatch.setattr(sparse, "reflink", lambda source, target: False)
    monkeypatch.setattr(os, "copy_file_range", refuse)
    make(files, noise(ODD))

    with Image.clone(second, base=files, base_size=ODD, size=ODD) as made:
        check(second, noise(ODD), made.finish())


def test_a_file_system_without_holes_gets_zeros(
    files: ImageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoHoles:
        @staticmethod
        def fallocate(*arguments: object) -> int:
            ctypes.set_errno(errno.EOPNOTSUPP)
            return -1

        @staticmethod
        def sync_file_range(*arguments: object) -> int:
            ctypes.set_errno(errno.ENOSYS)
            return -1

    monkeypatch.setattr(sparse, "_libc", NoHoles)

    with Image.create(files, size=2 * BLOCK) as made:
        made.write(0, noise(2 * BLOCK))
        made.write(0, bytes(BLOCK))
        check(files, bytes(BLOCK) + noise(2 * BLOCK)[BLOCK:], made.finish())


def test_short_writes_are_continued(files: ImageFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, data[:5000], at))

    check(files, noise(ODD), make(files, noise(ODD)))


def test_a_full_file_system_is_told_as_such(reflink_dir: Path) -> None:
    """The XFS image of the tests holds 512 MiB, so this really fills it."""
    free = os.statvfs(reflink_dir).f_bavail * os.statvfs(reflink_dir).f_frsize
    if free > 1 << 30:
        pytest.skip("this file system is too large to be filled")
    chunk = noise(64 * BLOCK)
    size = (free // len(chunk) + 64) * len(chunk)

    def fill(made: Image) -> None:
        for at in range(0, size, len(chunk)):
            made.write(at, chunk)
        made.finish()

    with Folder.open(reflink_dir) as folder:
        with Image.create(ImageFiles(folder, "a.raw", "a.b3"), size=size) as made:
            with pytest.raises(errors.StoreFull, match=r"a\.raw: no space.*remove restore points"):
                fill(made)


@pytest.mark.parametrize(
    ("number", "kind", "remedy"),
    [
        (errno.ENOSPC, errors.StoreFull, "remove restore points"),
        (errno.EDQUOT, errors.StoreFull, "quota"),
        (errno.EIO, errors.StoreError, "dmesg"),
        (errno.EROFS, errors.StoreError, "remount"),
        (errno.EFBIG, errors.StoreError, "too large"),
    ],
)
def test_a_failed_write_names_path_and_remedy(
    files: ImageFiles,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kind: type[errors.StoreError],
    remedy: str,
) -> None:
    def fail(fd: int, data: bytes, offset: int) -> int:
        raise OSError(number, os.strerror(number))

    with Image.create(files, size=BLOCK) as made:
        monkeypatch.setattr(os, "pwrite", fail)
        with pytest.raises(kind, match=rf"cannot write .*xvda\.raw: .*{remedy}") as caught:
            made.write(0, noise(BLOCK))
    assert type(caught.value) is kind


def test_written_pages_leave_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "WINDOW", 4 * BLOCK)
    dropped: list[tuple[int, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, at, length, advice: dropped.append((at, length))
    )
    with Folder.open(tmp_path) as folder:
        with Image.create(ImageFiles(folder, "a.raw", "a.b3"), size=12 * BLOCK) as made:
            for at in range(0, 12 * BLOCK, BLOCK):
                made.write(at, noise(BLOCK))
            assert dropped == [(0, 4 * BLOCK), (4 * BLOCK, 4 * BLOCK)]
            made.finish()

    assert sum(length for _, length in dropped) == 12 * BLOCK


def test_the_root_of_a_huge_sparse_array_is_that_of_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imagefiles, "_ROOT_STEP", 10_000)
    path = tmp_path / "a.b3"
    with path.open("w+b") as file:
        file.seek(70_000)
        file.write(noise(30_000))
        file.truncate(200_000)
        file.flush()

        assert imagefiles.digest_root(file.fileno()) == blake3.blake3(path.read_bytes()).hexdigest()


def test_reflinks_are_found_where_they_are(reflink_dir: Path, tmp_path: Path) -> None:
    assert image.reflink_supported(reflink_dir)
    assert list(reflink_dir.iterdir()) == []
    with pytest.raises(errors.StoreError, match="cannot write to"):
        image.reflink_supported(tmp_path / "missing")


def test_runs_join_neighbours_of_a_kind() -> None:
    data = bytes(BLOCK) + noise(2 * BLOCK) + bytes(2 * BLOCK) + b"x"
    found = digests.of_blocks(memoryview(data))

    assert list(digests.runs(found, length=len(data))) == [
        (True, 0, BLOCK),
        (False, BLOCK, 3 * BLOCK),
        (True, 3 * BLOCK, 5 * BLOCK),
        (False, 5 * BLOCK, 5 * BLOCK + 1),
    ]
    assert list(digests.runs(b"", length=0)) == []
