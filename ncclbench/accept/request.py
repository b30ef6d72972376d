"""`AcceptRequest`: the options of ``ncclbench accept``, typed."""

from pathlib import Path

import msgspec


class AcceptRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A profile and the run to judge: an existing run, or a new one that is measured first.

    The fields from `plan` to `resume` are for a new run; they have the same meaning as in a `RunRequest`.

    Attributes:
        profile: a profile file, or the name of a shipped profile.
        run: an existing run directory; None to measure a new run.
        baseline: an earlier run to compare with.
        force: compare with a baseline that is not comparable.
        redact: write a second bundle, with hashes for host names, addresses and serials.
        plan: the plan to measure; None for the profile's plan.
        transport: name of the transport; ``auto`` for the first of the profile's.
        progress: whether progress is printed on stderr; errors are always printed.
        command: the command line after ``ncclbench``, for the manifest and for messages.
    """

    profile: str
    run: Path | None = None
    baseline: Path | None = None
    force: bool = False
    redact: bool = False
    plan: str | None = None
    transport: str = "auto"
    nproc: int | None = None
    topology: Path | None = None
    out: Path | None = None
    launcher: str | None = None
    resume: bool = False
    progress: bool = True
    command: tuple[str, ...] = ()
