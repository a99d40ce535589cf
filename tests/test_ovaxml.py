"""What is taken out of a VM's metadata, and what stays."""

import io
import tarfile
import xmlrpc.client

import pytest
from hypothesis import given, strategies as st

from cbtfs import errors, ovaxml
from cbtfs.simulator import values

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=20)


def content(name: str = "web1", *, disks: int = 2, macs: tuple[str, ...] = ()) -> bytes:
    """Return a ``vm.xml`` as xapi writes it."""
    objects: list[values.Value] = [
        thing("VM", "Ref:0", uuid="vm", name_label=name, power_state="Suspended", VBDs=["Ref:1"])
    ]
    for number in range(disks):
        at, place = f"Ref:d{number}", str(disks - number)
        disk: dict[str, values.Value] = {
            "type": "Disk",
            "mode": "RW",
            "userdevice": place,
            "bootable": number == 0,
        }
        objects.append(thing("VBD", f"{at}b", VDI=at, VM="Ref:0", **disk))
        objects.append(thing("VDI", at, uuid=f"disk {number}", SR="Ref:sr"))
    objects.append(thing("SR", "Ref:sr", uuid="sr"))
    objects.append(thing("VBD", "Ref:cd", VDI="Ref:iso", type="CD", currently_attached=True))
    objects.append(thing("VDI", "Ref:iso", uuid="iso", SR="Ref:isos"))
    objects.append(thing("SR", "Ref:isos", uuid="isos"))
    objects.append(thing("network", "Ref:net", uuid="net", name_label="lan", bridge="xenbr0"))
    for number, mac in enumerate(macs):
        objects.append(
            thing("VIF", f"Ref:v{number}", MAC=mac, network="Ref:net", device=str(number))
        )
    return values.xml({"version": {"export_vsn": "2"}, "objects": objects}).encode()


def thing(kind: str, key: str, **record: values.Value) -> values.Value:
    """Return one object of an export."""
    return {"class": kind, "id": key, "snapshot": dict(record)}


def left(taken: ovaxml.Metadata) -> dict[str, dict[str, object]]:
    """Return what the archive still has, by id."""
    with tarfile.open(fileobj=io.BytesIO(taken.archive)) as archive:
        file = archive.extractfile("ova.xml")
        assert file is not None
        text = file.read().decode()
    (found,), _ = xmlrpc.client.loads(f"<params><param>{text}</param></params>")
    assert isinstance(found, dict)
    return {str(item["id"]): item["snapshot"] for item in found["objects"]}


def test_disks_and_cards_are_taken_out_in_the_order_of_their_devices() -> None:
    taken = ovaxml.take_apart(content(disks=11, macs=("aa", "bb")), name="new")

    assert [slot.fields["userdevice"] for slot in taken.slots] == [str(n) for n in range(1, 12)]
    assert taken.slots[-1].vdi_uuid == "disk 0"
    assert taken.slots[-1].fields["bootable"] is True
    assert [(card.mac, card.network_name) for card in taken.cards] == [("aa", "lan"), ("bb", "lan")]


def test_the_vm_and_its_cd_drive_stay() -> None:
    stays = left(ovaxml.take_apart(content(macs=("aa",)), name="new"))

    assert set(stays) == {"Ref:0", "Ref:cd", "Ref:iso", "Ref:isos"}
    assert stays["Ref:0"]["name_label"] == "new"
    assert stays["Ref:0"]["power_state"] == "Halted"
    assert stays["Ref:cd"]["currently_attached"] is False


def test_maps_of_the_vm_get_a_tag_and_lose_our_blocks() -> None:
    maps: dict[str, values.Value] = {
        "other_config": {"k": "v", "tag": "another's"},
        "blocked_operations": {"start": "ours", "start_on": "ours", "destroy": "theirs"},
    }
    objects: list[values.Value] = [thing("VM", "Ref:0", name_label="web1", **maps)]
    text = values.xml({"version": {"export_vsn": "2"}, "objects": objects}).encode()

    taken = ovaxml.take_apart(
        text, name="n", other_config={"tag": "<&>"}, is_ours=lambda reason: reason == "ours"
    )

    assert left(taken)["Ref:0"]["other_config"] == {"k": "v", "tag": "<&>"}
    assert left(taken)["Ref:0"]["blocked_operations"] == {"destroy": "theirs"}
    kept = left(ovaxml.take_apart(text, name="n"))["Ref:0"]
    assert {name: kept[name] for name in maps} == maps


@given(TEXT, TEXT)
def test_any_name_can_be_replaced_by_any_other(old: str, new: str) -> None:
    stays = left(ovaxml.take_apart(content(old), name=new))

    assert stays["Ref:0"]["name_label"] == new


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<value>",
        b"<value><struct></struct></value>",
        content()[:-20],
        b'<!DOCTYPE x [<!ENTITY a "b">]>' + content(),
        values.xml({"objects": []}).encode(),
        values.xml({"objects": [thing("VM", "1"), thing("VM", "2")]}).encode(),
        b"<a>" * 100_000,
    ],
)
def test_what_is_not_as_xapi_wrote_it_is_refused(data: bytes) -> None:
    with pytest.raises(errors.StoreError, match="not as xapi wrote it"):
        ovaxml.take_apart(data, name="new")
