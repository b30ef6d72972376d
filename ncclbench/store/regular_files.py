"""Files of a run directory, read without trusting what lies there under their names."""

from pathlib import Path

from ncclbench.errors import EnvironmentFault, UsageError


def content_of(path: Path) -> bytes | None:
    """What is in a file; None if there is none of that name.

    Raises:
        UsageError: if it is no regular file: a pipe would never end, a device would fill the memory.
        EnvironmentFault: if it cannot be read.
    """
    try:
        return path.read_bytes() if is_regular(path) else None
    except OSError as error:
        raise unreadable(error, path) from None


def is_regular(path: Path) -> bool:
    """Whether there is such a file at all; see `content_of` for what it raises."""
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is no regular file, as everything in a run directory must be")
        return path.exists()
    except OSError as error:
        raise unreadable(error, path) from None


def unreadable(error: OSError, path: Path) -> EnvironmentFault:
    """The one line for a file that is there and cannot be read."""
    return EnvironmentFault(f"cannot read {error.filename or path}: {error.strerror}")
