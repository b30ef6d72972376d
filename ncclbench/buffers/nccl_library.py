"""The NCCL that this process has loaded, and its C functions that neither torch nor CuPy exposes."""

import ctypes
import re
from collections.abc import Iterable
from pathlib import Path

from ncclbench.errors import EnvironmentFault

# ncclResult_t: these two are not errors.
_SUCCESS, _IN_PROGRESS = 0, 7

# The library itself; libnccl-net.so, libnccl-tuner.so and libnccl-profiler.so are plug-ins.
_NCCL = re.compile(r".*/libnccl\.so[.0-9]*")


def loaded_nccl(maps: Path = Path("/proc/self/maps")) -> list[str]:
    """Paths of the NCCL libraries in this process; more than one if torch and CuPy each loaded their own."""
    mapped = (line.split(maxsplit=5) for line in maps.read_text().splitlines())
    return sorted({fields[5] for fields in mapped if len(fields) == 6 and _NCCL.fullmatch(fields[5])})


class NcclLibrary:
    """One loaded NCCL library. Communicators are passed as pointers, and must belong to this library.

    Args:
        path: path of the library.
    """

    def __init__(self, path: str) -> None:
        """Open the library, which is already loaded."""
        self._library = ctypes.CDLL(path)
        for name in ("ncclGetErrorString", "ncclGetLastError"):
            if hasattr(self._library, name):
                getattr(self._library, name).restype = ctypes.c_char_p

    @classmethod
    def only(cls) -> "NcclLibrary | None":
        """The loaded library; None if there is none, or if there are several, which makes communicators ambiguous."""
        paths = loaded_nccl()
        return cls(paths[0]) if len(paths) == 1 else None

    def allocate(self, nbytes: int) -> int:
        """Allocate device memory that NCCL can register with communicators; returns its address.

        Raises:
            EnvironmentFault: if the allocation fails, with NCCL's code.
        """
        pointer = ctypes.c_void_p()
        code = self._library.ncclMemAlloc(ctypes.byref(pointer), ctypes.c_size_t(nbytes))
        if code or not pointer.value:
            raise EnvironmentFault(
                f"ncclMemAlloc of {nbytes} bytes failed with ncclResult {code}: NCCL may round each buffer up, to "
                "512 MiB on some GPUs; use --cache warm, --buffers pool, or lower --max-bytes"
            )
        return int(pointer.value)

    def free(self, pointer: int) -> None:
        """Free memory from `allocate`."""
        self._library.ncclMemFree(ctypes.c_void_p(pointer))

    def register(self, communicator: int, pointer: int, nbytes: int) -> int | None:
        """Register memory with a communicator; returns the handle, which may be 0, or None if that fails."""
        if not hasattr(self._library, "ncclCommRegister"):  # before 2.19
            return None
        handle = ctypes.c_void_p()
        code = self._library.ncclCommRegister(
            ctypes.c_void_p(communicator), ctypes.c_void_p(pointer), ctypes.c_size_t(nbytes), ctypes.byref(handle)
        )
        return None if code else int(handle.value or 0)

    def deregister(self, communicator: int, handle: int) -> None:
        """Undo `register`."""
        self._library.ncclCommDeregister(ctypes.c_void_p(communicator), ctypes.c_void_p(handle))

    def trouble(self, communicator: int) -> str | None:
        """The asynchronous error of a communicator in NCCL's words, or None. Any thread may call this."""
        state = ctypes.c_int()
        code = self._library.ncclCommGetAsyncError(ctypes.c_void_p(communicator), ctypes.byref(state)) or state.value
        if code in (_SUCCESS, _IN_PROGRESS):
            return None
        words = self._library.ncclGetErrorString(code).decode(errors="replace")
        if hasattr(self._library, "ncclGetLastError"):  # from 2.13 on
            last = self._library.ncclGetLastError(ctypes.c_void_p(communicator)).decode(errors="replace").strip()
            words += f" ({last.splitlines()[-1]})" if last else ""
        return f"NCCL: {words}"


def first_trouble(library: NcclLibrary, communicators: Iterable[int]) -> str | None:
    """The first asynchronous error among communicators."""
    return next((words for one in communicators if (words := library.trouble(one))), None)
