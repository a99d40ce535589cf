"""The mount shows the whole pool, whatever the pool calls its things."""

import json
import posixpath
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, strategies as st

from cbtfs import errors, inventory as inventories, tree
from cbtfs.catalogue import Catalogue, Point, VMHistory
from cbtfs.descriptions import is_shown
from cbtfs.inventory import SR, VBD, VDI, VM, Host, Inventory, Network, Owned, Pool
from cbtfs.tree import ROOT, Node, Tree

NOW = datetime(2026, 11, 22, 9, 0, tzinfo=UTC)
TWO = datetime(2026, 11, 22, 2, 0, tzinfo=UTC)
THREE = datetime(2026, 11, 22, 3, 0, tzinfo=UTC)


def uuid(number: int) -> str:
    return f"{number:08x}-0000-4000-8000-000000000000"


ROOT_DISK = VDI(
    ref="d1", uuid=uuid(1), name="root disk", sr_ref="s", size=4096, used=1000, vbd_refs=("b1",)
)
NIGHTLY_DISK = replace(
    ROOT_DISK,
    ref="d2",
    uuid=uuid(2),
    is_a_snapshot=True,
    snapshot_of="d1",
    snapshot_time=TWO,
    vbd_refs=("b2",),
)
WEB1 = VM(ref="v1", uuid=uuid(11), name="web1", vbd_refs=("b1",), tags=frozenset({"gold"}))
NIGHTLY = VM(
    ref="v2",
    uuid=uuid(12),
    name="nightly",
    is_a_template=True,
    is_a_snapshot=True,
    snapshot_of="v1",
    snapshot_time=TWO,
    vbd_refs=("b2",),
)
STORAGE = SR(ref="s", uuid=uuid(21), name="Local storage", type="ext", cbt_capable=True)


def pool(
    *,
    vdis: tuple[VDI, ...] = (ROOT_DISK, NIGHTLY_DISK),
    vms: tuple[VM, ...] = (WEB1, NIGHTLY),
    srs: tuple[SR, ...] = (STORAGE,),
) -> Inventory:
    vbds = [
        VBD(ref="b1", vm_ref="v1", vdi_ref="d1", device="xvda"),
        VBD(ref="b2", vm_ref="v2", vdi_ref="d2", device="xvda"),
    ]
    return Inventory(
        pool=Pool(uuid=uuid(99), name="prod", master_ref="h"),
        hosts={"h": Host(ref="h", uuid=uuid(31), name="xcp1", address="192.0.2.1")},
        srs={sr.ref: sr for sr in srs},
        vms={vm.ref: vm for vm in vms},
        vbds={vbd.ref: vbd for vbd in vbds},
        vdis={vdi.ref: vdi for vdi in vdis},
        networks={"n": Network(ref="n", purpose=frozenset({"nbd"}))},
    )


def build(inventory: Inventory, *, backups: Catalogue | None = None) -> Tree:
    return tree.build(inventory, backups=backups, store_path="/srv/backup", now=NOW)


def find(found: Tree, path: str) -> Node:
    node = found.node(ROOT)
    for name in path.split("/") if path else []:
        below = found.lookup(node.inode, name)
        assert below is not None, path
        node = below
    return node


def names(found: Tree, path: str) -> list[str]:
    return [node.name for node in found.children(find(found, path).inode)]


def paths(found: Tree, top: int = ROOT, prefix: str = "") -> Iterator[tuple[str, Node]]:
    for node in found.children(top):
        yield prefix + node.name, node
        yield from paths(found, node.inode, f"{prefix}{node.name}/")


def document(found: Tree, path: str) -> dict[str, object]:
    loaded: dict[str, object] = json.loads(find(found, path).content)
    return loaded


# ── Layout ───────────────────────────────────────────────────────────────────────────────────


def test_the_tree_is_as_documented() -> None:
    expected = {
        "README.txt": "",
        "pool.json": "",
        "by-uuid": "",
        f"by-uuid/{uuid(1)}.raw": "",
        f"by-uuid/{uuid(1)}.json": "",
        f"by-uuid/{uuid(2)}.raw": "",
        f"by-uuid/{uuid(2)}.json": "",
        "by-vm": "",
        "by-vm/web1": "",
        "by-vm/web1/vm.json": "",
        "by-vm/web1/xvda.raw": f"../../by-uuid/{uuid(1)}.raw",
        "by-vm/web1/snapshots": "",
        "by-vm/web1/snapshots/20261122T020000Z~nightly": "",
        "by-vm/web1/snapshots/20261122T020000Z~nightly/xvda.raw": (
            f"../../../../by-uuid/{uuid(2)}.raw"
        ),
        "by-vm/web1/snapshots/latest": "20261122T020000Z~nightly",
        "by-name": "",
        "by-name/root disk.raw": f"../by-uuid/{uuid(1)}.raw",
        "by-sr": "",
        "by-sr/Local storage": "",
        "by-sr/Local storage/root disk.raw": f"../../by-uuid/{uuid(1)}.raw",
    }

    assert {path: node.target for path, node in paths(build(pool()))} == expected


def test_every_link_leads_to_something_in_the_tree() -> None:
    found = build(pool())
    links = [(path, node.target) for path, node in paths(found) if node.kind == "link"]

    for path, target in links:
        end = posixpath.normpath(f"{posixpath.dirname(path)}/{target}")
        assert find(found, end).kind in {"file", "dir"}
    assert len(links) == 5


def test_backups_are_links_into_the_store() -> None:
    points = tuple(
        Point(time=t, vm_uuid=uuid(11)) for t in ("20261121T020000Z", "20261122T020000Z")
    )
    vms = {
        uuid(11): VMHistory(uuid(11), "web1", points),
        uuid(12): VMHistory(uuid(12), "never", ()),
    }

    found = build(pool(), backups=Catalogue(vms))

    assert {p: n.target for p, n in paths(found) if p.startswith("backups/")} == {
        "backups/web1": "",
        "backups/web1/20261121T020000Z": f"/srv/backup/{uuid(11)}/20261121T020000Z",
        "backups/web1/20261122T020000Z": f"/srv/backup/{uuid(11)}/20261122T020000Z",
        "backups/web1/latest": "20261122T020000Z",
    }


def test_an_empty_store_still_has_its_folder() -> None:
    assert names(build(pool(), backups=Catalogue({})), "backups") == []


@pytest.mark.parametrize(
    "hidden",
    [
        replace(ROOT_DISK, type="cbt_metadata"),
        replace(ROOT_DISK, type="suspend"),
        replace(ROOT_DISK, managed=False),
        replace(ROOT_DISK, missing=True),
        replace(
            ROOT_DISK,
            other_config={
                inventories.TAG_OWNER: inventories.write_owner(
                    Owned(self_uuid=ROOT_DISK.uuid, role="live")
                )
            },
        ),
    ],
    ids=["metadata", "suspend", "base copy", "missing", "temporary snapshot"],
)
def test_what_cannot_be_read_is_not_shown(hidden: VDI) -> None:
    found = build(pool(vdis=(hidden,)))

    assert [p for p, node in paths(found) if node.vdi_ref or node.kind == "link"] == [
        "by-vm/web1/snapshots/latest"
    ]
    assert names(found, "by-uuid") == names(found, "by-sr") == []


def test_the_base_of_a_store_is_shown_while_it_has_data() -> None:
    owned = Owned(self_uuid=NIGHTLY_DISK.uuid, role="base", store="x")
    tagged = {inventories.TAG_OWNER: inventories.write_owner(owned)}

    assert is_shown(replace(NIGHTLY_DISK, other_config=tagged))


def test_templates_and_control_domains_are_no_vms_here() -> None:
    others = (
        replace(WEB1, ref="t", uuid=uuid(13), is_a_template=True),
        replace(WEB1, ref="c", uuid=uuid(14), is_control_domain=True),
    )

    assert names(build(pool(vms=others)), "by-vm") == []


def test_snapshots_are_named_by_time_and_name_and_latest_is_the_newest() -> None:
    unnamed = replace(NIGHTLY, ref="v3", uuid=uuid(13), name="", snapshot_time=THREE)
    twin = replace(NIGHTLY, ref="v4", uuid=uuid(14))

    found = build(pool(vms=(WEB1, unnamed, NIGHTLY, twin)))

    assert names(found, "by-vm/web1/snapshots") == [
        "20261122T020000Z~nightly~0000000c",
        "20261122T020000Z~nightly~0000000e",
        "20261122T030000Z~0000000d",
        "latest",
    ]
    assert find(found, "by-vm/web1/snapshots/latest").target == "20261122T030000Z~0000000d"


def test_a_vm_without_snapshots_has_no_latest() -> None:
    assert names(build(pool(vms=(WEB1,))), "by-vm/web1/snapshots") == []


def test_a_disk_in_an_unknown_sr_is_in_no_sr_folder() -> None:
    found = build(pool(srs=()))

    assert names(found, "by-sr") == []
    assert names(found, "by-name") == ["root disk.raw"]


# ── Nodes ────────────────────────────────────────────────────────────────────────────────────


def test_an_image_has_the_size_of_its_disk_and_the_space_it_takes() -> None:
    node = find(build(pool()), f"by-uuid/{uuid(1)}.raw")

    assert (node.kind, node.vdi_ref, node.content) == ("file", "d1", b"")
    assert (node.size, node.blocks) == (4096, 2)


@pytest.mark.parametrize(("used", "blocks"), [(1023, 2), (1024, 2), (1025, 3)])
def test_blocks_have_512_bytes_and_count_when_begun(used: int, blocks: int) -> None:
    found = build(pool(vdis=(replace(ROOT_DISK, used=used),)))

    assert find(found, f"by-uuid/{uuid(1)}.raw").blocks == blocks


@pytest.mark.parametrize(("size", "blocks"), [(0, 0), (1, 1), (1 << 44, 1)])
def test_an_image_never_looks_like_one_hole(size: int, blocks: int) -> None:
    found = build(pool(vdis=(replace(ROOT_DISK, size=size, used=0),)))

    assert find(found, f"by-uuid/{uuid(1)}.raw").blocks == blocks


def test_a_snapshot_is_as_old_as_it_is_and_a_disk_is_new() -> None:
    found = build(pool())

    two, now = (int(when.timestamp()) * 10**9 for when in (TWO, NOW))
    assert find(found, f"by-uuid/{uuid(2)}.raw").mtime_ns == two
    assert find(found, "by-vm/web1/snapshots/20261122T020000Z~nightly").mtime_ns == two
    assert find(found, f"by-uuid/{uuid(1)}.raw").mtime_ns == now
    assert find(found, "by-vm").mtime_ns == find(found, "").mtime_ns == now


def test_a_time_before_1970_is_1970() -> None:
    ancient = replace(NIGHTLY_DISK, snapshot_time=datetime(1, 1, 1, tzinfo=UTC))

    assert find(build(pool(vdis=(ancient,))), f"by-uuid/{uuid(2)}.raw").mtime_ns == 0


def test_links_count_as_the_kernel_counts_them() -> None:
    found = build(pool())

    assert find(found, "").nlink == 2 + 4
    assert find(found, "by-vm/web1").nlink == 3
    assert find(found, "README.txt").nlink == find(found, "by-name/root disk.raw").nlink == 1
    assert find(found, "by-name/root disk.raw").size == len(f"../by-uuid/{uuid(1)}.raw")


def test_text_files_have_contents_of_their_size() -> None:
    found = build(pool())

    for path in ("README.txt", "pool.json", f"by-uuid/{uuid(1)}.json", "by-vm/web1/vm.json"):
        node = find(found, path)
        assert node.content.endswith(b"\n")
        assert (node.size, node.blocks) == (len(node.content), -(-len(node.content) // 512))


def test_pool_json_sums_up_the_pool() -> None:
    second = VDI(ref="x", uuid=uuid(3))
    found = document(build(pool(vdis=(ROOT_DISK, NIGHTLY_DISK, second))), "pool.json")

    assert found["schema"] == 1
    assert (found["name"], found["master"], found["nbd"]) == ("prod", uuid(31), "nbd")
    assert (found["vms"], found["disks"], found["snapshots"]) == (1, 2, 1)


def test_a_disk_is_described() -> None:
    found = document(build(pool()), f"by-uuid/{uuid(1)}.json")

    assert found["snapshots"] == [uuid(2)]
    assert found["vms"] == [{"uuid": uuid(11), "name": "web1", "device": "xvda"}]
    assert found["sr"] == {"uuid": uuid(21), "name": "Local storage", "type": "ext"}
    assert (found["snapshot_of"], found["snapshot_time"]) == ("", "")


def test_a_snapshot_is_described() -> None:
    found = document(build(pool(srs=())), f"by-uuid/{uuid(2)}.json")

    assert (found["snapshot_of"], found["snapshot_time"]) == (uuid(1), "20261122T020000Z")
    assert found["sr"] is None


def test_a_vm_is_described() -> None:
    found = document(build(pool()), "by-vm/web1/vm.json")

    assert (found["uuid"], found["tags"]) == (uuid(11), ["gold"])
    assert found["disks"] == [
        {"device": "xvda", "uuid": uuid(1), "name": "root disk", "size": 4096}
    ]
    assert found["snapshots"] == [
        {
            "uuid": uuid(12),
            "name": "nightly",
            "time": "20261122T020000Z",
            "folder": "20261122T020000Z~nightly",
        }
    ]


def test_a_pool_without_its_master_is_described_too() -> None:
    assert document(build(replace(pool(), hosts={})), "pool.json")["master"] == ""


# ── Looking up ───────────────────────────────────────────────────────────────────────────────


def test_lookup_takes_bytes_and_text() -> None:
    found = build(pool())

    assert found.lookup(ROOT, b"by-vm") == found.lookup(ROOT, "by-vm") == find(found, "by-vm")


@pytest.mark.parametrize("name", [b"\xff", "nothing", "", "\ud800"])
def test_lookup_of_what_is_not_there_is_none(name: bytes | str) -> None:
    found = build(pool())

    assert found.lookup(ROOT, name) is None
    assert found.lookup(12345, "by-vm") is None


def test_an_unknown_inode_is_an_error() -> None:
    with pytest.raises(errors.NotFound, match="12345"):
        build(pool()).node(12345)


def test_only_folders_have_children() -> None:
    found = build(pool())

    assert found.children(find(found, "README.txt").inode) == ()
    assert found.children(12345) == ()


def test_repr_and_length_count_nodes() -> None:
    found = build(pool())

    assert len(found) == len(list(paths(found))) + 1
    assert repr(found) == f"<Tree of {len(found)} nodes>"


# ── Inode numbers ────────────────────────────────────────────────────────────────────────────


def test_inodes_survive_renames_and_new_neighbours() -> None:
    before = build(pool())
    renamed = (replace(WEB1, name="www"), replace(NIGHTLY, name="n"))
    after = build(pool(vms=renamed, vdis=(ROOT_DISK, NIGHTLY_DISK, VDI(ref="x", uuid=uuid(3)))))

    for old, new in (
        ("by-vm/web1", "by-vm/www"),
        ("by-vm/web1/xvda.raw", "by-vm/www/xvda.raw"),
        ("by-vm/web1/snapshots/20261122T020000Z~nightly", "by-vm/www/snapshots/20261122T020000Z~n"),
        (f"by-uuid/{uuid(1)}.raw", f"by-uuid/{uuid(1)}.raw"),
        ("by-name/root disk.raw", "by-name/root disk.raw"),
    ):
        assert find(before, old).inode == find(after, new).inode


def test_inodes_are_unique_positive_and_never_0_or_1() -> None:
    inodes = [node.inode for _, node in paths(build(pool()))]

    assert len(set(inodes)) == len(inodes)
    assert all(1 < inode < 1 << 63 for inode in inodes)


def test_colliding_hashes_get_neighbouring_inodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "_digest", lambda identity: b"\xff" * 8)

    first, second = (build(pool()) for _ in range(2))

    inodes = [node.inode for _, node in paths(first)]
    assert sorted(inodes) == [*range(2, len(inodes) + 1), (1 << 63) - 1]
    assert inodes == [node.inode for _, node in paths(second)]


# ── Hostile and large pools ──────────────────────────────────────────────────────────────────

uuids = st.one_of(
    st.uuids().map(str), st.integers(0, 30).map(lambda n: f"aaaaaaaa-aaaa-aaaa-aaaa-{n:012x}")
)
raw_names = st.one_of(
    st.text(alphabet=st.characters(categories=None), max_size=8),
    st.sampled_from(["", ".", "..", "x", "latest", "x~aaaaaaaa", "a/b", "é" * 300]),
)


@given(st.dictionaries(uuids, raw_names, max_size=8))
def test_any_names_make_a_tree_with_every_disk_in_it(given_names: dict[str, str]) -> None:
    vdis = tuple(
        VDI(ref=key, uuid=key, name=name, description=name, sr_ref="s")
        for key, name in given_names.items()
    )
    vms = tuple(VM(ref=key, uuid=key, name=name) for key, name in given_names.items())
    snapshots = tuple(
        VM(
            ref=f"s{key}",
            uuid=key,
            name=name,
            is_a_snapshot=True,
            snapshot_of=vms[0].ref,
            snapshot_time=TWO,
        )
        for key, name in given_names.items()
    )

    found = build(pool(vdis=vdis, vms=(*vms, *snapshots)))

    assert len(names(found, "by-name")) == len(names(found, "by-vm")) == len(given_names)
    for path, node in paths(found):
        assert len(node.name.encode()) <= 255, path
        assert found.lookup(node.parent, node.name.encode()) == node
    if vms:
        counts = {len(names(found, f"by-vm/{vm}/snapshots")) for vm in names(found, "by-vm")}
        assert len(given_names) + 1 in counts


def test_a_large_pool_is_built_quickly() -> None:
    vdis = tuple(VDI(ref=str(n), uuid=uuid(n), name=f"disk {n % 99}") for n in range(10_000))
    start = time.process_time()

    assert len(names(build(pool(vdis=vdis)), "by-uuid")) == 20_000
    assert time.process_time() - start < 2


# ── One tree after another ───────────────────────────────────────────────────────────────────────

LATER = NOW + timedelta(hours=1)


def rebuild(earlier: Tree, inventory: Inventory, *, backups: Catalogue | None = None) -> Tree:
    return tree.build(
        inventory, backups=backups, store_path="/srv/backup", now=LATER, earlier=earlier
    )


def with_vdi(inventory: Inventory, ref: str, **fields: str | int) -> Inventory:
    vdi = replace(inventory.vdis[ref], **fields)  # type: ignore[arg-type]  # names of fields
    return replace(inventory, vdis={**inventory.vdis, ref: vdi})


def test_a_tree_of_the_same_pool_is_equal_and_shares_every_node() -> None:
    before = build(pool())

    after = rebuild(before, pool())

    assert all(after.node(inode) is node for inode, node in before.nodes.items())
    assert after.names == before.names
    assert not tree.changes(before, after)


def test_what_changed_is_as_old_as_the_change_and_the_rest_as_old_as_it_was() -> None:
    inventory = pool()
    ref, vdi = next((r, v) for r, v in inventory.vdis.items() if not v.is_a_snapshot)
    before = build(inventory)

    after = rebuild(before, with_vdi(inventory, ref, name="another"))
    again = rebuild(after, with_vdi(inventory, ref, name="another"))

    later = int(LATER.timestamp()) * 1_000_000_000
    described = find(after, f"by-uuid/{vdi.uuid}.json")
    assert described.mtime_ns == later
    assert find(after, "by-name").mtime_ns == later
    for path in (f"by-uuid/{vdi.uuid}.raw", "by-uuid", "README.txt", "by-vm"):
        assert find(after, path).mtime_ns == find(before, path).mtime_ns != later
    assert again.node(described.inode) is described


def test_a_name_that_is_gone_or_new_is_a_change_of_its_folder() -> None:
    inventory = pool()
    ref, vdi = next((r, v) for r, v in inventory.vdis.items() if not v.is_a_snapshot)
    before = build(inventory)

    after = rebuild(before, with_vdi(inventory, ref, name="another"))

    folder = find(before, "by-name").inode
    old = next(n.name for n in before.children(folder) if vdi.uuid in n.target)
    changes = tree.changes(before, after)
    assert (folder, old) in changes.entries
    assert (folder, "another.raw") not in changes.entries
    assert find(after, f"by-uuid/{vdi.uuid}.json").inode in changes.contents
    assert folder in changes.attributes


def test_a_link_that_points_elsewhere_has_other_contents() -> None:
    points = [Point(time=f"2026112{day}T020000Z", vm_uuid=uuid(11)) for day in (2, 3)]
    first = Catalogue({uuid(11): VMHistory(uuid(11), "web1", (points[0],))})
    second = Catalogue({uuid(11): VMHistory(uuid(11), "web1", tuple(points))})
    before = build(pool(), backups=first)

    after = rebuild(before, pool(), backups=second)

    latest = find(after, "backups/web1/latest")
    assert latest.target == "20261123T020000Z"
    assert latest.inode in tree.changes(before, after).contents


def test_a_disk_that_grows_has_another_size_and_is_newer() -> None:
    inventory = pool()
    ref, vdi = next((r, v) for r, v in inventory.vdis.items() if not v.is_a_snapshot)
    before = build(inventory)

    after = rebuild(before, with_vdi(inventory, ref, size=vdi.size + 4096))

    image = find(after, f"by-uuid/{vdi.uuid}.raw")
    assert image.size == vdi.size + 4096
    assert image.mtime_ns > find(before, f"by-uuid/{vdi.uuid}.raw").mtime_ns
    assert image.inode in tree.changes(before, after).attributes
