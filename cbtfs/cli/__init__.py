"""The command line of cbtfs: one small function per verb, exit statuses, the only ``trio.run()``.

In reading order:

- ``app``: global options, the verbs, the door that every error passes
- ``context``: what the global options open (configuration, pool, store)
- ``pools`` (ls, info), ``mounting``, ``syncing`` (sync), ``points`` (list), ``diffing`` and
  ``growth`` (diff), ``verifying``, ``pruning`` (prune, pin), ``doctoring``, ``configuring``,
  ``simulating``, ``demo``: the verbs
- ``listing``: what ls shows, as records
- ``forecast``: what a sync would do, and how much; ``outcomes``: what one has done
- ``output``, ``failures``, ``running``: tables and JSON, errors and statuses, signals
"""

from .app import main

__all__ = ["main"]
