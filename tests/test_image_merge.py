"""Image: comparing in place, making zero, and going on with what an earlier run left."""

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import blake3
import pytest

from cbtfs import digests, errors, image, sparse
from cbtfs.folder import Folder
from cbtfs.image import Image
from cbtfs.imagefiles import ImageFiles

BLOCK = 64 << 10
ODD = 10 * BLOCK + 512
"""Size of a disk that ends within its eleventh block."""


def noise(length: int, *, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def b3(data: bytes) -> bytes:
    return blake3.blake3(data).digest(length=16) if any(data) else bytes(16)


def digests_of(content: bytes) -> bytes:
    return b"".join(b3(content[at : at + BLOCK]) for at in range(0, len(content), BLOCK))


def check(files: ImageFiles, content: bytes, root: str) -> None:
    array = (files.folder.path / files.digests).read_bytes()
    assert files.path.read_bytes() == content
    assert array == digests_of(content)
    assert root == blake3.blake3(array).hexdigest()


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def make(files: ImageFiles, content: bytes) -> str:
    with Image.create(files, size=len(content)) as made:
        made.write(0, content)
        return made.finish()


def patched(content: bytes, *blocks: int, seed: int = 9) -> bytes:
    """Return ``content`` with other bytes in ``blocks``."""
    changed = bytearray(content)
    for block in blocks:
        length = len(content[block * BLOCK : (block + 1) * BLOCK])
        changed[block * BLOCK : block * BLOCK + length] = noise(length, seed=seed + block)
    return bytes(changed)


@pytest.fixture
def folder(any_dir: Path) -> Iterator[Folder]:
    with Folder.open(any_dir) as opened:
        yield opened


@pytest.fixture
def base(folder: Folder) -> ImageFiles:
    """An image of noise with three blocks of zeros."""
    files = ImageFiles(folder, "base.raw", "base.b3")
    make(files, BASE)
    return files


BASE = noise(4 * BLOCK) + bytes(3 * BLOCK) + noise(ODD - 7 * BLOCK, seed=2)


@pytest.fixture
def files(folder: Folder) -> ImageFiles:
    return ImageFiles(folder, "xvda.raw", "xvda.b3")


def cloned(files: ImageFiles, base: ImageFiles, *, size: int = ODD) -> Image:
    return Image.clone(files, base=base, base_size=ODD, size=size)


# ── Comparing ────────────────────────────────────────────────────────────────────────────────


def test_what_is_there_already_is_not_written(
    base: ImageFiles, files: ImageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> int:
        raise AssertionError("written")

    with cloned(files, base) as made:
        with monkeypatch.context() as patch:
            for name in ("write_all", "punch"):
                patch.setattr(sparse, name, fail)
            patch.setattr(sparse.Writer, "write", fail)
            assert made.merge(0, BASE) == 0
        check(files, BASE, made.finish())


@pytest.mark.parametrize("blocks", [(0,), (3,), (10,), (0, 2, 3, 8, 10), tuple(range(11))])
def test_only_blocks_that_differ_are_written(
    base: ImageFiles, files: ImageFiles, blocks: tuple[int, ...]
) -> None:
    content = patched(BASE, *blocks)
    with cloned(files, base) as made:
        written = made.merge(0, content)
        root = made.finish()

    assert written == sum(512 if block == 10 else BLOCK for block in blocks)
    check(files, content, root)


def test_a_comparison_leaves_the_base_alone(base: ImageFiles, files: ImageFiles) -> None:
    with cloned(files, base) as made:
        made.merge(0, noise(ODD, seed=5))
        made.finish()

    assert base.path.read_bytes() == BASE


def test_blocks_that_became_zero_become_holes(base: ImageFiles, files: ImageFiles) -> None:
    content = BASE[:BLOCK] + bytes(2 * BLOCK) + BASE[3 * BLOCK :]
    with cloned(files, base) as made:
        assert made.merge(0, content) == 0
        check(files, content, made.finish())

    assert allocated(files.path) == allocated(base.path) - 2 * BLOCK


def test_equal_blocks_stay_shared(reflink_dir: Path) -> None:
    size = 64 * BLOCK
    with Folder.open(reflink_dir) as folder:
        base = ImageFiles(folder, "base.raw", "base.b3")
        make(base, noise(size))
        os.sync()
        before = os.statvfs(reflink_dir).f_bfree
        files = ImageFiles(folder, "a.raw", "a.b3")
        with Image.clone(files, base=base, base_size=size, size=size) as made:
            made.merge(0, patched(noise(size), 7))
            made.finish()
        os.sync()
        used = (before - os.statvfs(reflink_dir).f_bfree) * os.statvfs(reflink_dir).f_frsize

    assert used < 16 * BLOCK


@pytest.mark.parametrize("grown", [ODD + 512, 11 * BLOCK, 11 * BLOCK + 1, 20 * BLOCK])
def test_a_grown_disk_is_compared_at_its_new_length(
    base: ImageFiles, files: ImageFiles, grown: int
) -> None:
    content = BASE + bytes(grown - ODD)
    with cloned(files, base, size=grown) as made:
        assert made.merge(0, content) == 0
        check(files, content, made.finish())


def test_pieces_are_compared_one_by_one(base: ImageFiles, files: ImageFiles) -> None:
    content = patched(BASE, 1, 10)
    with cloned(files, base) as made:
        written = [made.merge(at, content[at : at + BLOCK]) for at in range(0, ODD, BLOCK)]
        check(files, content, made.finish())

    assert written == [0, BLOCK, *[0] * 8, 512]


def test_what_was_written_is_compared_too(files: ImageFiles) -> None:
    with Image.create(files, size=ODD) as made:
        made.write(0, BASE)
        assert made.merge(0, patched(BASE, 5)) == BLOCK
        assert made.merge(0, patched(BASE, 5)) == 0
        check(files, patched(BASE, 5), made.finish())


def test_nothing_can_be_merged(base: ImageFiles, files: ImageFiles) -> None:
    with cloned(files, base) as made:
        assert made.merge(BLOCK, b"") == 0
        assert made.differing(BLOCK, b"") == 0
        made.zero(BLOCK, 0)
        check(files, BASE, made.finish())


@pytest.mark.parametrize("offset", [-BLOCK, 1, ODD])
def test_only_whole_blocks_are_compared(base: ImageFiles, files: ImageFiles, offset: int) -> None:
    with cloned(files, base) as made:
        for compare in (made.merge, made.differing):
            with pytest.raises(errors.StoreError, match="no whole blocks"):
                compare(offset, noise(BLOCK))


@pytest.mark.parametrize(
    ("blocks", "count"), [((), 0), ((10,), 1), ((0, 1, 5), 3), (tuple(range(11)), 11)]
)
def test_blocks_that_differ_are_counted(
    base: ImageFiles, files: ImageFiles, blocks: tuple[int, ...], count: int
) -> None:
    with cloned(files, base) as made:
        assert made.differing(0, patched(BASE, *blocks)) == count
        check(files, BASE, made.finish())


def test_threads_compare_and_flush_one_image(base: ImageFiles, files: ImageFiles) -> None:
    content = patched(BASE, 0, 2, 5, 8, 10)
    ended = threading.Event()
    with cloned(files, base) as made, ThreadPoolExecutor(6) as threads:

        def flush() -> int:
            count = 0
            while not ended.is_set():
                made.flush()
                count += 1
            return count

        flushing = threads.submit(flush)
        written = threads.map(
            lambda at: made.merge(at, content[at : at + BLOCK]), range(0, ODD, BLOCK)
        )
        try:
            assert sum(written) == 4 * BLOCK + 512
        finally:
            ended.set()
        assert flushing.result() >= 0
        check(files, content, made.finish())


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_changes_gives_the_same_image(
    base: ImageFiles, files: ImageFiles, seed: int
) -> None:
    dice = random.Random(seed)
    size = ODD + dice.choice([0, 100, BLOCK, 7 * BLOCK])
    model = bytearray(BASE + bytes(size - ODD))
    made = cloned(files, base, size=size)
    try:
        for _ in range(40):
            first = dice.randrange(-(-size // BLOCK))
            start, stop = first * BLOCK, min((first + dice.randrange(1, 6)) * BLOCK, size)
            data = b"".join(
                dice.choice([bytes(BLOCK), noise(BLOCK, seed=dice.randrange(3))])
                for _ in range(start, stop, BLOCK)
            )[: stop - start]
            action = dice.choice(["write", "merge", "zero", "differing", "flush", "reopen"])
            if action == "differing":
                old = model[start:stop]
                pairs = zip(blocks_of(old), blocks_of(data), strict=True)
                assert made.differing(start, data) == sum(a != b for a, b in pairs)
            elif action == "flush":
                made.flush()
            elif action == "reopen":
                made.close()
                made = Image.reopen(files, size=size)
            elif action == "zero":
                made.zero(start, stop - start)
                model[start:stop] = bytes(stop - start)
            else:
                (made.write if action == "write" else made.merge)(start, data)
                model[start:stop] = data
        check(files, bytes(model), made.finish())
    finally:
        made.close()


def blocks_of(data: bytes | bytearray) -> list[bytes]:
    return [bytes(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)]


# ── Making zero ──────────────────────────────────────────────────────────────────────────────


def test_a_range_becomes_zero(base: ImageFiles, files: ImageFiles) -> None:
    with cloned(files, base) as made:
        made.zero(BLOCK, ODD - BLOCK)
        check(files, BASE[:BLOCK] + bytes(ODD - BLOCK), made.finish())

    assert allocated(files.path) <= BLOCK + 4096


def test_zeros_are_not_punched_again(files: ImageFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system knows no holes, each would be written."""
    punched: list[tuple[int, int]] = []
    size = 1 << 40
    with Image.create(files, size=size) as made:
        made.write(size // 2, noise(BLOCK))
        monkeypatch.setattr(sparse, "punch", lambda fd, at, length: punched.append((at, length)))
        made.zero(0, size // 4)
        assert punched == []
        made.zero(0, size)

    assert sum(length for _, length in punched) < 1 << 30


def test_digests_that_are_stored_zeros_are_zeros(
    files: ImageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Image.create(files, size=ODD) as made:
        (files.folder.path / files.digests).write_bytes(bytes(11 * digests.LENGTH))
        monkeypatch.delattr(sparse, "punch")
        made.zero(0, ODD)


def test_zero_with_steps_of_digests(
    base: ImageFiles, files: ImageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "_ZERO_STEP", 32)
    with cloned(files, base) as made:
        made.zero(BLOCK, 8 * BLOCK)
        check(files, BASE[:BLOCK] + bytes(8 * BLOCK) + BASE[9 * BLOCK :], made.finish())


# ── Flushing, and failing ────────────────────────────────────────────────────────────────────


def test_an_image_is_on_disk_before_its_digests(
    files: ImageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []

    def fdatasync(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").readlink().suffix)

    with Image.create(files, size=ODD) as made:
        made.write(0, BASE)
        monkeypatch.setattr(os, "fdatasync", fdatasync)
        made.flush()

    assert synced == [".raw", ".b3"]


def test_the_root_lasts_until_the_next_change(files: ImageFiles) -> None:
    with Image.create(files, size=ODD) as made:
        root = made.finish()
        made.flush()
        assert made.differing(0, BASE) == 8
        assert made.root == root
        for change in (lambda: made.merge(0, BASE), lambda: made.zero(0, ODD)):
            made.finish()
            change()
            assert made.root == ""


def test_an_image_whose_flush_failed_is_not_finished(
    files: ImageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells of a page that it could not write once: the next fsync would be fine."""

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "no")

    with Image.create(files, size=ODD) as made:
        made.write(0, BASE)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fail)
            with pytest.raises(errors.StoreError, match=r"cannot write .*xvda\.raw.*see dmesg"):
                made.flush()
        for work in (made.finish, made.flush, lambda: made.merge(0, BASE)):
            with pytest.raises(errors.StoreError, match=r"cannot write .*xvda\.raw.*see dmesg"):
                work()
        assert made.root == ""


def test_a_full_disk_stays_a_full_disk(files: ImageFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, "no")

    with Image.create(files, size=ODD) as made:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", fail)
            with pytest.raises(errors.StoreFull, match="remove restore points"):
                made.merge(0, BASE)
        with pytest.raises(errors.StoreFull, match="remove restore points"):
            made.finish()


# ── A base that cannot be read ───────────────────────────────────────────────────────────────


def failing_reads(path: Path, number: int) -> Callable[[int, int, int], bytes]:
    """Return an ``os.pread`` that fails on the file at ``path``."""
    whole = os.pread

    def pread(fd: int, length: int, offset: int) -> bytes:
        if Path(f"/proc/self/fd/{fd}").samefile(path):
            raise OSError(number, "no")
        return whole(fd, length, offset)

    return pread


@pytest.mark.parametrize("number", [errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ENODATA])
def test_a_base_that_cannot_be_copied_is_damaged(
    base: ImageFiles, files: ImageFiles, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def copy(*arguments: object) -> int:
        raise OSError(number, "no")

    monkeypatch.setattr(sparse, "reflink", lambda source, target: False)
    monkeypatch.setattr(os, "copy_file_range", copy)
    monkeypatch.setattr(os, "pread", failing_reads(base.path, number))
    with pytest.raises(errors.ImageDamaged, match=r"base\.raw cannot be read.*see dmesg"):
        cloned(files, base)

    assert sorted(p.name for p in files.folder.path.iterdir()) == ["base.b3", "base.raw"]


def test_a_copy_that_cannot_be_written_is_no_damage(
    base: ImageFiles, files: ImageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(sparse, "reflink", lambda source, target: False)
    for name in ("copy_file_range", "pwrite"):
        monkeypatch.setattr(os, name, fail)
    with pytest.raises(errors.StoreError, match=r"cannot create .*xvda\.raw") as caught:
        cloned(files, base)

    assert type(caught.value) is errors.StoreError


def test_an_extent_map_that_cannot_be_read_is_damage(
    base: ImageFiles, files: ImageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seek(fd: int, offset: int, whence: int) -> int:
        raise OSError(errno.EUCLEAN, "no")

    monkeypatch.setattr(sparse, "reflink", lambda source, target: False)
    monkeypatch.setattr(os, "lseek", seek)
    with pytest.raises(errors.ImageDamaged, match=r"base\.raw cannot be read"):
        cloned(files, base)


def test_digests_that_cannot_be_read_are_damage(
    base: ImageFiles, files: ImageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cloned(files, base) as made:
        array = files.folder.path / files.digests
        monkeypatch.setattr(os, "pread", failing_reads(array, errno.EIO))
        for compare in (made.merge, made.differing):
            with pytest.raises(errors.ImageDamaged, match=r"xvda\.b3 cannot be read"):
                compare(0, BASE)


# ── Going on ─────────────────────────────────────────────────────────────────────────────────


def test_an_image_is_gone_on_with(base: ImageFiles, files: ImageFiles) -> None:
    content = patched(BASE, 1, 9, 10)
    with cloned(files, base) as made:
        made.merge(0, content[: 5 * BLOCK])

    with Image.reopen(files, size=ODD) as made:
        assert made.origin == "resumed"
        assert made.root == ""
        assert made.merge(5 * BLOCK, content[5 * BLOCK :]) == BLOCK + 512
        check(files, content, made.finish())


def test_a_finished_image_has_its_root_again(files: ImageFiles) -> None:
    root = make(files, BASE)

    with Image.reopen(files, size=ODD) as made:
        assert made.recheck() == made.root == root


def test_changed_digests_give_another_root(files: ImageFiles) -> None:
    root = make(files, BASE)
    with (files.folder.path / files.digests).open("r+b") as file:
        file.write(b"x")

    with Image.reopen(files, size=ODD) as made:
        assert made.recheck() != root


def test_a_root_that_cannot_be_read_is_damage(
    files: ImageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(files, BASE)
    with Image.reopen(files, size=ODD) as made:
        array = files.folder.path / files.digests
        monkeypatch.setattr(os, "pread", failing_reads(array, errno.EIO))
        with pytest.raises(errors.ImageDamaged, match=r"xvda\.b3 cannot be read"):
            made.recheck()


@pytest.mark.parametrize("name", ["xvda.raw", "xvda.b3"])
@pytest.mark.parametrize("kind", ["gone", "short", "long", "link", "pipe", "folder"])
def test_what_is_no_such_image_is_not_gone_on_with(
    files: ImageFiles, base: ImageFiles, name: str, kind: str
) -> None:
    make(files, BASE)
    path = files.folder.path / name
    size = path.stat().st_size
    if kind in {"short", "long"}:
        os.truncate(path, size + (1 if kind == "long" else -1))
    else:
        path.unlink()
        if kind == "link":
            path.symlink_to("base.raw" if name == "xvda.raw" else "base.b3")
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()

    before = open_files()
    with pytest.raises(errors.ImageDamaged, match="cannot be gone on with"):
        Image.reopen(files, size=ODD)
    assert open_files() == before


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("name", ["xvda.raw", "xvda.b3"])
def test_an_image_with_another_name_is_not_gone_on_with(files: ImageFiles, name: str) -> None:
    make(files, BASE)
    (files.folder.path / "copy").hardlink_to(files.folder.path / name)

    before = open_files()
    with pytest.raises(errors.ImageDamaged, match="hard links"):
        Image.reopen(files, size=ODD)
    assert open_files() == before


@pytest.mark.parametrize("kind", ["zeros", "torn", "unreadable"])
def test_digests_that_were_on_disk_first_are_not_believed(
    files: ImageFiles, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """After a power cut the array can be ahead of the image."""
    make(files, BASE)
    with files.path.open("r+b") as file:
        file.seek(2 * BLOCK + 4096)
        file.write(bytes(BLOCK) if kind == "zeros" else b"torn")

    with Image.reopen(files, size=ODD) as made:
        with monkeypatch.context() as patch:
            if kind == "unreadable":
                patch.setattr(os, "pread", failing_reads(files.path, errno.EIO))
                assert made.merge(2 * BLOCK, BASE[2 * BLOCK : 4 * BLOCK]) == 2 * BLOCK
            else:
                expected = 2 * BLOCK if kind == "zeros" else BLOCK
                assert made.merge(0, BASE) == expected
        check(files, BASE, made.finish())


def test_zeros_that_were_on_disk_as_digests_only_are_punched(files: ImageFiles) -> None:
    make(files, BASE)
    with (files.folder.path / files.digests).open("r+b") as file:
        file.write(bytes(6 * digests.LENGTH))

    with Image.reopen(files, size=ODD) as made:
        made.zero(0, 2 * BLOCK)
        assert made.merge(2 * BLOCK, bytes(2 * BLOCK)) == 0
        content = bytes(4 * BLOCK) + BASE[4 * BLOCK :]
        check(files, content, made.finish())
