"""Registering buffers with communicators: everywhere or nowhere, and undone before either goes."""

from types import SimpleNamespace
from typing import Any

import pytest

from ncclbench import buffers as buffers_module
from ncclbench.buffers import NcclMemory, deregister_all, nccl_memory_of
from ncclbench.errors import EnvironmentFault
from ncclbench.nccl_library import NcclLibrary, first_trouble
from ncclbench.transports import _registration
from ncclbench.transports._registration import register_buffers
from ncclbench.transports.threads import ThreadTransport, play


class FakeLibrary:
    """Hands out addresses and handles, and refuses communicators that it is told to."""

    def __init__(self, refused: frozenset[int] = frozenset()) -> None:
        self.refused = refused
        self.next_address = 4096
        self.registered: dict[tuple[int, int], int] = {}
        self.freed: list[int] = []

    def allocate(self, nbytes: int) -> int:
        self.next_address += nbytes
        return self.next_address - nbytes

    def free(self, pointer: int) -> None:
        assert not any(handle == pointer for handle in self.registered.values()), "freed while registered"
        self.freed.append(pointer)

    def register(self, communicator: int, pointer: int, _nbytes: int) -> int | None:
        if communicator in self.refused:
            return None
        assert (communicator, pointer) not in self.registered
        self.registered[communicator, pointer] = pointer
        return pointer

    def deregister(self, communicator: int, handle: int) -> None:
        del self.registered[communicator, handle]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    fake = FakeLibrary()
    monkeypatch.setattr(buffers_module, "loaded_nccl", lambda: ["libnccl.so.2"])
    monkeypatch.setattr(buffers_module, "NcclLibrary", lambda _path: fake)
    monkeypatch.setattr(_registration, "NcclLibrary", SimpleNamespace(only=lambda: fake))
    return fake


def array_of(memory: NcclMemory) -> Any:
    """What stands for a CuPy array on `memory`."""
    return SimpleNamespace(data=SimpleNamespace(ptr=memory.pointer), owner=memory)


def registered(transport: ThreadTransport, communicators: list[int]) -> bool:
    memories = [NcclMemory(100), NcclMemory(200)]
    arrays: Any = {"a": array_of(memories[0]), "b": array_of(memories[1])}
    first = register_buffers(transport.control, communicators, arrays)
    return first and register_buffers(transport.control, communicators, arrays)  # again is once


def test_every_buffer_with_every_communicator(library: FakeLibrary) -> None:
    held = [NcclMemory(100), NcclMemory(200)]

    def main(transport: ThreadTransport) -> bool:
        return register_buffers(transport.control, [7, 8], {"a": array_of(held[0]), "b": array_of(held[1])})

    assert play(1, main, 20.0) == [True]
    assert set(library.registered) == {(c, memory.pointer) for c in (7, 8) for memory in held}
    deregister_all()
    assert not library.registered
    held.clear()
    assert len(library.freed) == 2
    assert nccl_memory_of(SimpleNamespace(data=SimpleNamespace(ptr=4096))) is None


def test_memory_that_goes_is_deregistered_first(library: FakeLibrary) -> None:
    assert play(3, lambda transport: registered(transport, [transport.rank]), 20.0) == [True] * 3
    assert not library.registered
    assert len(library.freed) == 6


def test_where_one_rank_cannot_nobody_does(library: FakeLibrary) -> None:
    library.refused = frozenset({1})
    assert play(3, lambda transport: registered(transport, [transport.rank]), 20.0) == [False] * 3
    assert not library.registered


def test_without_a_library_that_is_known_nobody_does(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registration, "NcclLibrary", SimpleNamespace(only=lambda: None))
    assert play(2, lambda transport: registered(transport, [transport.rank]), 20.0) == [False] * 2
    assert not library.registered


def test_other_memory_is_left_alone(library: FakeLibrary) -> None:
    def main(transport: ThreadTransport) -> bool:
        other: Any = {"a": SimpleNamespace(data=SimpleNamespace(ptr=1 << 40))}
        return register_buffers(transport.control, [1], other)

    assert play(2, main, 20.0) == [False, False]
    assert not library.registered


def test_no_library_to_allocate_from_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers_module, "loaded_nccl", lambda: [])
    with pytest.raises(EnvironmentFault, match="no NCCL library is loaded"):
        NcclMemory(8)


class FakeC:
    """The C functions, with an asynchronous error of the communicator 2."""

    def ncclCommGetAsyncError(self, communicator: Any, state: Any) -> int:
        state._obj.value = {1: 0, 2: 6, 3: 7}[communicator.value]
        return 0

    def ncclGetErrorString(self, code: int) -> bytes:
        return {6: b"remote process exited or there was a network error"}[code]

    def ncclGetLastError(self, _communicator: Any) -> bytes:
        return b"\nsocketProgressOpt: Call to recv from 10.0.0.3<40112> failed : Connection reset by peer"


def test_an_asynchronous_error_is_told_in_nccls_words() -> None:
    library = NcclLibrary.__new__(NcclLibrary)
    library._library = FakeC()  # type: ignore[assignment]
    assert first_trouble(library, [1, 3]) is None
    assert first_trouble(library, [1, 2, 3]) == (
        "NCCL: remote process exited or there was a network error (socketProgressOpt: Call to recv from "
        "10.0.0.3<40112> failed : Connection reset by peer)"
    )
