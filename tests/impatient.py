"""Run by tests: ``cbtfs`` as it is, but a host that is silent for a second or two counts as dead.

The real command waits a minute, and nothing in its configuration shortens that.
"""

import sys
from dataclasses import replace
from functools import partial
from unittest import mock

from cbtfs import cli, config, peers, xapi
from cbtfs.config import ChosenPool
from cbtfs.nbd import Timeouts
from cbtfs.pool import PoolOptions

PATIENCE = 2.0

_pool_options = config.pool_options


def pool_options(chosen: ChosenPool, **others: object) -> PoolOptions:
    """Return what the configuration says, with less patience for NBD hosts."""
    told = _pool_options(chosen, **others)  # type: ignore[arg-type]
    return replace(told, timeouts=Timeouts(connect=PATIENCE, request=PATIENCE / 2, close=PATIENCE))


if __name__ == "__main__":
    quick = partial(xapi.open_session, timeout=PATIENCE)
    with (
        mock.patch.object(config, "pool_options", pool_options),
        mock.patch.object(xapi, "open_session", quick),
        mock.patch.object(peers, "_PROBE_TIMEOUT", PATIENCE),
    ):
        sys.exit(cli.main())
