"""`AcceptRequest`: what ``ncclbench accept`` is asked to measure and to judge."""

from pathlib import Path

import msgspec


class AcceptRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A profile, and the run that it judges: one that is there, or one that is measured first.

    The fields from `plan` to `resume` are for a new run; each means what it means in a `RunRequest`.

    Attributes:
        profile: a profile file, or the name of a shipped profile.
        run: a run directory that was measured already; None to measure.
        baseline: an earlier run to compare with as well.
        force: compare with a baseline that is unlike.
        redact: write a second bundle, with hashes for host names, addresses and serials.
        plan: what to measure; None for the profile's own plan.
        transport: its name; ``auto`` for the first of the profile's.
        progress: whether progress is printed on stderr; errors always are.
        command: the user's command line behind ``ncclbench``, for the manifest and for messages.
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
