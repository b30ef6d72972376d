#!/usr/bin/env python3
"""Fuzz every importer with atheris, guided by coverage, starting from the fixtures.

    pip install -e '.[fuzz]'
    python scripts/fuzz_importers.py -runs=100000            # libFuzzer's flags; a folder is a corpus to continue

It ends with the first input that an importer neither reads nor refuses in one line, and names the file with that input.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["ncclbench.importers"]):
    from ncclbench.config.plugins import load, names
    from ncclbench.errors import UsageError
    from ncclbench.importers.common import import_logs as _store
    from ncclbench.importers.common.imported_cases import Stated
    from ncclbench.importers.common.log_file import Log

    for _name in names("importers"):
        load("importers", _name)

_FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"


def one_input(content: bytes) -> None:
    """Read an input or refuse it; anything else is a failure."""
    for stated in (Stated(), Stated(pattern="all_reduce", world_size=2, skip_damaged=True)):
        try:
            _store.read_log(Log.of("log", content), stated)
        except UsageError as error:
            refusal = str(error)
            if "\n" in refusal:
                raise RuntimeError(f"a refusal of several lines: {refusal}") from error


def main() -> None:
    """Start from the fixtures, with the flags and folders of the command line."""
    with tempfile.TemporaryDirectory() as folder:
        for number, path in enumerate(sorted(_FIXTURES.glob("*/*"))):
            # Long inputs are slow and repeat the same lines.
            (Path(folder) / f"{number}{path.suffix}").write_bytes(path.read_bytes()[:6000])
        atheris.Setup([*sys.argv, "-max_len=8192", "-timeout=20", folder], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
