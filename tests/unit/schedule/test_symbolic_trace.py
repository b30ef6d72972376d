"""The trace of a schedule, against a slow simulation of its phases on labels."""

from functools import reduce
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncclbench.schedule import (
    Collective,
    Op,
    Redop,
    Schedule,
)
from ncclbench.schedule.symbolic_trace import InputElements, NoInput, Term, trace
from tests.helpers.simulated import NUMPY_FOLDS, Array, World, simulate, two_buffers

UNWRITTEN = 0xC0FFEE  # the label of a canary


def fold_labels(redop: Redop, arrays: list[Array]) -> Array:
    """A number that identifies a reduction and its labels, independent of their order; it wraps around."""
    labels = reduce(NUMPY_FOLDS[redop], [array[0] for array in arrays])
    if redop is Redop.AVG:
        labels = labels ^ np.uint64(0xA5A5 * len(arrays))
    return np.stack([labels, np.max([array[1] for array in arrays], axis=0)])


def any_label(labels: Array) -> Array:
    return np.stack([labels[0], np.ones_like(labels[1])])


def label_world(schedule: Schedule) -> World:
    """A unique label for every input element, and one label for all elements that are not filled."""
    random = np.random.default_rng(0)
    world: World = {}
    for rank, (name, nbytes) in product(range(schedule.world_size), schedule.buffers.items()):
        length = nbytes // schedule.dtype.itemsize
        labels = random.integers(1 << 63, size=length, dtype=np.uint64)
        if name not in schedule.inputs:
            labels[:] = UNWRITTEN
        world[rank, name] = np.stack([labels, np.zeros_like(labels)])
    return world


def labels_of(term: Term, length: int, start: World) -> Array:
    if term is NoInput.CANARY:
        return np.stack([np.full(length, UNWRITTEN, np.uint64), np.zeros(length, np.uint64)])
    if term is NoInput.UNSPECIFIED:
        return any_label(np.zeros((2, length), np.uint64))
    if isinstance(term, InputElements):
        return start[term.rank, term.buffer][:, term.start : term.start + length]
    assert not isinstance(term, NoInput)
    return fold_labels(term.redop, [labels_of(inner, length, start) for inner in term.terms])


def check_trace(schedule: Schedule) -> None:
    start = label_world(schedule)
    world = {key: labels.copy() for key, labels in start.items()}
    simulate(schedule, world, fold_labels, any_label)
    for (rank, name), simulated in world.items():
        segments = trace(schedule, rank, name)
        edges = [0, *(segment.stop for segment in segments)]
        assert [segment.start for segment in segments] == edges[:-1], "segments leave a gap or overlap"
        assert edges[-1] == simulated.shape[1]
        traced = np.concatenate([labels_of(seg.term, seg.stop - seg.start, start) for seg in segments], axis=1)
        assert traced[1].tolist() == simulated[1].tolist()
        known = simulated[1] == 0
        assert traced[0][known].tolist() == simulated[0][known].tolist(), (rank, name)


@pytest.mark.parametrize("write", ["recv", "send"], ids=["out of place", "in place"])
@pytest.mark.parametrize(
    ("world_size", "groups", "root"),
    [(1, [[0]], 0), (4, [[0, 1, 2, 3]], 0), (5, [[3, 0, 4]], 2), (6, [[5, 0, 2], [1, 4, 3]], 1)],
    ids=["alone", "all in order", "some, shuffled", "two groups, shuffled"],
)
@pytest.mark.parametrize("op", Op)
def test_every_op_is_traced_as_simulated(
    op: Op, world_size: int, groups: list[list[int]], root: int, write: str
) -> None:
    phase = Collective("one", op, np.array(groups), 5, root, write=write)
    check_trace(two_buffers(world_size, phase))


@given(data=st.data())
def test_random_schedules_are_traced_as_simulated(
    any_schedule: st.SearchStrategy[Schedule], data: st.DataObject
) -> None:
    check_trace(data.draw(any_schedule))


def test_simulation_detects_reordered_shards() -> None:
    phase = Collective("one", Op.ALL_GATHER, np.array([[0, 1, 2]]), 4)
    turned = Collective("one", Op.ALL_GATHER, np.array([[1, 0, 2]]), 4)
    start = label_world(two_buffers(3, phase))
    world = {key: labels.copy() for key, labels in start.items()}
    simulate(two_buffers(3, phase), world, fold_labels, any_label)
    segment = trace(two_buffers(3, turned), 0, "recv")[0]
    assert labels_of(segment.term, 4, start).tolist() != world[0, "recv"][:, :4].tolist()
