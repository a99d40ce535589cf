"""Who is promised room in a store, who waits for it, and who is refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from cbtfs import errors, store as stores
from cbtfs.space import Space
from cbtfs.store import Store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store with 100 bytes free."""
    with stores.open_store(tmp_path / "store") as made:
        monkeypatch.setattr(made, "free_space", lambda: 100)
        yield made


class Runs:
    """Runs that need room, and what became of them."""

    def __init__(self, store: Store) -> None:
        self.space = Space(store)
        self.told: list[str] = []
        self._scopes: dict[str, trio.CancelScope] = {}

    async def run(self, name: str, needed: int) -> None:
        def waits() -> None:
            self.told.append(f"{name} waits")

        with trio.CancelScope() as self._scopes[name]:
            async with self.space.held(needed, name=name, waits=waits):
                self.told.append(f"{name} runs")
                await trio.sleep_forever()

    async def begin(self, nursery: trio.Nursery, name: str, needed: int) -> None:
        nursery.start_soon(self.run, name, needed)
        await trio.testing.wait_all_tasks_blocked()

    async def end(self, name: str) -> None:
        self._scopes[name].cancel()
        await trio.testing.wait_all_tasks_blocked()

    async def use_up(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let ``a`` end with all that it was promised written, once another waits."""
        await trio.testing.wait_all_tasks_blocked()
        monkeypatch.setattr(store, "free_space", lambda: 40)
        await self.end("a")


async def test_what_fits_together_runs_together(store: Store) -> None:
    runs = Runs(store)
    async with trio.open_nursery() as nursery:
        await runs.begin(nursery, "a", 60)
        await runs.begin(nursery, "b", 40)
        nursery.cancel_scope.cancel()

    assert runs.told == ["a runs", "b runs"]


async def test_what_is_promised_to_one_is_not_there_for_another(store: Store) -> None:
    runs = Runs(store)
    async with trio.open_nursery() as nursery:
        await runs.begin(nursery, "a", 60)
        await runs.begin(nursery, "b", 60)
        await runs.begin(nursery, "c", 30)
        await runs.end("c")
        assert runs.told == ["a runs", "b waits", "c runs"]
        await runs.end("a")
        nursery.cancel_scope.cancel()

    assert runs.told[3:] == ["b runs"]


async def test_who_gives_up_waiting_takes_nothing(store: Store) -> None:
    runs = Runs(store)
    async with trio.open_nursery() as nursery:
        await runs.begin(nursery, "a", 60)
        await runs.begin(nursery, "b", 60)
        await runs.end("b")
        await runs.end("a")
        await runs.begin(nursery, "c", 100)
        nursery.cancel_scope.cancel()

    assert runs.told == ["a runs", "b waits", "c runs"]


async def test_who_needs_no_room_never_waits(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(store)
    async with trio.open_nursery() as nursery:
        await runs.begin(nursery, "a", 100)
        monkeypatch.setattr(store, "free_space", lambda: 40)  # the rest of it is written
        await runs.begin(nursery, "b", 0)
        nursery.cancel_scope.cancel()

    assert runs.told == ["a runs", "b runs"]


async def test_more_than_there_is_is_refused_at_once(store: Store) -> None:
    runs = Runs(store)
    async with trio.open_nursery() as nursery:
        await runs.begin(nursery, "a", 60)
        with pytest.raises(errors.StoreFull, match=r"web1 needs about 101 B and .* has 100 B free"):
            await runs.run("web1", 101)
        nursery.cancel_scope.cancel()


async def test_who_waited_in_vain_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(store)
    async with trio.open_nursery() as nursery:
        await runs.begin(nursery, "a", 60)
        nursery.start_soon(runs.use_up, store, monkeypatch)
        with pytest.raises(errors.StoreFull):
            await runs.run("b", 60)
        nursery.cancel_scope.cancel()

    assert runs.told == ["a runs", "b waits"]
