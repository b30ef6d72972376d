"""The GPU's kernels on rows, played on the host from their own source: the same bits as NumPy's."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ncclbench.errors import Unable
from ncclbench.schedule import RowKernel, RowPlan, RowWork
from ncclbench.schedule.phases import Kernel, Local
from ncclbench.transports._local_work import local_call
from ncclbench.transports.base import Call
from ncclbench.transports.cuda.row_kernels import NAMES, SOURCE, Shape, kernel_call
from tests.helpers.rows import LAYERS, Work, works

COMPILER = shutil.which("g++")
NVCC = shutil.which("nvcc")
with_compiler = pytest.mark.skipif(COMPILER is None, reason="no g++ to play the kernels with")

# What a GPU's compiler knows by itself.
BEFORE = """
#include <cstddef>
#include <cstring>
#include <utility>
#define __device__
#define __global__
#define __forceinline__ inline
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
static struct { int x, y; } threadIdx, blockIdx, blockDim;
static inline float __uint_as_float(unsigned bits) { float f; std::memcpy(&f, &bits, 4); return f; }
static inline unsigned __float_as_uint(float f) { unsigned bits; std::memcpy(&bits, &f, 4); return bits; }
"""
# Arguments come as addresses, as a driver has them.
AFTER = """
template <typename... A, std::size_t... I>
void play(void (*kernel)(A...), int grid, int x, int y, void** arguments, std::index_sequence<I...>) {
    blockDim.x = x; blockDim.y = y;
    for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x)
        for (threadIdx.y = 0; threadIdx.y < y; ++threadIdx.y)
            for (threadIdx.x = 0; threadIdx.x < x; ++threadIdx.x)
                kernel(*static_cast<A*>(arguments[I])...);
}
template <typename... A>
void play(void (*kernel)(A...), int grid, int x, int y, void** arguments) {
    play(kernel, grid, x, y, arguments, std::index_sequence_for<A...>());
}
"""
PLAY = 'extern "C" void play_{0}(int grid, int x, int y, void** arguments) {{ play({0}, grid, x, y, arguments); }}\n'


class Played:
    """An `Engine` that runs one thread of a kernel after the other."""

    def __init__(self, folder: Path, source: str) -> None:
        assert COMPILER is not None
        text, library = folder / "rows.cpp", folder / "rows.so"
        text.write_text(BEFORE + source + AFTER + "".join(PLAY.format(name) for name in NAMES))
        flags = ("-std=c++17", "-O1", "-w", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC")
        subprocess.run([COMPILER, *flags, str(text), "-o", str(library)], check=True, timeout=120)
        self.library = ctypes.CDLL(str(library))

    def put(self, array: Any) -> Any:
        return array.copy()

    def launcher(self, name: str, grid: int, block: tuple[int, int], arguments: Sequence[Any]) -> Call:
        values = [np.array(a.ctypes.data, np.uint64) if a.ndim else np.array(a) for a in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        play = getattr(self.library, f"play_{name}")

        def launch(_alive: Any = (arguments, values)) -> None:
            play(grid, *block, pointers)

        return launch


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Played:
    return Played(tmp_path_factory.mktemp("kernels"), SOURCE.read_text())


def different(work: Work, engine: Played) -> int:
    """Bytes in which the kernel and NumPy differ, over all buffers."""
    buffers = work.filled(np.random.default_rng(5))
    expected = work.on_host(buffers)
    kernel_call(work.phase, work.plan, buffers, engine)()
    return sum(int(np.count_nonzero(buffers[name] != expected[name])) for name in buffers)


@with_compiler
@pytest.mark.parametrize("params", LAYERS, ids=lambda params: "-".join(map(str, params.values())))
def test_kernels_and_numpy_agree_to_the_bit(engine: Played, params: dict[str, Any]) -> None:
    done = [work.phase.kernel for work in works(params) if not different(work, engine)]
    assert len(done) == len(list(works(params)))
    assert {RowKernel.TAKE, RowKernel.SCALE, RowKernel.SUM} == set(done)


MUTATIONS: list[tuple[str, str, str]] = [
    ("take", "from < 0 ?", "from < -1 ?"),
    ("take", "if (column < words) target[column] = held[k];", "if (column < words - 1) target[column] = held[k];"),
    ("sum", "entries[2 * (first + k) + 1]", "entries[2 * first + 1]"),
    ("sum", "index[first + k] : -1", "index[first] : -1"),
    ("scale", "(code & 8u) << 28", "(code & 8u) << 27"),
    ("scale", "0x7B800000u", "0x7B000000u"),
    ("scale", "code ? code << 23 : 0x00400000u", "code << 23"),
    ("scale", "column * 8 / (BLOCK ? BLOCK : 1)", "column * 4 / (BLOCK ? BLOCK : 1)"),
    ("scale", "((bits >> 16) & 1u) + 0x7FFFu", "0x8000u"),
]


@with_compiler
def test_a_mistake_in_a_kernel_is_found(tmp_path: Path) -> None:
    """Or the comparison above would say nothing."""
    known = [work for params in LAYERS for work in works(params)]
    for number, (kind, old, new) in enumerate(MUTATIONS):
        source = SOURCE.read_text()
        assert source.count(old) == 1, old
        folder = tmp_path / str(number)
        folder.mkdir()
        wrong = Played(folder, source.replace(old, new))
        assert any(different(work, wrong) for work in known if work.phase.kernel == kind), (old, new)


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_no_flag_of_the_compiler_changes_the_arithmetic(tmp_path: Path) -> None:
    """CuPy compiles with -ftz=true; a flushed denormal or a contracted product would have other bits."""
    assert NVCC is not None
    out = tmp_path / "rows.ptx"
    command = [NVCC, "-std=c++17", "-arch=sm_90", "-ftz=true", "-use_fast_math", "-ptx", str(SOURCE), "-o", str(out)]
    subprocess.run(command, check=True, timeout=200)
    text = out.read_text()
    assert set(re.findall(r"\.entry (\w+)", text)) == set(NAMES)
    arithmetic = set(re.findall(r"\b((?:mul|add|fma|mad|sub)\.[\w.]*f32)\b", text))
    assert arithmetic == {"mul.rn.f32", "add.rn.f32"}


@pytest.mark.parametrize("rows", [1, 7, 4096, 33000])
@pytest.mark.parametrize("words", [1, 2, 3, 100, 128, 252, 462, 896, 5000])
def test_the_blocks_cover_every_row(rows: int, words: int) -> None:
    shape = Shape.over(rows, words)
    along, down = shape.block
    assert along * down <= 256
    assert (shape.grid - 1) * down < rows <= shape.grid * down
    assert along >= words or along % 32 == 0


def test_rows_of_the_large_models_leave_no_thread_idle() -> None:
    assert [Shape.over(1, words).block[0] for words in (896, 252, 360)] == [224, 256, 192]


def test_more_entries_than_an_int32_counts_are_refused() -> None:
    phase = RowWork(label="pack", kernel=RowKernel.TAKE, read="a", write="b", read_row=8, write_row=8, read_extent=8)
    with pytest.raises(Unable, match="pack: more than 2147483391 rows or entries"):
        kernel_call(phase, RowPlan(np.array([2**31 - 1])), {}, None)  # type: ignore[arg-type]


def test_elements_are_not_added_as_bits_on_a_gpu() -> None:
    """The sum of the bits of 1.0 and 1.0 is no 2.0; what is no NumPy array is a GPU's."""
    phase = Local("add", Kernel.REDUCE_CHUNKS, 4, chunks=2, read="a", write="b")
    with pytest.raises(Unable, match="add: reduce_chunks runs on the host only"):
        local_call(phase, 0, {"a": object(), "b": object()})  # type: ignore[dict-item]
    buffers = {"a": np.ones(8, np.float32), "b": np.zeros(4, np.float32)}
    local_call(phase, 0, buffers)()
    assert buffers["b"].tolist() == [2.0] * 4
