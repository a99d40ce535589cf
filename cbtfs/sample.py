"""Sample: how many of the blocks that a bitmap calls unchanged are read, and what that finds.

Changed block tracking can be wrong without anybody noticing: a host that crashed, a log that was
not closed. So a few blocks that should be as they were are read each time, and compared. Of N such
blocks, k of them wrong, a sample of n finds none with the probability

    (N-k choose n) / (N choose n)        about (1 - n/N)^k for small n
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sample:
    """How much is sampled.

    Attributes:
        share: of the unchanged blocks, 0.001 for 0.1 %; 0 turns sampling off.
        at_least: blocks, as far as there are so many.
        at_most: blocks; None for as many as ``share`` says. A limit makes the cost of a sync
            without changes independent of the size of the disk.
    """

    share: float = 0.001
    at_least: int = 64
    at_most: int | None = 256

    def count(self, unchanged: int) -> int:
        """Return how many of ``unchanged`` blocks to read."""
        if not self.share:
            return 0
        wanted = max(math.ceil(self.share * unchanged), self.at_least)
        if self.at_most is not None:
            wanted = min(wanted, self.at_most)
        return min(wanted, unchanged)


def chance(*, unchanged: int, wrong: int, sampled: int) -> float:
    """Return the probability that ``sampled`` of ``unchanged`` blocks hit one of ``wrong`` ones."""
    missed = 1.0
    for index in range(wrong):
        missed *= max(unchanged - sampled - index, 0) / (unchanged - index)
    return 1.0 - missed
