"""Maker: what takes and removes snapshots of VMs for ``mkdir`` and ``rmdir``, or refuses to."""

import errno
import logging
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol

from . import errors
from .names import safe_names
from .owner import Owned

log = logging.getLogger(__name__)

LIMIT = 300.0
"""Seconds that a pool gets to take or remove a snapshot: its SR may be busy with others."""

_REFUSALS = {
    # code of xapi or of SM (sm, drivers/XE_SR_ERRORCODES.xml)
    "SR_BACKEND_FAILURE_44": errno.ENOSPC,
    "SR_BACKEND_FAILURE_109": errno.EMLINK,  # the chain of snapshots is too long
    "RBAC_PERMISSION_DENIED": errno.EACCES,
    "OTHER_OPERATION_IN_PROGRESS": errno.EBUSY,
    "VDI_IN_USE": errno.EBUSY,
}


class Maker(Protocol):
    """A pool."""

    async def make_snapshot(self, vm_ref: str, name: str, *, owner: Owned) -> tuple[str, list[str]]:
        """Snapshot a VM, tag it and its disks, and return its and their references."""
        ...

    async def remove_snapshot(self, vm_ref: str) -> None:
        """Destroy a snapshot VM of ours with its disks."""
        ...


def valid_name(name: bytes) -> str:
    """Return the name of a snapshot whose folder is to be called ``name``.

    Raises:
        Denied: EINVAL, it would be called otherwise.
    """
    try:
        text = name.decode()
    except UnicodeDecodeError:
        raise errors.Denied("a name is text in UTF-8", errno=errno.EINVAL) from None
    if safe_names([("", text)])[""] != text:
        raise errors.Denied(f"no folder can be called {text!r}", errno=errno.EINVAL)
    return text


@contextmanager
def refusals() -> Generator[None]:
    """Tell the one who asked why a pool refuses, as far as there is an errno for it."""
    try:
        yield
    except errors.XapiFailure as error:
        if error.code not in _REFUSALS:
            raise
        log.warning("%s", error)
        raise errors.Denied(str(error), errno=_REFUSALS[error.code]) from error
