"""Run a simulated pool: ``python -m cbtfs.simulator DIR [--scenario NAME]``."""

import argparse
import logging
import os
import sys

from cbtfs import errors

from . import memory, service
from .memory import Ports


def main(arguments: list[str] | None = None) -> int:
    """Run the pool that the command line names; return the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
    )
    if options.background and os.fork():
        os._exit(0)  # the child goes on without a parent that would have to wait for it
    if options.background:
        os.setsid()
    ports = Ports(options.https_port, options.nbd_port) if options.https_port else None
    try:
        service.run(
            options.directory, scenario=options.scenario, ports=ports, address=options.address,
            ready=options.ready,
        )  # fmt: skip
    except errors.CbtfsError as exc:
        if options.ready >= 0:
            os.write(options.ready, str(exc).encode())
        logging.getLogger(__name__).error("%s", exc)
        return exc.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cbtfs.simulator", description=__doc__)
    parser.add_argument("directory", help="where the pool lives; filled if empty")
    parser.add_argument("--scenario", default="default", choices=memory.SCENARIOS)
    parser.add_argument("--address", default=memory.FIRST_ADDRESS, help="of the first host")
    parser.add_argument("--https-port", type=int, default=0, help="default: a free one")
    parser.add_argument("--nbd-port", type=int, default=0, help="default: a free one")
    parser.add_argument("--verbose", action="store_true", help="log every connection")
    parser.add_argument("--background", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ready", type=int, default=-1, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
