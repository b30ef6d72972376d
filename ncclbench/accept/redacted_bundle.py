"""The redacted bundle: the run and its verdict, with hashes for host names, addresses and serials."""

import os
from pathlib import Path

import msgspec

from ncclbench.accept.bundle import StoredBaseline, write_bundle
from ncclbench.accept.check_context import CheckContext
from ncclbench.accept.profile import parse_profile
from ncclbench.accept.redact import KEY, redact, redact_profile, redactor_for
from ncclbench.store.run_directory import read_run


def write_redacted_bundle(subject: CheckContext) -> Path:
    """Write a redacted bundle of `subject` into ``RUN-redacted``; returns its path.

    Raises:
        NcclbenchError: if it cannot be written.
    """
    path, baseline = subject.run.path, subject.baseline
    target = path.with_name(path.name + "-redacted")
    redactor = redactor_for([path, *([baseline.path] if baseline else [])], os.environ.get(KEY, ""))
    redact(path, target, redactor)
    rules = parse_profile(redact_profile(subject.rules.text, redactor), subject.rules.profile.name)
    if baseline is not None:
        stored = StoredBaseline(name=baseline.path.name, manifest=baseline.manifest, records=list(baseline.records))
        plain = redactor.data(msgspec.to_builtins(stored))
        baseline = msgspec.convert(plain, StoredBaseline).as_run()
    write_bundle(CheckContext(read_run(target), rules, baseline, subject.forced))
    return target
