"""Expert all-to-alls beside reduced gradients: correct alone and together, with one time per branch."""

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from ncclbench.buffers.arrays import Buffers
from ncclbench.errors import Unable, UsageError
from ncclbench.measure.case import Measurement, run_case
from ncclbench.plan.plan import Settings
from ncclbench.schedule import AllToAllV, Case, Collective, Concurrent, Op, Schedule
from ncclbench.schedule.pattern import build_variants
from ncclbench.schedule.phases import SimplePhase
from ncclbench.topology import Topology
from ncclbench.transports._branches import branches_step
from ncclbench.transports.base import Call, Program, Step
from ncclbench.transports.threads import ThreadTransport, play
from tests.helpers.compilers import Branching, steps_of
from tests.helpers.fake_cupy import Stream, fake_cupy

SMALL: dict[str, Any] = {"hidden": 32, "tokens": "12", "experts": 16, "top_k": 4, "routings": 1}
QUICK = Settings(iterations=6, warmup=1)


def case_of(**params: Any) -> Case:
    return Case(pattern="moe_overlap", nbytes=64, dtype="bfloat16", params={**SMALL, "gradient_bytes": 5000, **params})


def run(case: Case, ranks: int, kind: type[ThreadTransport] = ThreadTransport) -> Measurement:
    def main(real: ThreadTransport) -> Measurement | None:
        return run_case(case, kind(real.world, real.rank), Topology.single_node(ranks), QUICK)

    measured = play(ranks, main)[0]
    assert measured is not None
    return measured


@pytest.mark.parametrize(("ranks", "gradient_bytes"), [(1, 64), (2, 64), (5, 5000), (8, 5000), (2, 6_000_000)])
def test_overlapped_results_are_exact(ranks: int, gradient_bytes: int) -> None:
    """The largest size exceeds the period of the values and the size of a comparison."""
    record = run(case_of(gradient_bytes=gradient_bytes), ranks).record
    assert (record.status, record.wrong, record.tolerance, record.variants) == ("ok", 0, 0.0, 3)


def test_gradients_are_reduced_in_the_requested_groups() -> None:
    for group in ("2", "node"):
        assert run(case_of(group=group, ep=2), 4).record.status == "ok"


def test_each_branch_is_timed_and_slowdowns_are_reported() -> None:
    measured = run(case_of(), 4)
    record, samples = measured.record, measured.samples
    assert samples is not None
    labels = ["total", "experts", "data_parallel", "both", "both.experts", "both.data_parallel"]
    assert samples.labels == labels
    there = ~np.isnan(samples.seconds_RNK[0])
    assert there.astype(int).tolist() == [[1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0], [1, 0, 0, 1, 1, 1]] * 2
    both = samples.seconds_RNK[:, 2::3]
    assert np.all(both[:, :, 4:] > 0)
    assert np.all(both[:, :, 4:].max(axis=2) <= both[:, :, 3])
    median = {phase.label: phase.time_us.p50 for phase in record.phases if phase.time_us}
    assert set(record.ratios) == {"slowdown_experts", "slowdown_data_parallel"}
    for name in ("experts", "data_parallel"):
        together = record.subtotals[f"both.{name}"].time_us.p50
        assert record.ratios[f"slowdown_{name}"] == pytest.approx(together / median[name])
    ledgers = {phase.label: phase.ledger.sent_bytes["node"] for phase in record.phases}
    assert ledgers["both"] == ledgers["experts"] + ledgers["data_parallel"]


class Spoiled(ThreadTransport):
    """One bit of one buffer is wrong on rank 1 after the phase `where`."""

    where, buffer = "both", "gathered"

    def compile(self, schedule: Schedule, buffers: Buffers) -> Program:
        program = super().compile(schedule, buffers)
        (step,) = program.steps
        if self.rank != 1 or step.label != self.where:
            return program

        def launch() -> None:
            step.launch()
            buffers[self.buffer].view(np.uint8)[1] ^= 1

        return replace(program, steps=(replace(step, launch=launch),))


@pytest.mark.parametrize(
    ("where", "buffer"),
    [
        *((where, buffer) for where in ("both", "data_parallel") for buffer in ("shard", "gathered", "grads")),
        *((where, buffer) for where in ("both", "experts") for buffer in ("received", "returned", "packed")),
        ("experts", "gathered"),
        ("data_parallel", "received"),
    ],
)
def test_one_wrong_bit_is_detected(where: str, buffer: str) -> None:
    """This includes buffers that the current schedule must leave unchanged."""
    kind = type("Here", (Spoiled,), {"where": where, "buffer": buffer})
    record = run(case_of(), 4, kind).record
    assert (record.status, record.wrong, record.wrong_ranks) == ("wrong", 2, [1])


# The order of issue. On GPUs branches have communicators of their own. NCCL requires that concurrent calls are issued
# in the same order on all ranks. CUDA is simulated: a stream records whether it is in use, and what it waits for.


@pytest.fixture
def simulated_cuda() -> Iterator[None]:
    with fake_cupy():
        yield


def of_cupy(_patch: pytest.MonkeyPatch) -> Branching:
    from ncclbench.transports._cupy_nccl import CupyNcclTransport

    transport: Any = object.__new__(CupyNcclTransport)
    transport._cupy_stream, transport._branch_streams = Stream.current, {}
    return cast("Branching", transport.branches_step)


def of_torch(patch: pytest.MonkeyPatch) -> Branching:
    from ncclbench.transports import _torch_dist as torch_dist

    cuda = SimpleNamespace(Stream=Stream, stream=lambda _stream: nullcontext())
    patch.setattr(torch_dist, "torch", SimpleNamespace(cuda=cuda))
    return torch_dist.device_branches


def of_host(_patch: pytest.MonkeyPatch) -> Branching:
    return branches_step


def issued(branching: Branching, rank: int) -> list[Any]:
    """The calls of `rank` in the concurrent phase: label, branch, thread and stream."""
    found = []

    def call(phase: SimplePhase, branch: tuple[int, ...]) -> Call:
        if isinstance(phase, AllToAllV | Collective):
            assert rank in phase.groups  # otherwise it would not be issued here
        return lambda: found.append((phase.label, branch, threading.get_ident(), Stream.current))

    schedule = build_variants(case_of(), Topology.single_node(4))[-1]
    (step,) = steps_of(schedule.phases, call, branching)
    assert step.label == "both"
    step.launch()
    return found


IN_ORDER = [("dispatch", (0,)), ("combine", (0,)), ("reduce_scatter", (1,)), ("all_gather", (1,))]


@pytest.mark.usefixtures("simulated_cuda")
@pytest.mark.parametrize("kind", [of_cupy, of_torch])
def test_all_ranks_issue_branches_in_the_same_order(
    kind: Callable[[pytest.MonkeyPatch], Branching], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in range(4):
        Stream.waits.clear()
        main = Stream.current = Stream()
        calls = issued(kind(monkeypatch), rank)
        assert [(label, branch) for label, branch, _, _ in calls] == IN_ORDER
        assert {thread for _, _, thread, _ in calls} == {threading.get_ident()}  # other threads lose the order
        streams = [stream for _, _, _, stream in calls]
        assert streams[0] is streams[1]
        assert streams[2] is streams[3]
        assert len({id(stream) for stream in (main, streams[0], streams[2])}) == 3
        assert Stream.current is main
        waits = [(waiting, event.stream) for waiting, event in Stream.waits]
        branches = [streams[0].cuda_stream, streams[2].cuda_stream]
        assert waits == [(one, main.cuda_stream) for one in branches] + [(main.cuda_stream, one) for one in branches]


def test_host_branches_run_in_separate_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that the test above detects a transport whose order is not fixed."""
    calls = issued(of_host(monkeypatch), 0)
    assert sorted((label, branch) for label, branch, _, _ in calls) == sorted(IN_ORDER)
    assert threading.get_ident() not in {thread for _, _, thread, _ in calls}


def test_invalid_parameters_are_refused() -> None:
    for params in ({"format": "fp8"}, {"variant": "cached"}, {"quad": True}, {"weights": "float"}):
        with pytest.raises(UsageError, match="only bare all-to-alls of bf16 rows run here"):
            build_variants(case_of(**params), Topology.single_node(2))
    with pytest.raises(Unable, match="less than one float32 for each of 4"):
        build_variants(case_of(gradient_bytes=15), Topology.single_node(4))


def test_branch_names_must_differ() -> None:
    phase = Collective("a", Op.BARRIER, np.array([[0, 1]]), 0)
    for names in (("x",), ("x", "x")):
        with pytest.raises(ValueError, match="every branch needs a name of its own"):
            Concurrent("both", ((phase,), (phase,)), names=names)


def test_step_without_parts_has_no_extra_columns() -> None:
    assert Step("a", print).parts == ()
