"""The state of a GPU while it is measured: clocks, throttling, temperature, power, error counters; by NVML.

A throttled or erring GPU makes a good fabric look bad. What a GPU or a driver does not tell is left out.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

# nvml.h: reasons that are not the GPU's own choice to idle.
_THROTTLE = {
    0x0000000000000004: "software power cap",
    0x0000000000000008: "hardware slowdown",
    0x0000000000000020: "software thermal slowdown",
    0x0000000000000040: "hardware thermal slowdown",
    0x0000000000000080: "hardware power brake",
}

# Error counters: the function that tells each, and its arguments after the device.
_NVLINK = {"replay": 0, "recovery": 1, "CRC flit": 2, "CRC data": 3}
_COUNTERS: dict[str, tuple[Any, ...]] = {
    "ECC uncorrected errors": ("nvmlDeviceGetTotalEccErrors", 1, 0),
    "ECC corrected errors": ("nvmlDeviceGetTotalEccErrors", 0, 0),
    **{
        f"NVLink {link} {name} errors": ("nvmlDeviceGetNvLinkErrorCounter", link, kind)
        for link in range(18)
        for name, kind in _NVLINK.items()
    },
}

# nvmlReturn_t: answers that will be the same next time. Every question takes a while, and there are 74.
_INVALID_ARGUMENT, _NOT_SUPPORTED = 2, 3

# By PCI address, the error counters that such an answer was given for.
_never_told: dict[str, set[str]] = {}


@cache
def _library() -> Any:
    """NVML, initialised; None where there is none."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no wheel, no driver, no permission: all mean that there is nobody to ask
        return None
    return pynvml


def gpu_state(pci_bus_id: str) -> dict[str, Any]:
    """The state of the GPU at `pci_bus_id`; empty without NVML.

    Keys: ``clock_seconds`` (the host's monotonic clock, when NVML was asked), ``sm_mhz``, ``memory_mhz``, ``celsius``,
    ``watts``, ``throttled`` (reasons in words), ``errors`` (counters).
    """
    nvml = _library()
    if nvml is None:
        return {}
    handle = _asked(lambda: nvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id.encode()))
    if handle is None:
        return {}
    power = _asked(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
    reasons = _asked(lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)) or 0
    state = {
        "clock_seconds": time.monotonic(),
        "sm_mhz": _asked(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
        "memory_mhz": _asked(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
        "celsius": _asked(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        "watts": power / 1000 if power is not None else None,
        "throttled": [words for bit, words in _THROTTLE.items() if reasons & bit],
        "errors": _errors(nvml, handle, _never_told.setdefault(pci_bus_id, set())),
    }
    return {name: value for name, value in state.items() if value is not None}


def gpu_identity(pci_bus_id: str) -> dict[str, Any]:
    """Which GPU is at `pci_bus_id`; what NVML does not tell is left out.

    Keys: ``name``, ``uuid``, ``serial``, ``vbios``, ``driver``.
    """
    nvml = _library()
    handle = None if nvml is None else _asked(lambda: nvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id.encode()))
    if handle is None:
        return {}
    asked = {
        "name": lambda: nvml.nvmlDeviceGetName(handle),
        "uuid": lambda: nvml.nvmlDeviceGetUUID(handle),
        "serial": lambda: nvml.nvmlDeviceGetSerial(handle),
        "vbios": lambda: nvml.nvmlDeviceGetVbiosVersion(handle),
        "driver": lambda: nvml.nvmlSystemGetDriverVersion(),
    }
    found = {name: _asked(ask) for name, ask in asked.items()}
    return {
        name: value.decode() if isinstance(value, bytes) else str(value)
        for name, value in found.items()
        if value is not None
    }


def _errors(nvml: Any, handle: Any, never: set[str]) -> dict[str, int]:
    """What the GPU's error counters say; those in `never` are not asked, and those that it has not are added there."""
    found = {}
    for name, (function, *arguments) in _COUNTERS.items():
        if name in never:
            continue
        try:
            found[name] = int(getattr(nvml, function)(handle, *arguments))
        except Exception as error:  # as in `_asked`; `value` is NVML's code
            if getattr(error, "value", None) in (_INVALID_ARGUMENT, _NOT_SUPPORTED):
                never.add(name)
    return found


def _asked(ask: Callable[[], Any]) -> Any:
    """The answer, or None where this GPU has none."""
    try:
        return ask()
    except Exception:  # NVML raises a class a code; all of them mean: not told here
        return None
