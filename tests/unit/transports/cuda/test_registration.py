"""Memory from ncclMemAlloc: kept from case to case, and registered everywhere or nowhere, undone before it goes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ncclbench.buffers import nccl_mem_alloc as nccl_memory
from ncclbench.buffers.nccl_library import NcclLibrary, first_trouble, loaded_nccl
from ncclbench.buffers.nccl_mem_alloc import Blocks, NcclMemory, widened
from ncclbench.errors import EnvironmentFault
from ncclbench.transports.cuda import registration as _registration
from ncclbench.transports.cuda.registration import register_buffers
from ncclbench.transports.threads import ThreadTransport, play
from tests.helpers.fake_nccl import FakeNccl, nccl_functions


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeNccl:
    fake = FakeNccl()
    monkeypatch.setattr(nccl_memory, "loaded_nccl", lambda: ["libnccl.so.2"])
    monkeypatch.setattr(nccl_memory, "NcclLibrary", lambda _path: fake)
    monkeypatch.setattr(nccl_memory, "BLOCKS", Blocks())
    monkeypatch.setattr(_registration, "BLOCKS", nccl_memory.BLOCKS)
    monkeypatch.setattr(_registration, "NcclLibrary", SimpleNamespace(only=lambda: fake))
    return fake


def buffers_at(*pointers: int) -> Any:
    """What stands for CuPy arrays that begin at these addresses."""
    return {str(pointer): SimpleNamespace(data=SimpleNamespace(ptr=pointer)) for pointer in pointers}


def registered(transport: ThreadTransport, communicators: list[int]) -> bool:
    arrays = buffers_at(*(block.pointer for block in nccl_memory.BLOCKS.taken))
    first = register_buffers(transport.control, communicators, arrays)
    return first and register_buffers(transport.control, communicators, arrays)  # again is once


def test_every_buffer_with_every_communicator(library: FakeNccl) -> None:
    blocks = [nccl_memory.BLOCKS.take(nbytes) for nbytes in (100, 200)]
    assert play(1, lambda transport: registered(transport, [7, 8]), 20.0) == [True]
    assert set(library.registered) == {(c, block.pointer) for c in (7, 8) for block in blocks}
    nccl_memory.BLOCKS.deregister_all()
    assert not library.registered
    nccl_memory.BLOCKS.free_all()
    assert sorted(library.freed) == sorted(block.pointer for block in blocks)
    assert nccl_memory.BLOCKS.at(blocks[0].pointer) is None


def test_what_is_registered_stays_so_from_case_to_case(library: FakeNccl) -> None:
    pointers = []
    for _case in range(2):
        nccl_memory.BLOCKS.begin_case()
        pointers.append(nccl_memory.BLOCKS.take(100).pointer)
        assert play(1, lambda transport: registered(transport, [7]), 20.0) == [True]
    assert pointers[0] == pointers[1]
    assert library.registered == {(7, pointers[0]): pointers[0]}
    assert not library.freed


def test_one_unable_rank_prevents_registration_on_all(library: FakeNccl) -> None:
    nccl_memory.BLOCKS.take(100)
    library.refused = frozenset({1})
    assert play(3, lambda transport: registered(transport, [transport.rank]), 20.0) == [False] * 3
    assert not library.registered


def test_without_a_known_library_no_rank_registers(library: FakeNccl, monkeypatch: pytest.MonkeyPatch) -> None:
    nccl_memory.BLOCKS.take(100)
    monkeypatch.setattr(_registration, "NcclLibrary", SimpleNamespace(only=lambda: None))
    assert play(2, lambda transport: registered(transport, [transport.rank]), 20.0) == [False] * 2
    assert not library.registered


def test_other_memory_is_left_alone(library: FakeNccl) -> None:
    nccl_memory.BLOCKS.take(100)

    def main(transport: ThreadTransport) -> bool:
        return register_buffers(transport.control, [1], buffers_at(1 << 40))

    assert play(2, main, 20.0) == [False, False]
    assert not library.registered


def test_no_library_to_allocate_from_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl_memory, "loaded_nccl", lambda: [])
    with pytest.raises(EnvironmentFault, match="no NCCL library is loaded"):
        Blocks().take(8)


MIB = 1 << 20


def case_of(blocks: Blocks, *sizes: int) -> list[NcclMemory]:
    """The blocks of a case with buffers of these MiB."""
    blocks.begin_case()
    return [blocks.take(size * MIB) for size in sizes]


def test_block_is_reused_in_order_despite_references(library: FakeNccl) -> None:
    blocks = Blocks()
    blocks.plan([8 * MIB] * 3 + [4 * MIB] * 4)  # another case needs more
    first = case_of(blocks, 4, 4, 8)
    assert case_of(blocks, 4, 4, 8) == first  # though `first` is alive
    again = [block.pointer for block in first]
    del first
    assert [block.pointer for block in case_of(blocks, 4, 4, 8)] == again  # and where nothing is
    assert [block.pointer for block in case_of(blocks, 8, 4)] == [again[2], again[0]]
    assert not library.freed


@pytest.mark.usefixtures("library")
def test_planned_blocks_serve_every_case_exactly() -> None:
    cases = [[4, 64], [2] * 5, [1, 32, 8, 8]]
    planned: tuple[int, ...] = ()
    for sizes in cases:
        planned = widened(planned, [size * MIB for size in sizes])
    # The k-th is the largest of the cases' k-th: 64 of 64, 2, 32; 8 of 4, 2, 8; 8 and 2 of the last two; 2.
    assert planned == tuple(size * MIB for size in (64, 8, 8, 2, 2))
    blocks, made = Blocks(), set()
    blocks.plan(planned)
    for sizes in (*cases, *reversed(cases)):
        taken = case_of(blocks, *sizes)
        assert all(block.nbytes >= size * MIB for block, size in zip(taken, sizes, strict=True))
        assert len({block.pointer for block in taken}) == len(sizes)
        made |= {(block.pointer, block.nbytes) for block in taken}
    assert sorted(nbytes for _pointer, nbytes in made) == sorted(planned)


@pytest.mark.usefixtures("library")
def test_unplanned_case_gets_its_own_block() -> None:
    blocks = Blocks()
    blocks.plan([2 * MIB])
    assert [block.nbytes for block in case_of(blocks, 3, 1)] == [3 * MIB, 2 * MIB]


def test_sizes_of_blocks_are_what_a_driver_gives() -> None:
    assert widened((), [1, 2 * MIB, 2 * MIB + 1]) == (4 * MIB, 2 * MIB, 2 * MIB)


def test_plug_ins_of_nccl_are_not_taken_for_it(tmp_path: Path) -> None:
    paths = [
        "/opt/my plugins/libnccl-net.so",
        "/usr/lib/libnccl-net-ofi.so.0",
        "/usr/lib/libnccl-tuner.so",
        "/usr/lib/libnccl-profiler.so",
        "/usr/lib/libnccl_ep.so.1",
        "/usr/lib/x86_64-linux-gnu/libnccl.so.2.27.3",
        "/opt/my venv/nvidia/nccl/lib/libnccl.so.2",
        "/opt/my venv/nvidia/nccl/lib/libnccl.so.2",
        "/opt/libnccl/libcudart.so.13",
        "[heap]",
        "",
    ]
    maps = tmp_path / "maps"
    maps.write_text("".join(f"7f0000000000-7f0000001000 r-xp 00000000 08:01 77       {path}\n" for path in paths))
    assert loaded_nccl(maps) == [
        "/opt/my venv/nvidia/nccl/lib/libnccl.so.2",
        "/usr/lib/x86_64-linux-gnu/libnccl.so.2.27.3",
    ]


def test_asynchronous_error_has_nccls_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _path: nccl_functions())
    library = NcclLibrary("libnccl.so.2")
    assert first_trouble(library, [1, 3]) is None
    assert first_trouble(library, [1, 2, 3]) == (
        "NCCL: remote process exited or there was a network error (socketProgressOpt: Call to recv from "
        "10.0.0.3<40112> failed : Connection reset by peer)"
    )
