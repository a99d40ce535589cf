"""stub"""
from .https import Request, Stream
from .pool import HostAddress, SimulatedPool
from collections.abc import Callable

class Handlers:
    def __init__(self, pool: SimulatedPool, host: HostAddress) -> None:
        pass
    def table(self) -> dict[tuple[str, str], Callable[[Request, Stream], None]]:
        return {}
