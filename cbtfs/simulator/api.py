"""The API's entry: one HTTP body in, one out. (Skeleton: signatures are final.)"""

from .pool import SimulatedPool


def handle_rpc(
    pool: SimulatedPool, host_ref: str, *, path: str, body: bytes, client: str
) -> tuple[int, str, bytes]:
    """Answer one XML-RPC (``/``, ``/RPC2``) or JSON-RPC (``/json``, ``/jsonrpc``) request.

    Returns:
        HTTP status, content type and body. Blocks as long as the call does; run it in the
        connection's thread. Unparseable: 500 with HTML.
    """
    raise NotImplementedError
