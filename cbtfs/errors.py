"""Everything that can go wrong in cbtfs, as one tree; the class says what to do next.

::

    CbtfsError                      exit 1   failed, nothing new committed
    ├── UsageError                       2   the command line or an argument
    │   └── ConfigError                  2   the configuration: which file, which key
    ├── NotFound                        10   no such pool, VM, disk or point
    ├── PoolError                        1   the pool answered, and said no
    │   ├── XapiFailure                  1   xapi's code and parameters, unchanged
    │   ├── ChangesUnknown               1   no usable bitmap: compare with the last image
    │   ├── BitmapWrong                  1   a block called unchanged had changed: compare
    │   ├── PoolBusy                    11   another run is at work on the same VM
    │   ├── AllocationUnknown            1   no usable block allocation table: read everything
    │   ├── AuthenticationFailed        12   login or certificate refused: stop, don't retry
    │   └── PoolUnreachable             13   nobody answers: retry later
    ├── ExportError                      1   an NBD export failed
    │   └── ExportLost                   1   its connection is gone: reconnect and replay
    ├── StoreError                       1   the store cannot be read or written
    │   ├── StoreLocked                 11   another run holds it
    │   ├── StoreFull                    1   no space left; nothing was lost
    │   ├── ReflinkUnsupported           1   this file system cannot clone
    │   └── ImageDamaged                 4   digests differ: never a base again
    ├── MountError                       1   the kernel or the mount point refused
    │   └── Denied                       1   a request of somebody who uses the mount
    └── Interrupted                    130   SIGINT (143: SIGTERM), cleanly

An error is one sentence for the user: what, where, and what to do. Foreign exceptions become one of
these at the door that meets them (xapi, nbd, image, fuse), and nowhere else.
"""

AGAIN = "run the command again"
"""What to do after most interruptions."""


class CbtfsError(Exception):
    """Something cbtfs can name; its text is one sentence without a trailing period."""

    exit_code = 1


class UsageError(CbtfsError):
    """The command line cannot be carried out as written."""

    exit_code = 2


class ConfigError(UsageError):
    """The configuration is wrong; the text names the file and the key."""


class NotFound(CbtfsError):
    """No such pool, VM, disk or point."""

    exit_code = 10


class PoolError(CbtfsError):
    """The pool answered and refused."""


class XapiFailure(PoolError):
    """xapi reported a failure.

    Args:
        code: xapi's error code, such as ``VDI_IN_USE``.
        params: its parameters as received; documented ones may be missing.
        method: the call that failed, such as ``VDI.data_destroy``; "" if it was not a call.
    """

    def __init__(self, code: str, params: tuple[str, ...] = (), *, method: str = "") -> None:
        self.code = code
        self.params = params
        self.method = method
        told = ", ".join(p for p in params if p and not p.startswith("OpaqueRef:"))
        where = f"{method}: " if method else ""
        super().__init__(f"{where}xapi answered {code}" + (f" ({told})" if told else ""))


class ChangesUnknown(PoolError):
    """The pool cannot say which blocks changed between two snapshots.

    Args:
        message: one sentence.
        reason: a reason from the fixed list of ``plan.Reason`` (``base-lost``, ``cbt-off``, …).
    """

    def __init__(self, message: str, *, reason: str) -> None:
        self.reason = reason
        super().__init__(message)


class BitmapWrong(PoolError):
    """A block that the pool calls unchanged, or unallocated, holds something else."""


class PoolBusy(PoolError):
    """Another run of cbtfs is at work on the same VM; the text names it."""

    exit_code = 11


class AllocationUnknown(PoolError):
    """The pool cannot say which blocks of a disk may hold data; the text says why."""


class AuthenticationFailed(PoolError):
    """A login or a certificate was refused; retrying may lock the account."""

    exit_code = 12


class PoolUnreachable(PoolError):
    """Nobody answers at any known address of the pool."""

    exit_code = 13


class ExportError(CbtfsError):
    """An NBD export refused or failed a request."""


class ExportLost(ExportError):
    """The NBD connection is gone; a fresh one may work."""


class StoreError(CbtfsError):
    """The store cannot be read or written."""


class StoreLocked(StoreError):
    """Another run holds the lock; the text names its owner."""

    exit_code = 11


class StoreFull(StoreError):
    """The file system of the store is full."""


class ReflinkUnsupported(StoreError):
    """The file system cannot share extents between files."""


class ImageDamaged(StoreError):
    """A local image differs from its digests."""

    exit_code = 4


class MountError(CbtfsError):
    """The kernel, fusermount3 or the mount point refused."""


class Denied(MountError):
    """What somebody asked of a mount is refused, or given up.

    Args:
        message: one sentence, for the log.
        errno: what the one who asked is told.
    """

    def __init__(self, message: str, *, errno: int) -> None:
        self.errno = errno
        super().__init__(message)


class Interrupted(CbtfsError):
    """A signal stopped the run; everything committed before is safe.

    Args:
        signum: number of the signal, 2 or 15.
        then: what to do, or what will happen.
    """

    def __init__(self, signum: int, *, then: str = AGAIN) -> None:
        self.exit_code = 128 + signum
        super().__init__(f"interrupted; nothing half-written is listed, {then}")
