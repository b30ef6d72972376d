"""`RunRequest`: what ``ncclbench run`` is asked to do. Options become one once; ranks receive it as JSON."""

from pathlib import Path
from typing import Literal

import msgspec

from ncclbench.config.request_json import request_json
from ncclbench.errors import UsageError
from ncclbench.plan.plan import SettingOverrides, Size

ParamValue = str | int | float | bool
Results = Literal["none", "table", "json"]

# The kernel's limit for one argument of a process (MAX_ARG_STRLEN), with its final null byte.
_MOST_BYTES = 128 * 1024


class RunRequest(SettingOverrides, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What to measure, over what, and where the results go.

    The settings of `SettingOverrides` (`iterations`, `precision`, ...) are fields as well.

    Attributes:
        patterns: the patterns to measure; with `plan`, only these cases of it.
        plan: a plan file, or the name of a shipped plan.
        min_bytes: the smallest size, such as 8 or "1K"; the pattern's own default if None, as all below.
        max_bytes: the largest size.
        factor: each size is this times the one before.
        dtypes: element types.
        timings: timing regimes.
        params: parameters of the patterns; a list makes one case per value.
        transport: its name, or ``auto``.
        nproc: ranks to start on this host; None for one per visible GPU, or 2 to 8 on CPUs.
        device: where the buffers of a transport are that can have them on GPUs and on the host.
        bind: keep each rank to its share of the cores.
        topology: a topology file.
        out: the run directory; None to name one after the plan and the time.
        launcher: the command that starts the ranks, once per process start.
        resume: continue the run in `out`.
        process_start: make only this process start of the plan, from 1.
        results: what is printed on stdout at the end.
        progress: whether progress is printed on stderr; errors always are.
        one_of_several: another process makes all process starts, and prints the results of all of them.
        command: the user's command line behind ``ncclbench``, for the manifest and for messages.
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

    One argument, because every launcher passes arguments on to all nodes; not all pass on variables, and a file may
    not be visible there.

    Raises:
        UsageError: if it is too long for an argument.
    """
    text = request_json(request)
    if len(text) >= _MOST_BYTES:
        raise UsageError(
            f"what is asked for takes {len(text)} bytes, and a process takes arguments of up to {_MOST_BYTES - 1}: "
            "write the patterns and parameters into a plan file"
        )
    return ["run", "--request", text]
