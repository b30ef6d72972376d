"""The state of a GPU by NVML: clocks, throttling, temperature, power and error counters.

A GPU that throttles or has errors makes a good fabric look bad. Values that NVML does not have are left out.
"""

import time
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TypeVar

from ncclbench.store.records import GpuState

T = TypeVar("T")

# nvml.h: the throttle reasons, without those of an idle GPU.
_THROTTLE = {
    0x0000000000000004: "software power cap",
    0x0000000000000008: "hardware slowdown",
    0x0000000000000020: "software thermal slowdown",
    0x0000000000000040: "hardware thermal slowdown",
    0x0000000000000080: "hardware power brake",
}

# Error counters: the function that reads each, and its arguments after the device.
_NVLINK = {"replay": 0, "recovery": 1, "CRC flit": 2, "CRC data": 3}
_COUNTERS: dict[str, tuple[str, int, int]] = {
    "ECC uncorrected errors": ("nvmlDeviceGetTotalEccErrors", 1, 0),
    "ECC corrected errors": ("nvmlDeviceGetTotalEccErrors", 0, 0),
    **{
        f"NVLink {link} {name} errors": ("nvmlDeviceGetNvLinkErrorCounter", link, kind)
        for link in range(18)
        for name, kind in _NVLINK.items()
    },
}

# nvmlReturn_t: errors that do not change. Each of the 74 calls takes a while, so these are not repeated.
_INVALID_ARGUMENT, _NOT_SUPPORTED = 2, 3

# By PCI address, the error counters that the GPU does not have.
unsupported_counters: dict[str, set[str]] = {}


@cache
def nvml_library() -> ModuleType | None:
    """NVML, initialised; None where there is none."""
    try:
        pynvml = import_module("pynvml")
        pynvml.nvmlInit()
    except Exception:  # no wheel, no driver, or no permission: NVML cannot be used
        return None
    return pynvml


def gpu_state(pci_bus_id: str) -> GpuState | None:
    """The state of the GPU at `pci_bus_id`; None without NVML."""
    nvml = nvml_library()
    if nvml is None:
        return None
    handle = _asked(lambda: nvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id.encode()))
    if handle is None:
        return None
    power = _asked(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
    reasons = _asked(lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)) or 0
    return GpuState(
        clock_seconds=time.monotonic(),
        sm_mhz=_asked(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
        memory_mhz=_asked(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
        celsius=_asked(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        watts=power / 1000 if power is not None else None,
        throttled=[words for bit, words in _THROTTLE.items() if reasons & bit],
        errors=dict(_errors(nvml, handle, unsupported_counters.setdefault(pci_bus_id, set()))),
    )


def gpu_identity(pci_bus_id: str) -> dict[str, str]:
    """Which GPU is at `pci_bus_id`; values that NVML does not have are left out.

    Keys: ``name``, ``uuid``, ``serial``, ``vbios``, ``driver``.
    """
    nvml = nvml_library()
    if nvml is None:
        return {}
    handle = _asked(lambda: nvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id.encode()))
    if handle is None:
        return {}
    getters = {
        "name": lambda: nvml.nvmlDeviceGetName(handle),
        "uuid": lambda: nvml.nvmlDeviceGetUUID(handle),
        "serial": lambda: nvml.nvmlDeviceGetSerial(handle),
        "vbios": lambda: nvml.nvmlDeviceGetVbiosVersion(handle),
        "driver": lambda: nvml.nvmlSystemGetDriverVersion(),
    }
    found = {name: _asked(getter) for name, getter in getters.items()}
    return {
        name: value.decode() if isinstance(value, bytes) else str(value)
        for name, value in found.items()
        if value is not None
    }


def _errors(nvml: ModuleType, handle: object, not_supported: set[str]) -> dict[str, int]:
    """The GPU's error counters, without those in `not_supported`; those that it does not have are added there."""
    found = {}
    for name, (function, *arguments) in _COUNTERS.items():
        if name in not_supported:
            continue
        try:
            found[name] = int(getattr(nvml, function)(handle, *arguments))
        except Exception as error:  # of any class, as in `_asked`; `value` is NVML's code
            if getattr(error, "value", None) in (_INVALID_ARGUMENT, _NOT_SUPPORTED):
                not_supported.add(name)
    return found


def _asked(getter: Callable[[], T]) -> T | None:
    """What `getter` returns; None if NVML cannot read it from this GPU."""
    try:
        return getter()
    except Exception:  # NVML has one class per error code; each means that the value cannot be read
        return None
