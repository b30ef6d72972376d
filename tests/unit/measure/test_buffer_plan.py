"""Planning of GPU memory: the buffer sets of a case, the memory kept between cases, and refusals."""

from collections.abc import Sequence
from math import gcd
from types import SimpleNamespace
from typing import Any

import pytest

from ncclbench.buffers.arrays import ON_GPU, WARM, MemoryLimit, Rotation, rotation
from ncclbench.buffers.kinds import Cache, Kind
from ncclbench.buffers.nccl_mem_alloc import Blocks
from ncclbench.errors import UsageError
from ncclbench.launch import rank_session as session
from ncclbench.launch.rank_session import refuse_without_memory
from ncclbench.measure import buffer_plan
from ncclbench.measure import case as case_room
from ncclbench.measure.buffer_plan import HeldMemory, MemoryDemand, agreed_budget, rotations
from ncclbench.plan.plan import Settings
from ncclbench.schedule import Case
from ncclbench.topology import Topology
from ncclbench.transports.base import RankIdentity
from ncclbench.transports.threads import ThreadTransport, play

MIB, GIB = 1 << 20, 1 << 30
L2 = 50 * MIB


def asked(*mib: int, kind: Kind = "pool", cache: Cache = "cold", variants: int = 1) -> MemoryDemand:
    return MemoryDemand(tuple(size * MIB for size in mib), variants, kind, cache)


@pytest.mark.parametrize(
    ("mib", "variants", "expected"),
    [
        (400, 1, Rotation(1, True)),
        (200, 3, Rotation(1, True)),  # four times L2: of what an iteration began with nothing is left
        (199, 1, Rotation(2, True)),
        (199, 2, Rotation(3, True)),  # with two of each a variant would always meet the same set
        (100, 1, Rotation(2, True)),
        (99, 1, Rotation(3, True)),  # between two uses of a set 198 MiB are touched, of one other it were 99
        (10, 1, Rotation(11, True)),
        (1, 1, WARM),  # 101 sets
    ],
)
def test_sets_are_as_many_as_leave_l2(mib: int, variants: int, expected: Rotation) -> None:
    assert rotation(mib * MIB, L2, "cold", variants) == expected
    assert rotation(mib * MIB, L2, "warm", variants) == WARM


@pytest.mark.parametrize("variants", [1, 2, 3, 6])
def test_set_is_reused_after_twice_l2(variants: int) -> None:
    for nbytes in range(MIB, 200 * MIB, 3 * MIB):
        copies, cold = rotation(nbytes, L2, "cold", variants)
        assert not cold or (copies - 1) * nbytes >= 2 * L2
        assert gcd(copies, variants) == 1


def test_sets_must_fit_to_the_byte() -> None:
    case = asked(50, 50)
    assert rotations([case], 200 * MIB, L2) == ([Rotation(2, True)], HeldMemory(other=200 * MIB))
    assert rotations([case], 200 * MIB - 1, L2) == ([WARM], HeldMemory(other=100 * MIB))


def test_large_set_is_cold_within_any_budget() -> None:
    assert rotations([asked(400)], 400 * MIB, L2)[0] == [Rotation(1, True)]


def test_what_nccl_cases_keep_leaves_less_for_every_other() -> None:
    cases = [asked(100), asked(60, 40, kind="nccl"), asked(30, 30, 40, kind="nccl", cache="warm"), asked(1)]
    one_set = (60 * MIB, 40 * MIB, 30 * MIB)
    two_sets = (60 * MIB, 60 * MIB, 40 * MIB, 40 * MIB)  # of the second, which serve the third too
    cold = Rotation(2, True)
    assert rotations(cases, 400 * MIB, L2) == ([cold, cold, WARM, WARM], HeldMemory(two_sets, 200 * MIB))
    assert rotations(cases, 400 * MIB - 1, L2) == ([cold, WARM, WARM, WARM], HeldMemory(one_set, 200 * MIB))
    assert rotations(cases, 330 * MIB - 1, L2) == ([WARM, cold, WARM, WARM], HeldMemory(two_sets, 100 * MIB))
    assert rotations(cases, 300 * MIB - 1, L2) == ([WARM] * 4, HeldMemory(one_set, 100 * MIB))


def test_smallest_budget_and_largest_cache_apply_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    caches = [L2, 2 * L2, L2]
    monkeypatch.setattr(buffer_plan, "l2_bytes", lambda: caches.pop())

    def main(transport: ThreadTransport) -> tuple[int, int]:
        return agreed_budget(transport, (7 - transport.rank) * GIB)

    assert play(3, main, 20.0) == [(5 * GIB, 2 * L2)] * 3


def test_without_a_plan_what_is_free_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer_plan, "l2_bytes", lambda: L2)
    monkeypatch.setattr("ncclbench.buffers.arrays.free_device_memory", lambda: GIB)
    assert play(1, agreed_budget, 20.0) == [(GIB - (256 << 20), L2)]


def test_plan_gives_each_case_its_buffer_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer_plan, "l2_bytes", lambda: L2)
    monkeypatch.setattr("ncclbench.buffers.arrays.free_device_memory", lambda: GIB)
    blocks = Blocks()
    monkeypatch.setattr(session, "BLOCKS", blocks)
    settings = Settings(buffers="nccl")
    chosen = (("all_reduce", "float32"), ("cross_rail", "float32"), ("all_reduce", "int32"))
    cases = [Case(pattern=name, dtype=dtype, nbytes=100 * MIB) for name, dtype in chosen]
    planned = [SimpleNamespace(case=case, settings=settings) for case in cases]
    job: Any = SimpleNamespace(plan=SimpleNamespace(cases=planned))

    def main(transport: ThreadTransport) -> dict[str, Rotation]:
        transport.device = "cuda"
        identity = RankIdentity(
            rank=transport.rank, world_size=2, local_rank=transport.rank, local_size=2, launcher="threads"
        )
        return session.plan_memory(job, identity, Topology.single_node(2), transport)

    assert play(2, main, 20.0) == [{cases[k].id: Rotation(2, True) for k in (0, 2)}] * 2  # there is one node
    assert blocks.planned == [100 * MIB] * 2  # which serve both


@pytest.mark.parametrize(("left", "expected"), [(3, Rotation(2, True)), (4, WARM)])
def test_rotation_falls_back_to_one_buffer_set(left: int, expected: Rotation) -> None:
    rank: Any = SimpleNamespace(transport=SimpleNamespace(device="cuda"), settings=Settings())
    variants: Any = tuple(range(left))
    assert case_room.buffer_rotation(Rotation(2, True), variants, rank) == expected


def refusal(demands: Sequence[MemoryDemand], *limits: tuple[int, int, str]) -> str:
    """What is said of the cases a, b, ...; "" if nothing is."""
    job: Any = SimpleNamespace(
        plan=SimpleNamespace(cases=[SimpleNamespace(case=SimpleNamespace(id=c)) for c in "abcd"])
    )
    try:
        refuse_without_memory(job.plan, dict(enumerate(demands)), [MemoryLimit(*limit) for limit in limits])
    except UsageError as error:
        return str(error)
    return ""


def test_case_that_exceeds_kept_memory_is_refused() -> None:
    cases = [asked(256, kind="nccl"), asked(512), asked(512, kind="nccl")]
    assert refusal(cases, (1, 1280 * MIB, ON_GPU)) == ""
    assert refusal(cases, (1, 1280 * MIB - 1, ON_GPU)) == (
        "c, with what earlier cases keep, needs 1.0 GiB on a GPU (1 ranks x 1.0 GiB), and of the 1.2 GiB that is free "
        "256.0 MiB a rank is kept for libraries: lower --max-bytes or --nproc"
    )


def test_refused_single_case_names_its_own_need() -> None:
    for kind in ("pool", "nccl"):
        words = refusal([asked(256, kind=kind), asked(1024, kind=kind)], (1, GIB, ON_GPU))
        assert words.startswith("b needs 1.0 GiB on a GPU (1 ranks x 1.0 GiB), and of the 1.0 GiB")


def test_on_the_host_cases_keep_nothing_from_one_another() -> None:
    cases = [asked(256, kind="nccl"), asked(512), asked(512, kind="nccl")]
    assert refusal(cases, (2, 1536 * MIB, "this node")) == ""
    assert refusal(cases, (2, 1536 * MIB - 1, "this node")).startswith("b needs 1.0 GiB on this node (2 ranks x 512.0 ")
