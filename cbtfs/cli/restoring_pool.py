"""``restore --to-sr`` and ``--in-place``: a restore point into new disks, or over the old ones."""

from dataclasses import dataclass

from cbtfs import errors

from .context import Globals


@dataclass(frozen=True, slots=True)
class Wish:
    """What the options say; ``whole``: all of what was written is read back, not only some."""

    point: str
    to_sr: str = ""
    vm_name: str = ""
    whole: bool = False
    dry_run: bool = False
    json_progress: bool = False


def to_sr(options: Globals, wish: Wish) -> None:
    """Make new disks on an SR, and a VM of them if wanted."""
    raise errors.UsageError("restore --to-sr is not in this version of cbtfs")


def in_place(options: Globals, wish: Wish) -> None:
    """Write what differs over the disks that the point is of."""
    raise errors.UsageError("restore --in-place is not in this version of cbtfs")
