r"""What commands print: tables for people, one JSON document for programs, sentences on stderr.

Names come from a pool and are hostile: control characters, escape sequences, bidirectional
overrides. In tables and sentences they are shown escaped (``\x1b``); JSON carries them exactly, in
ASCII, so that neither can drive a terminal.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from rich.cells import cell_len, set_cell_size

from cbtfs import errors, names

SCHEMA = 1
"""Version of every JSON document that commands print."""

_BOLD, _PLAIN = "\x1b[1m", "\x1b[0m"

MAX_COLUMN = 48
"""Cells that a column is padded to; one name of 255 characters shall not move all others."""

MIN_COLUMN = 12
"""Cells below which a column is not cut."""


safe = names.shown
"""What makes text from a pool fit to be printed."""


class ReaderGone(errors.CbtfsError):
    """Nobody reads our output any more (``cbtfs ls | head``); there is nobody to tell either."""

    exit_code = 128 + signal.SIGPIPE  # as a shell reports it of other tools


@dataclass(slots=True)
class Table:
    """Rows of text in columns.

    Ten thousand rows must not take seconds, so this is our own and not rich's. On a terminal the
    ``flexible`` columns are cut to fit; in a pipe nothing is ever cut.

    Args:
        columns: headings; one that begins with ``>`` has its column aligned to the right.
        flexible: indices of the columns that give way on a narrow terminal.
    """

    columns: Sequence[str]
    flexible: tuple[int, ...] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list[tuple[str, ...]])

    def add(self, *cells: str) -> None:
        """Add a row; what the cells hold is made safe here."""
        self.rows.append(tuple(safe(cell) for cell in cells))

    def lines(self, *, width: int | None = None) -> list[str]:
        """Return the lines, the heading first; ``width`` in cells is that of a terminal."""
        heading = tuple(column.removeprefix(">") for column in self.columns)
        widths = [
            min(MAX_COLUMN, max(map(_cells, column)))
            for column in zip(heading, *self.rows, strict=True)
        ]
        if width is not None:
            self._narrow(widths, width)
        columns = [
            _Column(
                cells,
                is_right=column.startswith(">"),
                is_cut=width is not None and index in self.flexible,
            )
            for index, (column, cells) in enumerate(zip(self.columns, widths, strict=True))
        ]
        return [
            "  ".join(
                [column.fit(cell) for column, cell in zip(columns, row, strict=True)]
            ).rstrip()
            for row in (heading, *self.rows)
        ]

    def _narrow(self, widths: list[int], width: int) -> None:
        """Take from the flexible columns, always the widest, until the table fits."""
        excess = sum(widths) + 2 * (len(widths) - 1) - width
        for _ in range(excess):
            widest = max(self.flexible, key=lambda index: widths[index], default=None)
            if widest is None or widths[widest] <= MIN_COLUMN:
                return
            widths[widest] -= 1

    def print(self) -> None:
        """Print to stdout."""
        terminal = sys.stdout.isatty()
        heading, *lines = self.lines(width=shutil.get_terminal_size().columns if terminal else None)
        if coloured(sys.stdout):
            heading = f"{_BOLD}{heading}{_PLAIN}"
        line("\n".join((heading, *lines)))


@dataclass(frozen=True, slots=True)
class _Column:
    width: int
    is_right: bool
    is_cut: bool

    def fit(self, text: str) -> str:
        """Return ``text`` padded, or cut; what may not be cut sticks out."""
        missing = self.width - _cells(text)
        if missing < 0:
            return set_cell_size(text, self.width - 1) + "…" if self.is_cut else text
        return " " * missing + text if self.is_right else text + " " * missing


def _cells(text: str) -> int:
    return len(text) if text.isascii() else cell_len(text)


def coloured(stream: TextIO) -> bool:
    """Tell whether to use colours: on a terminal that has some, unless NO_COLOR is set."""
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def prepare() -> None:
    """Make both streams fit to be written to, also where whoever called closed them (``>&-``)."""
    if sys.stdout is None:
        sys.stdout = _nowhere()
    if sys.stderr is None:
        sys.stderr = _nowhere()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a TextIOWrapper


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


def line(text: str = "") -> None:
    """Print a line to stdout; what of it came from a pool is the caller's to make safe."""
    _write(f"{text}\n")


def document(content: Mapping[str, object]) -> None:
    """Print the one JSON document of a command, its schema first."""
    line(json.dumps({"schema": SCHEMA, **content}, indent=2))


def finish() -> None:
    """Send what is still in a buffer.

    Raises:
        ReaderGone: nobody reads.
    """
    with _noticed():
        sys.stdout.flush()


def _write(text: str) -> None:
    with _noticed():
        sys.stdout.write(text)


@contextmanager
def _noticed() -> Generator[None]:
    try:
        yield
    except OSError as exc:
        # so that the interpreter's last flush goes nowhere, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(exc, BrokenPipeError):
            raise ReaderGone from None
        raise errors.CbtfsError(f"standard output cannot be written: {exc.strerror}") from exc


def note(text: str) -> None:
    """Print a sentence to stderr, made safe; if nobody reads it, that is no reason to fail."""
    complain(f"cbtfs: {safe(text)}")


def complain(text: str) -> None:
    """Print lines to stderr as they are; if nobody reads them, that is no reason to fail."""
    with suppress(OSError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
