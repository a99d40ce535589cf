"""``python -m cbtfs`` and the ``cbtfs`` program."""

import gc
import sys

gc.disable()  # none of what is imported is garbage: to look for some takes a tenth of the start
from . import cli  # noqa: E402

gc.freeze()
gc.enable()


def main() -> None:
    """Run the command line and exit with its status."""
    sys.exit(cli.main())


if __name__ == "__main__":
    main()
