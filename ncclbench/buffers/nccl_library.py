"""The NCCL that this process has loaded, and its C functions that neither torch nor CuPy passes on."""

import ctypes
import re
from collections.abc import Iterable
from pathlib import Path

from ncclbench.errors import EnvironmentFault

# ncclResult_t: these two are no trouble.
_SUCCESS, _IN_PROGRESS = 0, 7

# The library itself; libnccl-net.so, libnccl-tuner.so and libnccl-profiler.so are plug-ins.
_NCCL = re.compile(r".*/libnccl\.so[.0-9]*")


def loaded_nccl(maps: Path = Path("/proc/self/maps")) -> list[str]:
    """Paths of the NCCL libraries in this process; more than one means that torch and CuPy brought their own."""
    mapped = (line.split(maxsplit=5) for line in maps.read_text().splitlines())
    return sorted({fields[5] for fields in mapped if len(fields) == 6 and _NCCL.fullmatch(fields[5])})


class NcclLibrary:
    """One loaded NCCL. Communicators are addresses, and must be of this very library.

    Args:
        path: of the library.
    """

    def __init__(self, path: str) -> None:
        """Open what is loaded already."""
        self._library = ctypes.CDLL(path)
        for name in ("ncclGetErrorString", "ncclGetLastError"):
            if hasattr(self._library, name):
                getattr(self._library, name).restype = ctypes.c_char_p

    @classmethod
    def only(cls) -> "NcclLibrary | None":
        """The one that is loaded; None if there is none, or if one cannot tell whose communicator is whose."""
        paths = loaded_nccl()
        return cls(paths[0]) if len(paths) == 1 else None

    def allocate(self, nbytes: int) -> int:
        """The address of fresh device memory that NCCL can register with communicators.

        Raises:
            EnvironmentFault: if NCCL cannot, with its code.
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
        """Give memory of `allocate` back."""
        self._library.ncclMemFree(ctypes.c_void_p(pointer))

    def register(self, communicator: int, pointer: int, nbytes: int) -> int | None:
        """Register memory with a communicator; the handle, which may be 0, or None where NCCL cannot."""
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
        """The asynchronous error of a communicator in NCCL's words; None if there is none. Any thread may ask."""
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
