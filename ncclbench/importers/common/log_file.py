"""A log file as numbered lines, without the prefixes of launchers and the colors of terminals."""

import hashlib
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ncclbench.errors import UsageError

# Larger files are no logs of a benchmark, and would fill the memory.
MOST_BYTES = 1 << 30
# No row of any format is a hundredth as long. The rest of a line is cut off, which bounds the time per line.
LONGEST_LINE = 1 << 16
_MOST_DIGITS = 18  # of a whole number: what 64 bits hold

# The first bytes of compressed files.
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}

_COLOUR = re.compile(r"\x1b\[[0-9;]{0,20}[A-Za-z]")
# All are anchored, and none can match the same text in two ways.
_PREFIXES = (
    re.compile(r"[A-Z][a-z]{2} [A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \d{4}(?=\[)"),  # mpirun --timestamp-output
    re.compile(r"\d{4}-\d\d-\d\dT[\d:.]{8,20}(?:Z|[+-]\d\d:?\d\d) ?"),  # kubectl logs --timestamps
    re.compile(r"\[(?P<stream>[^\[\]<>]{1,80})\]<(?:stdout|stderr|stddiag)>: ?"),  # mpirun --tag-output
    re.compile(r" {0,6}(?P<stream>\d{1,7}): ?(?=[ #\d]|$)"),  # srun --label
    re.compile(r"\[(?P<stream>\d{1,7})\] (?=[ #\d]|$)"),  # mpiexec.hydra -prepend-rank
)
_BEGINS = re.compile(
    r"#? {0,12}(?:OSU (?:MPI|NCCL)|(?:nccl|rccl)-tests version|nThread \d|Collective test|Using devices|"
    r"size +count +type|Benchmarking |Intel ?\(R\) MPI)"
)
_NUMBER = re.compile(r"-?\d{1,40}(?:\.\d{0,40})?(?:[eE][+-]?\d{1,3})?")
# The output of printf for a rate whose time is zero, and marks of tools for missing values.
_NOTHING = frozenset({"N/A", "n/a", "nan", "-nan", "inf", "-inf"})


@dataclass(frozen=True)
class Line:
    """A line: its number from 1, its text, and the process that wrote it if a launcher's prefix names it."""

    number: int
    text: str
    stream: str = ""

    @cached_property
    def cells(self) -> list[str]:
        """The parts between blanks."""
        return self.text.split()


@dataclass(frozen=True)
class Log:
    """A file to import.

    Attributes:
        name: without its folder, which may hold private names.
        sha256: of its bytes.
        size: in bytes.
        text: decoded; bytes that are no text become replacement characters.
    """

    name: str
    sha256: str
    size: int
    text: str = field(repr=False)

    @classmethod
    def of(cls, name: str, content: bytes) -> "Log":
        """A log from its bytes."""
        wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")  # a redirect of PowerShell writes UTF-16
        text = content.decode("utf-16" if wide else "utf-8-sig", errors="replace")
        return cls(name, hashlib.sha256(content).hexdigest(), len(content), text)

    @classmethod
    def open(cls, path: Path) -> "Log":
        """Read `path`.

        Raises:
            UsageError: if it cannot be read, is no regular file, is compressed, or is larger than any log.
        """
        try:
            special = path.exists() and not path.is_file()
            content = b"" if special else _head(path, MOST_BYTES + 1)
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from None
        except ValueError as error:  # a null byte in its name
            raise UsageError(f"cannot read {str(path)!r}: {error}") from None
        if special:
            raise UsageError(f"{path} is no file; name the logs one by one")
        if len(content) > MOST_BYTES:
            raise UsageError(f"{path} is larger than {MOST_BYTES >> 30} GiB; cut out the part with the results")
        packed = next((kind for magic, kind in _PACKED.items() if content.startswith(magic)), None)
        if packed:
            raise UsageError(f"{path} is compressed ({packed}); unpack it first")
        return cls.of(_printable(os.fsencode(path.name).decode("utf-8", errors="replace")), content)

    @cached_property
    def lines(self) -> list[Line]:
        """The lines, without colours and without launchers' prefixes."""
        return [_line(number, text) for number, text in enumerate(self.text.split("\n"), 1)]


def _head(path: Path, most: int) -> bytes:
    with path.open("rb") as file:
        return file.read(most)


def _line(number: int, text: str) -> Line:
    text = text[:LONGEST_LINE].rstrip("\r")
    if "\x1b" in text:
        text = _COLOUR.sub("", text)
    text = _printable(text)  # control characters must not reach a report
    stream = ""
    for prefix in _PREFIXES:
        if match := prefix.match(text):
            text, stream = text[match.end() :], match.groupdict().get("stream") or stream
    return Line(number, text, stream)


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() or letter == "\t" else "\ufffd" for letter in text)


def begins_another(text: str) -> bool:
    """Whether the line begins the output of a known tool, which ends any open table."""
    return _BEGINS.match(text) is not None


class DamageError(Exception):
    """A line that must hold figures and does not. `number` counts from 1.

    `one_line` is false if the omission of a single line cannot repair the log.
    """

    def __init__(self, number: int, why: str, *, one_line: bool = True) -> None:
        """Name the line and the reason."""
        super().__init__(why)
        self.number, self.one_line = number, one_line


def is_cell(text: str) -> bool:
    """Whether `text` is a number, or a mark for a missing one."""
    return text in _NOTHING or _NUMBER.fullmatch(text) is not None


def number(text: str, what: str) -> float | None:
    """A figure that is not negative; None where the log has none.

    Raises:
        ValueError: if it is no such figure.
    """
    if text in _NOTHING:
        return None
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{what} is {text[:40]!r}, which is no number")
    value = float(text)
    if not 0 <= value < 1e30:
        raise ValueError(f"{what} is {text[:40]}, which cannot be")
    return value


def whole(text: str, what: str) -> int:
    """A whole number that is not negative.

    Raises:
        ValueError: if it is not.
    """
    if not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS):
        raise ValueError(f"{what} is {text[:40]!r}, which is no whole number")
    return int(text)
