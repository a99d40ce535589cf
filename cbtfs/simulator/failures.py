"""SimError: a failure as xapi words it, a code and its parameters."""


class SimError(Exception):
    """What a call of the simulated pool fails with.

    Args:
        code: xapi's error code, such as ``VDI_IN_USE``.
        params: its parameters, in xapi's order.
    """

    def __init__(self, code: str, *params: str) -> None:
        self.code = code
        self.params = params
        super().__init__(": ".join([code, *params]))


def storage(number: int, description: str, *, detail: str) -> SimError:
    """Return the failure of a storage driver as xapi passes it on.

    The driver's fault carries ``description [opterr=detail]``; xapi adds its standard error,
    which is empty here (sm, drivers/xs_errors.py; xen-api, ocaml/xapi/sm_exec.ml).
    """
    return SimError(f"SR_BACKEND_FAILURE_{number}", "", f"{description} [opterr={detail}]", "")
