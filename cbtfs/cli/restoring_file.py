"""``restore --to``: one disk of a restore point into a file or onto a device."""

from pathlib import Path

from cbtfs import errors

from .context import Globals


def restore(  # noqa: PLR0913  # one parameter per option
    options: Globals,
    point: str,
    target: Path,
    *,
    force: bool,
    whole: bool,
    dry_run: bool,
    json_progress: bool,
) -> None:
    """Write the disk that ``point`` names into ``target``."""
    raise errors.UsageError("restore --to is not in this version of cbtfs")
