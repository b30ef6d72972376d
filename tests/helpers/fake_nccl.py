"""NCCL libraries that do not exist: one that allocates and registers memory, and the C functions of an error."""

from types import SimpleNamespace
from typing import Any


class FakeNccl:
    """Returns addresses and handles. Registration fails for the communicators in `refused`."""

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


def nccl_functions() -> Any:
    """The C functions of NCCL. Communicator 2 has an asynchronous error."""

    def get_async_error(communicator: Any, state: Any) -> int:
        state._obj.value = {1: 0, 2: 6, 3: 7}[communicator.value]  # of ctypes' byref
        return 0

    def get_error_string(code: int) -> bytes:
        return {6: b"remote process exited or there was a network error"}[code]

    def get_last_error(_communicator: Any) -> bytes:
        return b"\nsocketProgressOpt: Call to recv from 10.0.0.3<40112> failed : Connection reset by peer"

    return SimpleNamespace(
        ncclCommGetAsyncError=get_async_error,
        ncclGetErrorString=get_error_string,
        ncclGetLastError=get_last_error,
    )
