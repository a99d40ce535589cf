"""Landing: where the bytes of a disk land - what is expected in the image, the rest beside it.

::

    read          |  A  |  B  |  C  |  D  |
    expected         #     #                      written, or merged if only what differs shall be
    not expected               =     =            compared: it must be what the image has already
"""

from threading import Lock

from . import errors, units
from .image import Image
from .work import Work


class Landing:
    """Where the bytes land: what is expected in the image, the rest beside it, to be compared."""

    def __init__(self, image: Image, work: Work) -> None:
        self.compared = 0
        self.wrong = 0
        self._image = image
        self._expected = work.expected
        self._put = image.merge if work.disk.method == "compare" else image.write
        self._lock = Lock()

    def write(self, offset: int, data: memoryview) -> int:
        """Take what was read at ``offset``; return the bytes stored.

        Raises:
            BitmapWrong: it holds a block that nobody expected to have changed.
            StoreError: the image cannot be written.
        """
        if self._expected is None:
            return self._put(offset, data)
        stored = 0
        for is_expected, start, stop in self._expected.runs(offset, offset + len(data)):
            part = data[start - offset : stop - offset]
            if is_expected:
                stored += self._put(start, part)
            else:
                self._compare(start, part)
        return stored

    def _compare(self, offset: int, data: memoryview) -> None:
        wrong = self._image.differing(offset, data)
        with self._lock:
            self.compared += -(-len(data) // units.CBT_BLOCK)
            self.wrong += wrong
        if wrong:
            raise errors.BitmapWrong(
                f"at least {self.wrong} of {self.compared} blocks that the pool says need not be"
                " read hold something else than the image"
            )
