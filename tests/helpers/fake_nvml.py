"""The part of pynvml that reads the error counters of a GPU, without a GPU."""

from collections import Counter
from typing import Any


class NvmlError(Exception):
    """pynvml's exception: the code is in `value`."""

    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


class FakeNvml:
    """Answers queries of error counters. For the links in `answers`, the first GPU raises that error code."""

    def __init__(self, answers: dict[int, int]) -> None:
        self.answers = answers
        self.asked: Counter[tuple[bytes, int]] = Counter()

    def nvmlDeviceGetHandleByPciBusId(self, address: bytes) -> bytes:
        return address

    def nvmlDeviceGetTotalEccErrors(self, _handle: bytes, kind: int, _counter: int) -> int:
        if kind == 1:
            raise NvmlError(3)
        return 5

    def nvmlDeviceGetNvLinkErrorCounter(self, handle: bytes, link: int, _kind: int) -> int:
        self.asked[handle, link] += 1
        if handle == b"0000:01:00.0" and link in self.answers:
            raise NvmlError(self.answers[link])
        return link

    def __getattr__(self, name: str) -> Any:
        raise NvmlError(3)
