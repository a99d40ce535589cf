"""The state machine: every step is something that happens to a VM, or a sync of it."""

import functools
import itertools
import sys
import traceback
from collections.abc import Callable
from typing import ClassVar, Concatenate, ParamSpec

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from .history_lab import Lab
from .history_sync import Attempt, Trouble, check_all
from .history_world import World

P = ParamSpec("P")

_which = st.integers(0, 11)
_seed = st.integers(0, 2**32 - 1)
_trouble = st.sampled_from(("cancel", "cancel", "refuse", "kill"))
_when = st.sampled_from(("before", "during", "never"))
_kind = st.sampled_from(("scattered", "blocks", "end", "zeros", "same"))


def _counted(
    step: Callable[Concatenate["HistoryMachine", P], None],
) -> Callable[Concatenate["HistoryMachine", P], None]:
    """Return ``step``, which counts when it was made."""

    @functools.wraps(step)
    def made(machine: "HistoryMachine", /, *args: P.args, **kwargs: P.kwargs) -> None:
        step(machine, *args, **kwargs)
        HistoryMachine.steps += 1

    return made


class HistoryMachine(RuleBasedStateMachine):
    """A history of one VM; `lab` and `kills` are set before it runs.

    The choices never depend on what cbtfs did: each step has the same parameters always.
    """

    lab: ClassVar[Lab]
    kills: ClassVar[int] = 0
    """How many more syncs may be killed with SIGKILL; they take longest."""
    steps: ClassVar[int] = 0
    syncs: ClassVar[int] = 0
    _numbers = itertools.count(1)

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.lab, f"vm{next(self._numbers)}")

    def teardown(self) -> None:
        """End the history with a sync that must succeed, and look at every point once more."""
        failure = sys.exception()
        try:
            if failure is None:
                Attempt(self.world).run()
                check_all(self.world)
            elif isinstance(failure, Exception):
                # hypothesis tells nothing but that it is flaky if that does not happen again
                traceback.print_exception(failure)
        finally:
            self.world.close()

    # ── what happens to the VM ───────────────────────────────────────────────────────────────

    @rule(which=_which, kind=_kind, seed=_seed)
    @_counted
    def write(self, which: int, kind: str, seed: int) -> None:
        self.world.write(which, kind, seed)

    @rule(which=_which, kind=_kind, seed=_seed)
    @_counted
    def write_more(self, which: int, kind: str, seed: int) -> None:
        self.world.write(which, kind, seed)
        self.world.write(which + 1, kind, seed + 1)

    @rule(which=_which, more=st.integers(-300, 300))
    @_counted
    def resize(self, which: int, more: int) -> None:
        self.world.resize(which, more)

    @rule(which=_which, off=st.booleans(), on=st.booleans())
    @_counted
    def track(self, which: int, *, off: bool, on: bool) -> None:
        self.world.track(which, off=off, on=on)

    @rule()
    @_counted
    def crash(self) -> None:
        self.world.crash()

    @rule(kind=_which)
    @_counted
    def leave_be(self, kind: int) -> None:
        self.world.leave_be(kind)

    @rule(which=_which)
    @_counted
    def detach(self, which: int) -> None:
        self.world.detach(which)

    @rule(which=_which, number=_which)
    @_counted
    def attach(self, which: int, number: int) -> None:
        self.world.attach(which, number)

    @rule(which=_which)
    @_counted
    def discard_disk(self, which: int) -> None:
        self.world.discard_disk(which)

    @rule(which=_which, to=_which)
    @_counted
    def migrate(self, which: int, to: int) -> None:
        self.world.migrate(which, to)

    @rule()
    @_counted
    def foreign_snapshot(self) -> None:
        self.world.snapshot()

    @rule(which=_which)
    @_counted
    def foreign_snapshot_destroyed(self, which: int) -> None:
        self.world.destroy_snapshot(which)

    @rule()
    @_counted
    def foreign_backup(self) -> None:
        self.world.backup()

    @rule()
    @_counted
    def foreign_backup_forgotten(self) -> None:
        self.world.forget_backup()

    @rule(which=_which)
    @_counted
    def revert(self, which: int) -> None:
        self.world.revert(which)

    @rule(which=_which, data_only=st.booleans())
    @_counted
    def lose_our_snapshot(self, which: int, *, data_only: bool) -> None:
        self.world.lose(which, data_only=data_only)

    @rule(which=_which)
    @_counted
    def remove_point(self, which: int) -> None:
        self.world.remove_point(which)

    # ── syncs ────────────────────────────────────────────────────────────────────────────────

    @rule(when=_when, which=_which, kind=_kind, seed=_seed)
    @_counted
    def sync(self, when: str, which: int, kind: str, seed: int) -> None:
        def write() -> None:
            self.world.write(which, kind, seed)

        if when == "before":
            write()
        self._sync(Attempt(self.world), during=write if when == "during" else None)

    @rule(full=st.booleans(), which=_which)
    @_counted
    def sync_otherwise(self, *, full: bool, which: int) -> None:
        disks = self.world.attached
        excluded = [] if full or len(disks) < 2 else [disks[which % len(disks)]]
        self._sync(Attempt(self.world, full=full, excluded=excluded))

    @rule(kind=_trouble, at=st.integers(0, 600), full=st.booleans(), seed=_seed)
    @_counted
    def sync_disturbed(self, kind: str, at: int, *, full: bool, seed: int) -> None:
        if kind == "kill":
            HistoryMachine.kills -= 1
            # not before it does anything at all
            trouble = Trouble("kill", 400 + at) if self.kills >= 0 else Trouble("cancel", at)
        else:
            trouble = Trouble(kind, at)
        self._disturbed(trouble, full=full and at % 2 == 0, seed=seed)

    @rule(at=st.integers(15, 150), full=st.booleans(), seed=_seed)
    @_counted
    def sync_broken_off(self, at: int, *, full: bool, seed: int) -> None:
        self._disturbed(Trouble("break off", at), full=full and at % 2 == 0, seed=seed)

    def _disturbed(self, trouble: Trouble, *, full: bool, seed: int) -> None:
        self.world.write(seed, "scattered", seed)
        attempt = Attempt(self.world, full=full)
        self._sync(attempt, trouble, during=lambda: self.world.write(seed + 1, "end", seed))

    def _sync(
        self,
        attempt: Attempt,
        trouble: Trouble | None = None,
        *,
        during: Callable[[], None] | None = None,
    ) -> None:
        HistoryMachine.syncs += 1
        attempt.run(trouble=trouble, during=during)
