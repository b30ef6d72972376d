"""`RunRequest`: the typed form of the options of ``ncclbench run``; ranks receive it as JSON."""

from pathlib import Path
from typing import Literal

import msgspec

from ncclbench.config.request_json import request_json
from ncclbench.errors import UsageError
from ncclbench.plan.plan import SettingOverrides, Size

ParamValue = str | int | float | bool
Results = Literal["none", "table", "json"]

# The kernel's limit for one argument of a process (MAX_ARG_STRLEN), including the null byte.
_MOST_BYTES = 128 * 1024


class RunRequest(SettingOverrides, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What to measure, over what, and where the results go.

    The settings of `SettingOverrides` (`iterations`, `precision`, ...) are fields too.

    Attributes:
        patterns: the patterns to measure; with `plan`, only its cases of these patterns.
        plan: a plan file, or the name of a shipped plan.
        min_bytes: the smallest size, such as 8 or "1K"; None for the pattern's default, as for the next four.
        max_bytes: the largest size.
        factor: the ratio of successive sizes.
        dtypes: element types.
        timings: timing regimes.
        params: parameters of the patterns; a list makes one case per value.
        transport: name of the transport, or ``auto``.
        nproc: ranks to start on this host; None for one per visible GPU, or 2 to 8 on CPUs.
        device: location of the buffers, for a transport that supports both GPUs and the host.
        bind: bind each rank to its share of the cores.
        topology: a topology file.
        out: the run directory; None to name one after the plan and the time.
        launcher: the command that starts the ranks, once for each process start.
        resume: continue the run in `out`.
        process_start: make only this process start of the plan, counted from 1.
        results: the output on stdout at the end.
        progress: print progress on stderr; errors are always printed.
        one_of_several: another process makes all process starts and prints their results.
        command: the user's command line after ``ncclbench``, for the manifest and for messages.
    """

    patterns: tuple[str, ...] = ()
    plan: str | None = None
    min_bytes: Size | None = None
    max_bytes: Size | None = None
    factor: float | None = None
    dtypes: tuple[str, ...] = ()
    timings: tuple[str, ...] = ()
    params: dict[str, ParamValue | list[ParamValue]] = msgspec.field(default_factory=dict)
    transport: str = "auto"
    nproc: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    bind: bool = False
    topology: Path | None = None
    out: Path | None = None
    launcher: str | None = None
    resume: bool = False
    process_start: int | None = None
    results: Results = "none"
    progress: bool = True
    one_of_several: bool = False
    command: tuple[str, ...] = ()


def rank_arguments(request: RunRequest) -> list[str]:
    """The arguments of ``ncclbench`` for a process that carries out `request`.

    The request is an argument because every launcher passes arguments to all nodes. Not every launcher passes
    variables, and a file may not be visible on all nodes.

    Raises:
        UsageError: if the request is too long for an argument.
    """
    text = request_json(request)
    if len(text) >= _MOST_BYTES:
        raise UsageError(
            f"the request takes {len(text)} bytes, and an argument can have at most {_MOST_BYTES - 1}: "
            "write the patterns and parameters into a plan file"
        )
    return ["run", "--request", text]
