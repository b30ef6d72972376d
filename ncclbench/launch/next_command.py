"""The command line of the next process start, for the user: under a launcher no start can be made from inside.

It is made of what the user typed: options are added and left out. Behind ``--`` there are patterns only, whatever they
look like, so options end before it.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ncclbench.launch.launcher_detection import job_size, slurm_step_nodes

_LAUNCHERS = ("torchrun", "mpirun", "mpiexec", "mpiexec.hydra", "prterun", "orterun", "srun", "flux")
_MOST_PARENTS = 8


def next_command(
    launcher: str, arguments: Sequence[str], out: Path, environ: Mapping[str, str], start: int | None = None
) -> str:
    """The command line that makes the next start: the launcher's own where it can be seen, or else rebuilt.

    Args:
        launcher: its name, as in the manifest.
        arguments: the user's own, behind ``ncclbench``.
        out: the run directory, which the next start must name.
        environ: variables, for what a launcher tells nowhere else.
        start: named explicitly, for nodes that do not see the run directory; counted from 0.
    """
    ours = _without_option(arguments, "--process-start")  # which was for the start before
    more: list[str] = []
    options, _ = _parted(ours)
    if not any(word in ("-o", "--out") or word.startswith(("--out=", "-o")) for word in options):
        more += ["-o", str(out)]
    if "--resume" not in options:
        more.append("--resume")
    more += ["--process-start", str(start + 1)] if start is not None else []
    ours = _with_options(ours, more)
    seen = _visible_launcher(arguments)
    if seen is not None:
        return shlex.join([*seen, *ours])
    program = shlex.join(["ncclbench", *ours])
    if launcher == "slurm":
        return f"srun --nodes={slurm_step_nodes(environ) or '?'} --ntasks={job_size(environ)} {program}"
    return f"{'mpiexec' if launcher in ('openmpi', 'mpich') else launcher} (with the options of this start) {program}"


def _visible_launcher(arguments: Sequence[str]) -> list[str] | None:
    """The words of the launcher above this process, up to our own arguments; None if it is not visible.

    A launcher on another node, or behind a daemon, has no command line with our arguments here.
    """
    for words in _command_lines_above():
        starts_us = any(Path(word).name in _LAUNCHERS for word in words[:2]) or "torch.distributed.run" in words[:4]
        if starts_us and arguments and list(arguments) == words[-len(arguments) :]:
            return _as_typed(words[: -len(arguments)])
    return None


def _command_lines_above() -> Iterator[list[str]]:
    """The command lines of the processes above this one, the nearest first; those of other users may be hidden."""
    import psutil

    with suppress(psutil.Error):  # a process has ended meanwhile
        for process in psutil.Process().parents()[:_MOST_PARENTS]:
            with suppress(psutil.AccessDenied):
                yield process.cmdline()


def _as_typed(words: list[str]) -> list[str]:
    """Open MPI 5's mpirun becomes prterun, which by itself starts no MPI job; what was typed is not to be seen."""
    return [
        str(Path(word).with_name("mpirun")) if Path(word).name == "prterun" else word for word in words[:2]
    ] + words[2:]


def _with_options(arguments: Sequence[str], more: Sequence[str]) -> list[str]:
    """`arguments` and `more` options, which come last, but before a ``--``."""
    options, patterns = _parted(arguments)
    return [*options, *more, *patterns]


def _without_option(arguments: Sequence[str], flag: str) -> list[str]:
    """`arguments` without the option `flag` and its value, in both of its spellings."""
    options, patterns = _parted(arguments)
    kept: list[str] = []
    words = iter(options)
    for word in words:
        if word == flag:
            next(words, None)
        elif not word.startswith(f"{flag}="):
            kept.append(word)
    return [*kept, *patterns]


def _parted(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    words = list(arguments)
    end = words.index("--") if "--" in words else len(words)
    return words[:end], words[end:]
