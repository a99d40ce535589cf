"""Joined: what is no volume is refused before anything is mounted; ``test_open`` has the rest."""

from pathlib import Path

import pytest

from cbtfs import joined


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["v 0 8 linear 0 1"], "v lies beyond the end of its disk"),
        (["v 0 8 linear 1 0"], "v lies beyond the end of its disk"),
        (["v 0 16 striped 2 4 0 0 0 4"], "v lies beyond the end of its disk"),
        (["v 0 4 linear 0 0", "w 4 4 linear 0 4"], "do not follow on one another"),
        (["v 0 8 nonsense 0 0"], "'0 8 nonsense 0 0' is no line of a table"),
        (["v"], "'' is no line of a table"),
    ],
)
def test_table_that_does_not_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[str], words: str
) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(8 * 512))

    assert joined.main([str(tmp_path), f"--image={image}", *lines]) == 1

    assert words in capsys.readouterr().err


def test_image_that_is_a_link_or_missing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to("/dev/zero")

    for name in ("link", "missing"):
        image = tmp_path / name
        assert joined.main([str(tmp_path), f"--image={image}", "v 0 8 linear 0 0"]) == 1
        assert f"cannot read {image}" in capsys.readouterr().err
