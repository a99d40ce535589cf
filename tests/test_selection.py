"""Names, globs, tags and storage repositories select the VMs that are meant."""

from dataclasses import replace

import pytest

from cbtfs import errors, selection
from cbtfs.inventory import SR, VBD, VDI, VM, Inventory, Pool

LIVE = VDI(ref="live", uuid="d15c0000-0000-4000-8000-000000000001", sr_ref="sr", vbd_refs=("b",))
WEB1 = VM(ref="vm", uuid="00000000-0000-4000-8000-00000000000a", name="web1", vbd_refs=("b",))


def pool(vdi: VDI, *, vms: tuple[VM, ...] = (WEB1,)) -> Inventory:
    return Inventory(
        pool=Pool(uuid="p", name="prod"),
        srs={"sr": SR(ref="sr", uuid="57", name="ssd", host_refs=("h",))},
        vms={vm.ref: vm for vm in vms},
        vbds={"b": VBD(ref="b", vm_ref="vm", vdi_ref="live", device="xvda")},
        vdis={vdi.ref: vdi},
    )


def machine(name: str, number: int, *, tags: tuple[str, ...] = ()) -> VM:
    uuid = f"00000000-0000-4000-8000-{number:012x}"
    return VM(ref=name + uuid, uuid=uuid, name=name, tags=frozenset(tags))


FLEET = pool(
    LIVE,
    vms=(
        WEB1,
        machine("web2", 2, tags=("gold",)),
        machine("db1", 3, tags=("gold", "silver")),
        machine("odd[1]", 4),
        replace(machine("web9", 9), is_a_snapshot=True),
    ),
)


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["web1"], ["web1"]),
        (["web*"], ["web1", "web2"]),
        (["db1", "web?"], ["db1", "web1", "web2"]),
        (["web*", "web1"], ["web1", "web2"]),
        ([WEB1.uuid], ["web1"]),
        (["tag:gold"], ["db1", "web2"]),
        (["tag:s*"], ["db1"]),
        (["tag:none", "web1"], ["web1"]),
        (["sr:ss?"], ["web1"]),
        (["sr:57"], ["web1"]),
        (["odd[1]"], ["odd[1]"]),
    ],
)
def test_patterns_select_live_vms(patterns: list[str], names: list[str]) -> None:
    assert [vm.name for vm in selection.select_vms(FLEET, patterns)] == names


@pytest.mark.parametrize("patterns", [[], ["x*"], ["tag:x"], ["sr:x", "tag:y"]])
def test_selecting_nothing_at_all_is_an_error(patterns: list[str]) -> None:
    with pytest.raises(errors.NotFound, match="no VM of pool 'prod' matches"):
        selection.select_vms(FLEET, patterns)


@pytest.mark.parametrize("name", ["web9", "Web1", ""])
def test_a_plain_name_must_exist(name: str) -> None:
    with pytest.raises(errors.NotFound, match=f"no VM called '{name}'"):
        selection.select_vms(FLEET, ["web1", name])


def test_a_vm_whose_sr_is_unknown_is_in_no_sr() -> None:
    lost = pool(replace(LIVE, sr_ref="gone"))

    with pytest.raises(errors.NotFound):
        selection.select_vms(lost, ["sr:*"])


HOSTILE = machine("line\nbreak", 5)
TWINS = (machine("web2", 0xAAAAAAAA), machine("web2", 6))


@pytest.mark.parametrize("pattern", ["line\nbreak", "line\\x0abreak", "line_break~00000000"])
def test_a_name_can_be_written_as_it_is_printed(pattern: str) -> None:
    assert selection.select_vms(pool(LIVE, vms=(HOSTILE, WEB1)), [pattern]) == [HOSTILE]


def test_a_name_that_is_one_goes_before_one_that_is_printed_so() -> None:
    literal = machine("line\\x0abreak", 7)

    found = selection.select_vms(pool(LIVE, vms=(HOSTILE, literal)), ["line\\x0abreak"])

    assert found == [literal]
