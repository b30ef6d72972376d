"""Random schedules for the property tests and the number of examples; a healthy run for the acceptance tests.

Examples are drawn the same way on every run, so that a failure is reproducible. For new examples:
``HYPOTHESIS_PROFILE=search``.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from ncclbench.accept.example_runs import write_example
from ncclbench.config import plugins
from ncclbench.schedule import (
    DTYPES,
    AllToAllV,
    Collective,
    Concurrent,
    Exchange,
    Kernel,
    Local,
    Op,
    Redop,
    Schedule,
)
from ncclbench.schedule.phases import Phase, SimplePhase
from tests.helpers.acceptance import HEALTHY

# A shared machine may be slow: no deadline, no health check of time.
_SLOW = [HealthCheck.too_slow]
settings.register_profile(
    "unit", deadline=None, max_examples=60, derandomize=True, database=None, suppress_health_check=_SLOW
)
settings.register_profile("search", deadline=None, max_examples=2000, suppress_health_check=_SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "unit"))

LENGTH = 24  # elements of every buffer
BUFFERS = ("a", "b", "c", "d")
_REDUCING = (Op.ALL_REDUCE, Op.REDUCE_SCATTER, Op.REDUCE)
_SHARDED = (Op.REDUCE_SCATTER, Op.ALL_GATHER, Op.ALL_TO_ALL, Op.GATHER, Op.SCATTER)


@pytest.fixture(scope="module")
def unsynced() -> Iterator[None]:
    """Do not wait for the disk: the run directories of a test need not survive a power failure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _file: None)
        yield


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a healthy run that is generated."""
    return write_example(tmp_path_factory.mktemp("runs") / "healthy", HEALTHY)


@pytest.fixture
def run(healthy: Path, tmp_path: Path) -> Path:
    """A copy of the healthy run that a test may damage."""
    shutil.copytree(healthy, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="session")
def any_schedule() -> st.SearchStrategy[Schedule]:
    """Any valid schedule, including buffers that were never filled."""
    return random_schedules(exact=False)


@pytest.fixture(scope="session")
def exact_schedule() -> st.SearchStrategy[Schedule]:
    """Schedules that can be run and checked: all buffers are filled, and at most two phases reduce."""
    return random_schedules(exact=True)


@st.composite
def random_schedules(draw: st.DrawFn, *, exact: bool) -> Schedule:
    world = draw(st.integers(1, 5))
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    redops = draw(st.sampled_from([[Redop.PROD], [Redop.SUM, Redop.AVG, Redop.MIN, Redop.MAX]]))
    number = draw(st.integers(1, 3))
    reducing = draw(st.sets(st.integers(0, number - 1), max_size=2)) if exact else set(range(number))
    phases: list[Phase] = []
    for k in range(number):
        allowed = redops if k in reducing else []
        if draw(st.integers(0, 3)) == 0:  # one in four is two branches at the same time
            left = draw(_phase("left", world, dtype.itemsize, BUFFERS[:2], allowed))
            right = draw(_phase("right", world, dtype.itemsize, BUFFERS[2:], []))
            phases.append(Concurrent(f"phase_{k}", ((left,), (right,))))
        else:
            phases.append(draw(_phase(f"phase_{k}", world, dtype.itemsize, BUFFERS, allowed)))
    some = st.lists(st.sampled_from(BUFFERS), unique=True)
    return Schedule(
        world_size=world,
        dtype=dtype,
        buffers=dict.fromkeys(BUFFERS, LENGTH * dtype.itemsize),
        inputs=BUFFERS if exact else tuple(draw(some)),
        phases=tuple(phases),
        op=None,
        size_bytes=LENGTH * dtype.itemsize,
        count=LENGTH,
    )


@st.composite
def _phase(
    draw: st.DrawFn, label: str, world: int, itemsize: int, names: tuple[str, ...], redops: list[Redop]
) -> SimplePhase:
    read, write = draw(st.permutations(names))[:2]
    kind = draw(st.sampled_from(["collective", "uneven", "exchange", "local"]))
    if kind == "collective":
        in_place = draw(st.booleans())
        return draw(_collectives(label, world, redops, read, read if in_place else write))
    if kind == "uneven":
        return draw(_unevens(label, world, itemsize, read, write))
    if kind == "exchange":
        return draw(_exchanges(label, world, itemsize, read, draw(st.sampled_from([read, write]))))
    return draw(_locals(label, world, redops, read, write))


@st.composite
def _groups(draw: st.DrawFn, world: int) -> list[list[int]]:
    order = draw(st.permutations(range(world)))
    members = draw(st.integers(1, world))
    number = draw(st.integers(1, world // members))
    return [order[g * members : (g + 1) * members] for g in range(number)]


@st.composite
def _collectives(draw: st.DrawFn, label: str, world: int, redops: list[Redop], read: str, write: str) -> Collective:
    groups = draw(_groups(world))
    op = draw(st.sampled_from([op for op in Op if redops or op not in _REDUCING]))
    return Collective(
        label=label,
        op=op,
        groups=np.array(groups),
        count=draw(st.integers(1, LENGTH // len(groups[0]) if op in _SHARDED else LENGTH)),
        root=draw(st.integers(0, len(groups[0]) - 1)),
        redop=draw(st.sampled_from(redops)) if redops else Redop.SUM,
        read=read,
        write=write,
    )


@st.composite
def _unevens(draw: st.DrawFn, label: str, world: int, itemsize: int, read: str, write: str) -> AllToAllV:
    groups = np.array(draw(_groups(world)))
    number, members = groups.shape
    rows = draw(st.lists(st.integers(0, 2), min_size=number * members**2, max_size=number * members**2))
    row_bytes = draw(st.integers(1, 2)) * itemsize
    return AllToAllV(label, groups, np.reshape(rows, (number, members, members)), row_bytes, read, write)


@st.composite
def _exchanges(draw: st.DrawFn, label: str, world: int, itemsize: int, read: str, write: str) -> Exchange:
    rank, offset = st.integers(0, world - 1), st.integers(0, LENGTH - 6)
    flows = draw(st.lists(st.tuples(rank, rank, st.integers(1, 6), offset, offset), min_size=1, max_size=6))
    kept: list[tuple[int, int, int, int, int]] = []
    taken: set[tuple[int, int]] = set()
    sent: set[tuple[int, int]] = set()
    for src, dst, size, first, start in flows:
        lands_on = {(dst, start + k) for k in range(size)}
        sends = {(src, first + k) for k in range(size)}
        races = read == write and (lands_on & (sent | sends) or sends & taken)
        if not lands_on & taken and not races:
            kept.append((src, dst, size, first, start))
            taken |= lands_on
            sent |= sends
    if not kept:  # one that overlaps with nothing
        kept.append((0, world - 1, 6, 0, LENGTH - 6))
    src_F, dst_F, size_F, first_F, start_F = np.transpose(kept)
    return Exchange(label, src_F, dst_F, size_F * itemsize, first_F * itemsize, start_F * itemsize, read, write)


@st.composite
def _locals(draw: st.DrawFn, label: str, world: int, redops: list[Redop], read: str, write: str) -> Local:
    kernels = [kernel for kernel in Kernel if kernel is not Kernel.REDUCE_CHUNKS or Redop.SUM in redops]
    kernel, count = draw(st.sampled_from(kernels)), draw(st.integers(1, 4))
    if kernel is Kernel.REDUCE_CHUNKS:
        return Local(label, kernel, count, chunks=draw(st.integers(1, LENGTH // count)), read=read, write=write)
    if kernel is Kernel.COPY:
        return Local(label, kernel, count, read=read, write=write)
    number = draw(st.integers(1, 6))
    rows = draw(st.lists(st.integers(0, 5), min_size=world * number, max_size=world * number))
    return Local(label, kernel, count, rows=np.reshape(rows, (world, number)), read=read, write=write)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on sys.path into which a test installs distributions."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    plugins.forget_distributions()
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(folder) in str(sys.modules[name].__file__):
            del sys.modules[name]
