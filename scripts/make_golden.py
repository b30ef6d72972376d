#!/usr/bin/env python3
"""Make the stored runs of tests/golden/runs, with the code of an earlier commit.

The runs in the repository were made by the code of commit 811056b, before its packages were redesigned, and stay as
they are: they show that later code reads what earlier code has written. Do not make them again with later code. To add
one, let this script use a checkout of that commit, and copy the new directory:

    git worktree add ../before 811056b
    python scripts/make_golden.py OUT ../before     # Linux, root (for a neutral host name), torch, mpi4py and an MPI

What that commit's commands say of them is in tests/golden/expected; ``NCCLBENCH_UPDATE_GOLDEN=1 pytest
tests/unit/test_golden.py`` writes that again.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

if len(sys.argv) != 3:
    sys.exit("usage: make_golden.py OUT CHECKOUT")
CODE = Path(sys.argv[2]).resolve()
PATHS = [str(CODE), str(CODE / "patterns"), str(CODE / "reports")]
sys.path[:0] = PATHS

TESTS = Path(__file__).resolve().parent.parent / "tests"
PLANS = TESTS / "golden" / "plans"
FIXTURES = TESTS / "fixtures"
HOST = "golden"
SHORT = ["-n", "12", "-w", "1"]


def main() -> None:
    """Make all runs in OUT, which must not exist."""
    out = Path(sys.argv[1]).absolute()
    if socket.gethostname() != HOST:
        renamed = ["unshare", "--uts", "sh", "-c", f'hostname {HOST} && exec "$@"', "sh"]
        os.execvp("unshare", [*renamed, sys.executable, __file__, str(out), str(CODE)])
    out.mkdir(parents=True)
    os.chdir(out)
    # The plans and logs are copied for the time being, so that no path of this machine gets into a manifest.
    shutil.copytree(PLANS, "plans")
    shutil.copytree(FIXTURES, "logs")
    for make in (measured, made, imported, damaged, bundles):
        make()
    shutil.rmtree("plans")
    shutil.rmtree("logs")
    for lock in out.rglob(".lock"):
        lock.unlink()


def ncclbench(*arguments: str, ends: tuple[int, ...] = (0,), **variables: str) -> None:
    """Run the command line of that checkout."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS), **variables}
    done = subprocess.run([sys.executable, "-m", "ncclbench", *arguments], env=environ, stdout=subprocess.DEVNULL)
    if done.returncode not in ends:
        sys.exit(f"ncclbench {' '.join(arguments)} ended in {done.returncode}")


def measured() -> None:
    """Runs by threads, gloo and MPI."""
    sizes = ["-b", "1K", "-e", "4K", "-f", "4"]
    several = ["all_reduce", "all_to_all", "cross_rail", "--dtype", "float32", "--dtype", "bfloat16", "--timing", "all"]
    ncclbench("run", *several, *sizes, *SHORT, "--transport", "threads", "--nproc", "2", "-o", "threads")
    ncclbench("run", "--plan", "plans/gloo.toml", "--transport", "gloo", "--nproc", "4", "-o", "gloo")
    ncclbench("run", "--plan", "plans/mpi.toml", "--transport", "mpi", "--nproc", "2", "-o", "mpi")
    rails = ["--plan", "plans/rails.toml", "--topology", "plans/cluster.toml", "--transport", "threads", "--nproc", "8"]
    ncclbench("run", *rails, "-o", "rails")
    ncclbench("run", "--plan", "plans/starts.toml", "--transport", "gloo", "--nproc", "2", "-o", "starts")
    modes = ["--plan", "plans/modes.toml", "--topology", "plans/pair.toml", "--transport", "gloo", "--nproc", "4"]
    ncclbench("run", *modes, "-o", "modes")
    for side in ("before", "after"):
        for start in "123":
            case = ["all_reduce", "send_recv", *sizes, *SHORT, "--transport", "threads", "--nproc", "2"]
            ncclbench("run", *case, "-o", f"{side}/{start}")
    lost()


def lost() -> None:
    """A run one of whose two ranks is killed in the second case."""
    command = [sys.executable, "-m", "ncclbench", "run", "--plan", "plans/lost.toml"]
    command += ["--transport", "gloo", "--nproc", "2", "-o", "lost"]
    job = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(PATHS)}, stdout=subprocess.DEVNULL)
    events = Path("lost/events.jsonl")
    while not events.exists() or events.read_text().count('"kind":"case"') < 2:
        time.sleep(0.05)
    time.sleep(0.5)
    start = json.loads(events.read_text().splitlines()[0])
    os.kill(start["pids"][1], signal.SIGKILL)
    if job.wait(120) != 3:
        sys.exit(f"the run that loses a rank ended in {job.returncode}")


def made() -> None:
    """Runs that nothing measured: reports at their richest, and a cluster of GPUs."""
    from ncclbench.accept.example import write_example
    from tests.made_runs import rich_run, small_run

    small_run(Path("small"))
    small_run(Path("small-slower"), scale=1.2)
    rich_run(Path("rich"))
    healthy = _cluster()
    write_example(Path("gpus"), healthy)
    write_example(Path("gpus-later"), replace(healthy, seed=1))
    slow = replace(healthy.cases[0], slow={2: 1.6})
    flows = replace(healthy.cases[1], slow={5: 2.0})
    wrong = replace(healthy.cases[2], wrong=7)
    sick = replace(healthy, cases=(slow, flows, wrong, *healthy.cases[3:]), seed=2, edit=_sick, software=_software())
    write_example(Path("gpus-sick"), sick)
    write_example(Path("gpus-short"), replace(healthy, made=1, seed=3, links=("NET/Socket",), nvls="unknown"))
    write_example(Path("gpus-faults"), replace(healthy, starts=1, seed=4, edit=_faulty()))


def _cluster() -> Any:
    from ncclbench.accept.example import Example, ExampleCase

    gib = 1 << 30
    node = ExampleCase(pattern="all_reduce", nbytes=8 * gib, bus_gb_per_s=478, group="node", samples=24)
    flows = ExampleCase(pattern="same_rail", nbytes=gib, bus_gb_per_s=48, flows=True, samples=12)
    world = ExampleCase(pattern="all_reduce", nbytes=8 * gib, bus_gb_per_s=386.6, samples=24)
    rail = ExampleCase(pattern="send_recv", nbytes=gib, bus_gb_per_s=48, group="rail", samples=24)
    return Example(cases=(node, flows, world, rail), nodes=4, ranks_per_node=4)


def _software() -> dict[int, dict[str, Any]]:
    return {5: {"versions": {"nccl": "2.27.3"}, "variables": {"NCCL_IB_GID_INDEX": "0"}}}


def _sick(record: Any) -> Any:
    """Every kind of warning that a GPU can have."""
    from ncclbench.accept.example import with_warning

    warnings = {
        3: "ECC uncorrected errors rose by 2",
        6: "throttled: hw thermal slowdown",
        9: "NVLink 3: CRC errors rose by 5",
    }
    for rank, warning in warnings.items():
        record = with_warning(record, rank, warning)
    return record


def _faulty() -> Callable[[Any], Any]:
    """One case of each: timed out, failed, skipped, with path proof contradicted and drift."""
    import msgspec

    untimed = {"time_us": None, "skew_us": None, "alg_gb_per_s": None, "bus_gb_per_s": None, "groups": []}
    untimed |= {"phases": [], "wrong": None}
    changes: list[dict[str, Any]] = [
        {**untimed, "status": "timeout", "reason": "rank 3 on n0000 has not finished launch 7", "ranks": [3]},
        {**untimed, "status": "failed", "reason": "rank 5 on n0001: NCCL error: remote process exited", "ranks": [5]},
        {"path": _contradicted()},
        {**untimed, "status": "skipped", "reason": "needs 64 GiB on every GPU"},
    ]
    turn = iter(changes)
    return lambda record: msgspec.structs.replace(record, **next(turn))


def _contradicted() -> dict[str, Any]:
    rails = [
        {"rail": rail, "expected_sent": 1000, "sent": 1010, "expected_received": 1000, "received": received}
        for rail, received in enumerate((1005, 12, None, 998))
    ]
    off = {"rank": 5, "node": "n0001", "rail": 1, "device": "mlx5_1", "direction": "received"}
    off |= {"expected_bytes": 250, "counted_bytes": 3, "other_ports": {"mlx5_9": 240}}
    moved = [{"rank": 5, "port": "mlx5_1", "counter": "symbol_error", "by": 12}]
    counters = {"rails": rails, "off": [off], "moved": moved}
    log = {"version": "2.28.9", "network": "IB", "links": ["NET/IB"], "gdr": False, "channels": 8, "warnings": ["x"]}
    return {"proof": "contradicted", "reason": "rail 1 of n0001 carried 1% of its bytes", "counters": counters, **log}


def imported() -> None:
    """Logs of other tools."""
    nccl_tests = [f"logs/nccl-tests/{name}" for name in ("all_reduce.txt", "all_reduce_graph.txt", "alltoall.txt")]
    ncclbench("import", *nccl_tests, "-o", "imported-nccl-tests")
    ncclbench("import", "logs/nccl-tests/all_reduce_per_iteration.json", "-o", "imported-json")
    ncclbench("import", "logs/nccl-tests/all_reduce_per_iteration.txt", "-o", "imported-per-iteration")
    osu = ["osu_allreduce_full.txt", "osu_alltoall_checked.txt", "osu_iallreduce_full.txt", "osu_allreduce_tail.txt"]
    ncclbench("import", *[f"logs/osu/{name}" for name in osu], "--world-size", "4", "-o", "imported-osu")
    ncclbench("import", "logs/osu/osu_latency.txt", "logs/osu/osu_bw.txt", "-o", "imported-osu-pairs")
    ncclbench("import", "logs/imb/imb_2018.txt", "logs/imb/imb_multi.txt", "-o", "imported-imb")


def damaged() -> None:
    """A run that was cut off in the middle of a line, and one with fields that no version knows."""
    shutil.copytree("starts", "cut-off")
    for name, keep in (("results.jsonl", 5), ("events.jsonl", 12)):
        file = Path("cut-off") / name
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(lines[:keep]) + lines[keep][: len(lines[keep]) // 2])
    shutil.copytree("rich", "unknown-fields")
    manifest = json.loads(Path("unknown-fields/manifest.json").read_text())
    manifest |= {"later": {"x": [1]}}
    manifest["topology"]["later"] = 1
    manifest["provenance"]["later"] = [None]
    Path("unknown-fields/manifest.json").write_text(json.dumps(manifest, indent=2))
    results = Path("unknown-fields/results.jsonl")
    records = [json.loads(line) | {"later": {"y": 2.5}} for line in results.read_text().splitlines()]
    for record in records:
        for phase in record["phases"]:
            phase["later"] = "z"
    results.write_text("".join(json.dumps(record) + "\n" for record in records))


def bundles() -> None:
    """Accepted runs: good, bad, inconclusive, with a baseline, redacted, and one that was measured."""
    lab = ["--profile", "plans/small.toml"]
    for name in ("small", "gpus", "starts"):  # these are wanted without a verdict as well
        shutil.copytree(name, f"accepted-{name}")
    for name in ("gpus-later", "gpus-sick", "gpus-short", "gpus-faults"):
        Path(name).rename(f"accepted-{name}")
    key = {"NCCLBENCH_REDACT_KEY": "golden"}
    h100 = ["--profile", "h100-hgx-ib"]
    any_end = (0, 1, 3, 4, 5)
    ncclbench("accept", "accepted-gpus", *h100, ends=any_end)
    ncclbench("accept", "accepted-gpus-later", *h100, "--baseline", "gpus", "--redact", ends=any_end, **key)
    ncclbench("accept", "accepted-gpus-sick", *h100, "--baseline", "gpus", ends=any_end)
    ncclbench("accept", "accepted-gpus-short", *h100, ends=any_end)
    ncclbench("accept", "accepted-gpus-faults", *h100, "--baseline", "gpus", "--force", ends=any_end)
    ncclbench("accept", "accepted-small", *lab, "--baseline", "small-slower", ends=any_end)
    ncclbench("accept", "accepted-starts", *lab, ends=any_end)
    shutil.copytree("accepted-starts", "changed")  # verify must find both changes
    results = Path("changed/results.jsonl")
    results.write_text(results.read_text().replace('"status":"ok"', '"status":"wrong"', 1))
    next(Path("changed/samples").iterdir()).unlink()


if __name__ == "__main__":
    main()
