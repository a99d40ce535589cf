"""A simulated Xen pool: XenAPI over HTTPS, NBD as xapi-nbd serves it, and its guests.

No Xen runs on a developer's machine, and no client is tested by mocks of itself; so this part of
cbtfs plays the pool, with its certificates, its limits and its bad habits, in a process of its own.
It shares no logic with the code that it tests. In reading order:

- ``life``: start, stop, set, control: what the command line and the tests call; ``memory``: what
  they learn from the directory
- ``service``: the process that they start (``python -m cbtfs.simulator``)
- ``server``: a pool with all its wires; ``controlsocket`` steers it
- ``scenarios``: what a fresh pool holds; ``topology``, ``default_scenario``
- ``filesystem``, ``lvm``, ``partitions``: real disk contents, made without root
- ``https``, ``xapiserver``, ``handlers``: HTTP as xapi speaks it; ``vhd``, ``metadata``: what it
  exports
- ``xapinbd``, ``guest``, ``nbdwire``: the hosts' NBD servers, the guests' writable disks
- ``listener``, ``certificates``: sockets and threads, TLS
- ``pool``, ``api`` and the rest: records, calls, storage, change logs, faults

The functions are here: `start`, `become`, `stop`, `status`, `set_values`, `control`. They import
nothing of the pool.
"""

from .life import become, control, is_running, set_values, start, status, stop
from .memory import Ports

__all__ = ["Ports", "become", "control", "is_running", "set_values", "start", "status", "stop"]
