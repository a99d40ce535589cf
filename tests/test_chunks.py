"""Images as they are sent to a pool: what is not zero, in chunks, and nothing that is damaged."""

import random
import struct
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings, strategies as st

from cbtfs import chunks, committed, errors
from cbtfs.chunks import Chunks
from cbtfs.committed import Committed
from cbtfs.extents import Extent
from cbtfs.folder import Folder
from cbtfs.image import Image
from cbtfs.imagefiles import ImageFiles

BLOCK = 64 << 10


@contextmanager
def image_of(directory: Path, content: bytes, *, damage: int = -1) -> Generator[Committed]:
    """Commit an image, change a byte of it if told to, and open it."""
    with Folder.open(directory) as folder:
        files = ImageFiles(folder, "xvda.raw", "xvda.b3")
        with Image.create(files, size=len(content)) as made:
            made.write(0, content)
            root = made.finish()
        if damage >= 0:
            with files.path.open("r+b") as file:
                file.seek(damage)
                file.write(bytes([content[damage] ^ 1]))
        with committed.opened(files, size=len(content), root=root) as image:
            yield image


def sent(source: Chunks) -> bytes:
    async def collect() -> bytes:
        return b"".join([bytes(part) async for part in source.parts()])

    return trio.run(collect)


def decoded(body: bytes, disk: bytearray) -> int:
    """Put chunks onto a disk as vhd-tool does; return the bytes of data."""
    at = data = 0
    while True:
        offset, length = struct.unpack_from("<QI", body, at)
        at += 12
        if not length:
            assert (offset, at) == (0, len(body))
            return data
        disk[offset : offset + length] = body[at : at + length]
        at += length
        data += length


@st.composite
def contents(draw: st.DrawFn) -> bytes:
    """Some disk: runs of zeros and of data, and an end anywhere in a block."""
    kinds = draw(st.lists(st.sampled_from([b"\0", b"\0", b"x", b"y"]), max_size=40))
    tail = draw(st.integers(0, BLOCK - 1))
    rest = random.Random(tail).randbytes(tail) if draw(st.booleans()) else bytes(tail)
    return b"".join(kind * BLOCK for kind in kinds) + rest


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(content=contents())
def test_the_chunks_of_an_image_make_it_and_hold_no_zeros(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    told: list[int] = []
    with image_of(tmp_path_factory.mktemp("image"), content) as image:
        source = Chunks(image, lambda: chunks.everything(image), advanced=told.append)
        body = sent(source)
        assert sent(source) == body  # a host that sends us on gets all of it again
        assert image.data_length() == source.data

    disk = bytearray(len(content))
    data = decoded(body, disk)
    blocks = [content[at : at + BLOCK] for at in range(0, len(content), BLOCK)]
    assert disk == content
    assert len(body) == source.length
    assert data == source.data == sum(len(block) for block in blocks if any(block))
    assert sum(told) == 2 * data


def test_chosen_blocks_are_sent_zeros_or_not(tmp_path: Path) -> None:
    content = b"a" * BLOCK + bytes(2 * BLOCK) + b"d" * 512
    disk = bytearray(b"#" * len(content))
    chosen = [(Extent(BLOCK, 4 * BLOCK), [Extent(2 * BLOCK, 3 * BLOCK + 512)])]
    with image_of(tmp_path, content) as image:
        whole = [(Extent(BLOCK, len(content)), chosen[0][1])]
        body = sent(Chunks(image, lambda: whole, advanced=lambda _: None))

    decoded(body, disk)

    assert disk[: 2 * BLOCK] == b"#" * 2 * BLOCK
    assert disk[2 * BLOCK :] == content[2 * BLOCK :]


@pytest.mark.parametrize("at", [0, 5 * BLOCK - 1, 5 * BLOCK, 16 * BLOCK + 100])
def test_damage_is_not_sent(tmp_path: Path, at: int) -> None:
    """Be it in data, in a hole of the image, or in a later piece."""
    content = b"a" * 5 * BLOCK + bytes(3 * BLOCK) + b"b" * 9 * BLOCK
    with image_of(tmp_path, content, damage=at) as image:
        source = Chunks(image, lambda: chunks.everything(image), advanced=lambda _: None)
        got: list[bytes] = []

        async def collect() -> None:
            async for part in source.parts():
                got.append(bytes(part))  # noqa: PERF401  # what came before the error counts

        with pytest.raises(errors.ImageDamaged, match=f"bytes {at // BLOCK * BLOCK} to"):
            trio.run(collect)

    piece = at - at % committed.PIECE
    assert b"".join(got).count(b"a") + b"".join(got).count(b"b") <= piece


def test_damaged_digests_open_nothing(tmp_path: Path) -> None:
    with image_of(tmp_path, b"a" * BLOCK) as image:
        array = image.files.folder.path / image.files.digests
        array.write_bytes(bytes(16))
        opening = committed.opened(image.files, size=BLOCK, root="00" * 32)
        with pytest.raises(errors.ImageDamaged, match="cannot be restored"):
            opening.__enter__()
