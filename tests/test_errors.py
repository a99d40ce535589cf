"""The class of an error says how the program ends."""

import re

import pytest

from cbtfs import errors
from cbtfs.errors import CbtfsError


def every(root: type[CbtfsError] = CbtfsError) -> list[type[CbtfsError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in every(child))]


def test_the_tree_in_the_docstring_is_the_real_one() -> None:
    drawn = re.findall(r"(\w+) +(\d+)\b", (errors.__doc__ or "").replace("exit ", ""))

    own = [kind for kind in every() if kind.__module__ == errors.__name__]
    assert [
        (kind.__name__, str(kind.exit_code)) for kind in own if kind is not errors.Interrupted
    ] == [line for line in drawn if line[0] != "Interrupted" and line[0] != "130"]


@pytest.mark.parametrize(("signum", "code"), [(2, 130), (15, 143)])
def test_a_signal_decides_the_exit_status(signum: int, code: int) -> None:
    assert errors.Interrupted(signum).exit_code == code


def test_an_xapi_failure_keeps_code_and_parameters() -> None:
    failure = errors.XapiFailure(
        "VDI_IN_USE", ("OpaqueRef:1", "data_destroy", ""), method="VDI.data_destroy"
    )

    assert (failure.code, failure.params) == ("VDI_IN_USE", ("OpaqueRef:1", "data_destroy", ""))
    assert str(failure) == "VDI.data_destroy: xapi answered VDI_IN_USE (data_destroy)"


def test_an_xapi_failure_may_have_nothing_but_its_code() -> None:
    assert str(errors.XapiFailure("SR_FULL")) == "xapi answered SR_FULL"


def test_a_bitmap_that_cannot_be_had_has_a_reason() -> None:
    unknown = errors.ChangesUnknown("no bitmap", reason="cbt-off")

    assert (str(unknown), unknown.reason) == ("no bitmap", "cbt-off")
