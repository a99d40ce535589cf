"""Random pools, with leftovers among much that only looks like them; each object has its story.

A ``Fantasy`` notes of each object, as it makes it, whether it is to go. It knows that because it
made it so, not by asking what is tested.
"""

import random
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from cbtfs import catalogue
from cbtfs.inventory import TAG_OWNER, VBD, VDI, VM, Inventory, write_owner
from cbtfs.leftovers import Folder, Judge, Partial, PoolTask, Shelf, Wish
from cbtfs.owner import Block, Owned, read_owner, write_block
from cbtfs.records import Pool

HOST, ELSEWHERE = "backup1", "backup2"
DEAD, ALIVE = 4711, 42
STORE, OTHER_STORE = "57000000-0000-4000-8000-000000000001", "57000000-0000-4000-8000-000000000002"
POOL = "9001"
RUN = "cbtfs 20261121T020000Z 0123456789abcdef"
NOW = datetime(2026, 11, 22, 2, tzinfo=UTC)


def judge() -> Judge:
    """Return who says that process ``DEAD`` of this machine is dead, and no other."""
    return Judge(HOST, lambda tag: (tag.host, tag.pid) == (HOST, DEAD))


@dataclass
class Fantasy:
    """A pool and a store that ``rng`` thought up.

    Attributes:
        doomed: references, and VM/TIME of points, of all that is to go.
    """

    rng: random.Random
    doomed: set[str] = field(default_factory=set[str])
    vms: dict[str, VM] = field(default_factory=dict[str, VM])
    vdis: dict[str, VDI] = field(default_factory=dict[str, VDI])
    vbds: dict[str, VBD] = field(default_factory=dict[str, VBD])
    folders: dict[str, Folder] = field(default_factory=dict[str, Folder])
    tasks: list[PoolTask] = field(default_factory=list[PoolTask])
    wish: Wish = field(default_factory=Wish)
    _count: int = 0

    def inventory(self) -> Inventory:
        """Return the pool."""
        pool = Pool(uuid=POOL)
        return Inventory(pool=pool, vms=self.vms, vdis=self.vdis, vbds=self.vbds)

    def shelf(self) -> Shelf:
        """Return the store."""
        return Shelf(STORE, self.folders)

    def fill(self) -> "Fantasy":
        """Think of everything; return self."""
        self.wish = Wish(
            partial=self.rng.random() < 0.3,
            older_than=self.rng.choice([0, 86400]),
            unblock=self.rng.random() < 0.3,
            now=NOW,
        )
        for name in ("xcp1", "xcp2"):
            self._add_vm(VM(ref=f"dom0 of {name}", uuid=self._uuid(), is_control_domain=True))
        for _ in range(self.rng.randrange(1, 4)):
            self._vm_with_points()
        stories = [
            self._of_another_tool, self._stuck_but_not_ours, self._with_a_copied_tag,
            self._with_a_broken_tag, self._made, self._live, self._restored, self._of_no_folder,
            self._of_another_store, self._task, self._not_even_a_snapshot,
            self._with_the_tag_of_a_run, self._blocked,
        ]  # fmt: skip
        for _ in range(self.rng.randrange(4, 20)):
            self.rng.choice(stories)()
        return self

    # ── whose ────────────────────────────────────────────────────────────────────────────────

    def _owner(self) -> Owned:
        pid, host = self.rng.choice([(DEAD, HOST), (DEAD, HOST), (ALIVE, HOST), (DEAD, ELSEWHERE)])
        host = self.rng.choice([host, host, host, ""])
        return Owned(self_uuid="", role="live", host=host, pid=pid, boot="b", starttime=1)

    def _is_dead(self, owner: Owned) -> bool:
        return owner.host == HOST and owner.pid == DEAD

    def _tag(self, uuid: str, owner: Owned, **fields: str) -> dict[str, str]:
        facts = {"role": "live", **fields}
        owned = Owned(
            self_uuid=facts.get("bound", uuid),
            role=facts["role"],
            store=facts.get("store", ""),
            vm=facts.get("vm", ""),
            point=facts.get("point", ""),
            host=owner.host,
            pid=owner.pid,
            boot=owner.boot,
            starttime=owner.starttime,
        )
        return {TAG_OWNER: write_owner(owned)}

    # ── what belongs to nobody, or to others ─────────────────────────────────────────────────

    def _of_another_tool(self) -> None:
        kind = self.rng.choice(["user", "cbt_metadata"])
        uuid = self._uuid()
        config = self.rng.choice([{}, {"xo:backup:job": "nightly"}, {"cbtfs:owners": "{}"}])
        vm = VM(
            ref=self._ref(), uuid=self._uuid(), name="cbtfs 20261121T020000Z", is_a_snapshot=True
        )
        self._add_vm(vm)
        self._snapshot(uuid, config, kind=kind)

    def _stuck_but_not_ours(self) -> None:
        vdi = self._snapshot(self._uuid(), {})
        self._attach(vdi, self.rng.choice(["RO", "RW"]))
        self._attach(self._disk(), "RO")

    def _with_a_copied_tag(self) -> None:
        owner = Owned(self_uuid="", role="", host=HOST, pid=DEAD, boot="b", starttime=1)
        role = self.rng.choice(["live", "base", "restored"])
        uuid = self._uuid()
        config = self._tag(uuid, owner, bound=self._uuid(), role=role, store=STORE, vm="?")
        assert read_owner(config, uuid) is None
        vdi = self._snapshot(uuid, config) if self.rng.random() < 0.7 else self._disk(config, uuid)
        self._attach(vdi, "RO")
        of_vm = self.rng.random() < 0.5
        self._add_vm(
            VM(ref=self._ref(), uuid=self._uuid(), is_a_snapshot=of_vm, other_config=config)
        )

    def _with_a_broken_tag(self) -> None:
        text = self.rng.choice(["", "{}", "[" * 5000, '{"self": 1}', "null", '{"role": "live"}'])
        self._snapshot(self._uuid(), {TAG_OWNER: text})

    def _not_even_a_snapshot(self) -> None:
        uuid = self._uuid()
        role = self.rng.choice(["live", "base", "made"])
        owner = Owned(self_uuid="", role="", host=HOST, pid=DEAD, boot="b", starttime=1)
        config = self._tag(uuid, owner, role=role, store=STORE, vm=self.rng.choice([*self.folders]))
        self._attach(self._disk(config, uuid), "RO")
        vm_uuid = self._uuid()
        config = self._tag(vm_uuid, owner, role="base", store=STORE)
        self._add_vm(VM(ref=self._ref(), uuid=vm_uuid, other_config=config))

    def _made(self) -> None:
        uuid = self._uuid()
        self._attach(self._snapshot(uuid, self._tag(uuid, self._owner(), role="made")), "RO")
        uuid = self._uuid()
        config = self._tag(uuid, self._owner(), role="made")
        self._add_vm(VM(ref=self._ref(), uuid=uuid, is_a_snapshot=True, other_config=config))

    # ── what is ours, of no VM ───────────────────────────────────────────────────────────────

    def _live(self) -> None:
        uuid, owner = self._uuid(), self._owner()
        vdi = self._snapshot(uuid, self._tag(uuid, owner))
        self._doom(vdi, owner, stuck=self.rng.random() < 0.5)

    def _restored(self) -> None:
        uuid, owner = self._uuid(), self._owner()
        name = self.rng.choice([RUN, "disk"])  # its own it gets when it is whole
        config = self._restored_tag(uuid, owner, name)
        if self.rng.random() < 0.2:
            self._snapshot(uuid, config)  # nothing ever makes such a thing
            return
        vdi = self._disk(config, uuid, name=name)
        way = self.rng.random()
        if way < 0.3:
            self._attach(vdi, "RW", vm=self._live_vm().ref)
            if name != RUN and self._is_dead(owner):
                self.doomed.add(vdi.ref)  # only its tag
        elif way < 0.6:
            self._half_a_vm(vdi, owner)
        elif self._is_dead(owner):
            self.doomed.add(vdi.ref)

    def _half_a_vm(self, vdi: VDI, owner: Owned) -> None:
        """Attach an unfinished disk to a VM that is not finished either."""
        uuid = self._uuid()
        state, name = self.rng.choice(["Halted", "Running"]), self.rng.choice([RUN, "new"])
        config = self._restored_tag(uuid, owner, name)
        vm = VM(ref=self._ref(), uuid=uuid, name=name, power_state=state, other_config=config)
        self._add_vm(vm)
        self._attach(vdi, "RW", vm=vm.ref)
        if state == "Halted" and self._is_dead(owner):
            self.doomed |= {vm.ref, vdi.ref}
        elif vdi.name != RUN and self._is_dead(owner):
            self.doomed.add(vdi.ref)  # only its tag

    def _restored_tag(self, uuid: str, owner: Owned, name: str) -> dict[str, str]:
        """Return a tag bound to a uuid, or to the name of its run as long as that is the name."""
        bound = RUN if name == RUN and self.rng.random() < 0.5 else uuid
        return self._tag(uuid, owner, role="restored", bound=bound)

    def _with_the_tag_of_a_run(self) -> None:
        """Give something else a tag that is bound to the name of a run: a copy, renamed."""
        owner = Owned(self_uuid="", role="", host=HOST, pid=DEAD, boot="b", starttime=1)
        config = self._tag("", owner, role=self.rng.choice(["restored", "live"]), bound=RUN)
        self._disk(config, self._uuid(), name=self.rng.choice(["disk", RUN[:-1]]))
        self._add_vm(VM(ref=self._ref(), uuid=self._uuid(), name="", other_config=config))

    def _blocked(self) -> None:
        """Keep a VM from starting: by a run, by a sentence about another VM, by somebody."""
        uuid, owner = self._uuid(), self._owner()
        is_ours = self.rng.random() < 0.5
        bound = uuid if is_ours else self.rng.choice([self._uuid(), ""])
        safety = VM(
            ref=self._ref(), uuid=self._uuid(), is_a_snapshot=True,
            name=self.rng.choice([
                "cbtfs before restore of v/20261121T020000Z", "before my restore",
                "cbtfs before restore of v/20261121T020000Z, not finished",
            ]),
        )  # fmt: skip
        self._add_vm(safety)
        is_finished = safety.name == "cbtfs before restore of v/20261121T020000Z"
        block = Block(
            self_uuid=bound, role="restoring", host=owner.host, pid=owner.pid, snapshot=safety.uuid
        )
        reason = write_block("do not", block)
        if not is_ours and self.rng.random() < 0.5:
            reason = self.rng.choice(["in repair", "{}", reason[:-1], reason + "}", ""])
        keys = self.rng.choice([["start"], ["start_on"], ["start", "start_on", "destroy"]])
        state = self.rng.choice(["Halted", "Halted", "Running"])
        vm = VM(
            ref=self._ref(), uuid=uuid, power_state=state,
            blocked_operations=dict.fromkeys(keys, reason),
        )  # fmt: skip
        is_let_start = state == "Running" or len(keys) < 2
        self._add_vm(vm)
        if is_ours and self._is_dead(owner) and (is_finished or is_let_start or self.wish.unblock):
            self.doomed.add(vm.ref)

    def _task(self) -> None:
        owner = self._owner()
        task = PoolTask(self._ref(), self._uuid(), "cbtfs: metadata of a VM", owner)
        self.tasks.append(task)
        if self._is_dead(owner):
            self.doomed.add(task.ref)

    def _of_another_store(self) -> None:
        store = self.rng.choice([OTHER_STORE, ""])
        key = self.rng.choice([*self.folders, self._uuid()])
        self._base(key, store=store)

    def _of_no_folder(self) -> None:
        vdi, owner = self._base(self._uuid())
        self._doom(vdi, owner, stuck=False)
        self._base("")

    # ── what a store knows about ─────────────────────────────────────────────────────────────

    def _vm_with_points(self) -> None:
        vm = self._live_vm()
        target = self.rng.choice([vm.ref, vm.ref, vm.ref, ""])
        partials: list[Partial] = []
        kept: set[str] = set()
        for number in range(self.rng.randrange(3)):
            partial = self._partial(number)
            partials.append(partial)
            if self._goes(partial, target):
                self.doomed.add(f"{vm.name}/{partial.time}")
            else:
                kept.add(partial.time)
        removed = ("20251122T020000Z",) if self.rng.random() < 0.2 else ()
        self.doomed.update(f"{vm.name}/{time}" for time in removed)
        problem = self.rng.choice(["", "", "a point is broken"])
        needed: set[str] = set()
        for time in ["20261101T020000Z", *(partial.time for partial in partials)]:
            for _ in range(self.rng.randrange(3)):
                self._base_of(vm, time, needed, kept=time in kept, problem=problem)
            self._snapshot_vm(vm, time, kept=time in kept or bool(problem))
        self.folders[vm.uuid] = Folder(
            vm.name, target, frozenset(needed), tuple(partials), removed, problem
        )

    def _partial(self, number: int) -> Partial:
        time = catalogue.format_time(NOW - timedelta(hours=self.rng.choice([1, 12, 100]) + number))
        if self.rng.random() < 0.2:
            return Partial(time)
        return Partial(
            time,
            maker=self._owner(),
            pool_uuid=self.rng.choice([POOL, POOL, "", "another"]),
            snapshots=(f"cbtfs {time} 0123456789abcdef",),
            resumable=self.rng.random() < 0.5,
        )

    def _goes(self, partial: Partial, target: str) -> bool:
        if partial.maker is None:
            return True
        if not self._is_dead(partial.maker) or partial.pool_uuid == "another":
            return False
        if not target:
            return partial.pool_uuid == POOL
        age = NOW - catalogue.parse_time(partial.time)
        old = age >= timedelta(seconds=self.wish.older_than)
        return not partial.resumable or (self.wish.partial and old)

    def _base_of(self, vm: VM, time: str, needed: set[str], *, kept: bool, problem: str) -> None:
        kind = self.rng.choice(["user", "cbt_metadata"])
        vdi, owner = self._base(vm.uuid, point=time, kind=kind)
        if self.rng.random() < 0.5:
            needed.add(vdi.uuid)
            if kind == "user" and not kept:
                self._doom(vdi, owner, stuck=False)  # its data
        elif not kept and not problem:
            self._doom(vdi, owner, stuck=kind == "user" and self.rng.random() < 0.5)

    def _snapshot_vm(self, vm: VM, time: str, *, kept: bool) -> None:
        uuid, owner = self._uuid(), self._owner()
        config = self._tag(uuid, owner, role="base", store=STORE, vm=vm.uuid, point=time)
        made = VM(
            ref=self._ref(), uuid=uuid, is_a_snapshot=True, snapshot_of=vm.ref, other_config=config
        )
        self._add_vm(made)
        if not kept and self._is_dead(owner):
            self.doomed.add(made.ref)

    # ── making ───────────────────────────────────────────────────────────────────────────────

    def _base(
        self, key: str, *, store: str = STORE, point: str = "20261101T020000Z", kind: str = "user"
    ) -> tuple[VDI, Owned]:
        uuid, owner = self._uuid(), self._owner()
        config = self._tag(uuid, owner, role="base", store=store, vm=key, point=point)
        return self._snapshot(uuid, config, kind=kind), owner

    def _doom(self, vdi: VDI, owner: Owned, *, stuck: bool) -> None:
        if self._is_dead(owner):
            self.doomed.add(vdi.ref)
        if stuck:
            vbd = self._attach(vdi, self.rng.choice(["RO", "RW"]))
            if self._is_dead(owner) and vbd.mode == "RO":
                self.doomed.add(vbd.ref)
            self._attach(vdi, "RO", vm=self._live_vm().ref)

    def _snapshot(self, uuid: str, config: dict[str, str], *, kind: str = "user") -> VDI:
        vdi = VDI(
            ref=self._ref(),
            uuid=uuid,
            type=kind,
            is_a_snapshot=True,
            snapshot_of=self.rng.choice([self._disk().ref, ""]),
            cbt_enabled=self.rng.random() < 0.5,
            other_config=config,
        )
        self.vdis[vdi.ref] = vdi
        return vdi

    def _disk(
        self, config: dict[str, str] | None = None, uuid: str = "", name: str = "disk"
    ) -> VDI:
        uuid = uuid or self._uuid()
        vdi = VDI(ref=self._ref(), uuid=uuid, name=name, other_config=config or {})
        self.vdis[vdi.ref] = vdi
        return vdi

    def _live_vm(self) -> VM:
        ref = self._ref()
        self._add_vm(VM(ref=ref, uuid=self._uuid(), name=f"web{ref}"))
        return self.vms[ref]

    def _add_vm(self, vm: VM) -> None:
        self.vms[vm.ref] = vm

    def _attach(self, vdi: VDI, mode: str, *, vm: str = "dom0 of xcp1") -> VBD:
        vbd = VBD(ref=self._ref(), uuid=self._uuid(), vm_ref=vm, vdi_ref=vdi.ref, mode=mode)
        self.vbds[vbd.ref] = vbd
        known = self.vdis[vdi.ref]
        self.vdis[vdi.ref] = replace(known, vbd_refs=(*known.vbd_refs, vbd.ref))
        return vbd

    def _ref(self) -> str:
        self._count += 1
        return f"ref{self._count}"

    def _uuid(self) -> str:
        self._count += 1
        return f"{self._count:08x}-0000-4000-8000-{self.rng.getrandbits(48):012x}"
