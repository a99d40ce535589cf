"""A feed misses nothing: what it cannot be sure of, it reads anew."""

from collections.abc import AsyncIterator, Iterator

import pytest
import trio

from cbtfs import errors
from cbtfs.events import Feed
from cbtfs.pool import Pool
from cbtfs.replica import Batch, Replica

from .pools import in_good_order, opened, vm_of
from .simulated import Api, RunningPool

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def simulated(started: RunningPool) -> Iterator[RunningPool]:
    with in_good_order(started) as pool:
        yield pool


@pytest.fixture
async def pool(simulated: RunningPool) -> AsyncIterator[Pool]:
    async with opened(simulated) as pool:
        yield pool


@pytest.fixture
async def feed(pool: Pool) -> Feed:
    feed = pool.feed()
    assert (await feed.next()).tables is not None
    return feed


@pytest.fixture
async def web1(pool: Pool) -> str:
    return vm_of(await pool.inventory(), "web1").ref


async def in_thread(api: Api, method: str, *params: object) -> str:
    return str(await trio.to_thread.run_sync(api.call, method, *params))


def tag(simulated: RunningPool, vm: str, text: str) -> None:
    """Change something harmless of a VM."""
    Api(simulated).login().call("VM.set_tags", vm, [text])


async def until_tagged(feed: Feed, vm: str, text: str) -> list[Batch]:
    """Return the batches up to the one that tells of the tag."""
    found: list[Batch] = []
    while True:
        batch = await feed.next()
        found.append(batch)
        if any(e.ref == vm and text.encode() in bytes(e.record) for e in batch.events):
            return found


async def test_the_first_batch_is_the_whole_pool(pool: Pool) -> None:
    replica = Replica()

    replica.apply(await pool.feed().next())

    assert replica.inventory() == await pool.inventory()


async def test_events_keep_a_replica_like_the_pool(
    pool: Pool, simulated: RunningPool, web1: str
) -> None:
    feed, replica = pool.feed(), Replica()
    replica.apply(await feed.next())
    api = Api(simulated).login()
    snapshot = await in_thread(api, "VM.snapshot", web1, "followed")
    replica.apply(await feed.next())
    assert snapshot in replica.inventory().vms

    await in_thread(api, "VM.destroy", snapshot)

    batch = await feed.next()
    replica.apply(batch)
    assert snapshot not in replica.inventory().vms
    assert not replica.lacks(batch)
    assert replica.inventory().vdis == (await pool.inventory()).vdis


async def test_a_change_comes_as_an_event_not_as_everything(
    feed: Feed, simulated: RunningPool, web1: str
) -> None:
    tag(simulated, web1, "plain")

    batches = await until_tagged(feed, web1, "plain")

    assert all(batch.tables is None for batch in batches)


@pytest.mark.parametrize(
    "disaster",
    [("restart-xapi",), ("expire-sessions",), ("failover", "xcp2"), ("failover", "xcp1")],
)
async def test_after_a_new_login_everything_is_read_anew(
    feed: Feed, simulated: RunningPool, web1: str, disaster: tuple[str, ...]
) -> None:
    await trio.to_thread.run_sync(lambda: simulated.control(*disaster))

    batches = [await feed.next()]
    while batches[-1].tables is None:
        batches.append(await feed.next())

    assert batches[-1].tables is not None
    assert web1 in batches[-1].tables["VM"]


async def test_a_refused_token_means_that_everything_is_read_anew(
    feed: Feed, simulated: RunningPool
) -> None:
    simulated.set("xapi.fail", "event.from*1:EVENT_FROM_TOKEN_PARSE_FAILURE:x")

    assert (await feed.next()).tables is not None


async def test_starting_over_means_that_everything_is_read_anew(feed: Feed) -> None:
    feed.start_over()

    assert (await feed.next()).tables is not None


async def test_a_failure_loses_no_event(feed: Feed, simulated: RunningPool, web1: str) -> None:
    simulated.set("xapi.fail", "event.from*1:INTERNAL_ERROR")
    with pytest.raises(errors.XapiFailure):
        await feed.next()

    tag(simulated, web1, "after a failure")

    assert await until_tagged(feed, web1, "after a failure")


async def test_a_failure_while_everything_is_read_leaves_nothing_half_known(
    feed: Feed, simulated: RunningPool
) -> None:
    feed.start_over()
    simulated.set("xapi.fail", "VDI.get_all_records*1:INTERNAL_ERROR")
    with pytest.raises(errors.XapiFailure):
        await feed.next()

    assert (await feed.next()).tables is not None
