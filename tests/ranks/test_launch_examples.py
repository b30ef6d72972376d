"""The examples in scripts/launch are run, or held against what their readers require."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ncclbench.launch.launcher_detection import detect
from ncclbench.topology.slurm import expand_nodes
from tests.helpers.paths import SCRIPTS

LAUNCH = SCRIPTS / "launch"
CASE = ("all_reduce", "-b", "1K", "-e", "1K", "-n", "10", "--json")

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(180)]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**os.environ, "PATH": path, **root, **more}


def start(script: str, *arguments: str, **variables: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [str(LAUNCH / script), *arguments],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(job: "subprocess.Popen[str]") -> tuple[int, str, str]:
    try:
        out, err = job.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        job.kill()
        raise
    return job.returncode, out, err


def summary(out: str) -> dict[str, Any]:
    found = json.loads(next(line for line in out.splitlines() if line.startswith('{"run"')))
    assert isinstance(found, dict)
    return found


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])


def test_torchrun_on_one_node(tmp_path: Path) -> None:
    code, out, err = finish(
        start("torchrun-1-node", *CASE, "--transport", "gloo", "-o", str(tmp_path / "r"), RANKS="2")
    )
    assert code == 0, err
    (record,) = summary(out)["records"]
    assert (record["status"], record["world_size"]) == ("ok", 2)


def test_torchrun_on_two_nodes(tmp_path: Path) -> None:
    port = free_port()
    jobs = [
        start(
            *("torchrun-2-nodes", *CASE, "--transport", "gloo", "-o", str(tmp_path / "r")),
            **{"HEAD": "127.0.0.1", "PORT": port, "NODE_RANK": str(node), "RANKS": "2"},
        )
        for node in range(2)
    ]
    ended = [finish(job) for job in jobs]
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2]
    (record,) = summary(ended[0][1])["records"]
    assert (record["status"], record["world_size"]) == ("ok", 4)
    assert ended[1][1] == "", "only rank 0 prints"


def test_torchrun_on_two_nodes_asks_for_what_it_needs() -> None:
    code, _, err = finish(start("torchrun-2-nodes", *CASE, HEAD="node0"))
    assert code != 0
    assert "NODE_RANK" in err


@pytest.mark.parametrize("transport", ["mpi", "gloo"])
def test_mpirun_with_a_host_file(transport: str, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    code, out, err = finish(
        start(
            *("mpirun-hostfile", *CASE, "--transport", transport, "-o", str(tmp_path / "r")),
            **{"HOSTFILE": str(hosts), "RANKS": "2"},
        )
    )
    assert code == 0, err
    (record,) = summary(out)["records"]
    assert (record["status"], record["world_size"], record["transport"]) == ("ok", 2, transport)


# What srun 23.11 sets in the first task of the second node of `slurm.sbatch`.
STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_PROCID": "8",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
}


def test_slurm_script_requests_what_its_ranks_find() -> None:
    script = (LAUNCH / "slurm.sbatch").read_text()
    directives = dict(
        line.removeprefix("#SBATCH --").split("=", 1)
        for line in script.splitlines()
        if "#SBATCH --" in line and "=" in line
    )
    identity = detect(STEP)
    assert identity is not None
    assert (identity.launcher, identity.rank, identity.world_size) == ("slurm", 8, 16)
    assert identity.local_size == int(directives["ntasks-per-node"]) == int(directives["gpus-per-node"])
    assert len(expand_nodes(STEP["SLURM_STEP_NODELIST"])) == int(directives["nodes"])
    subprocess.run(["bash", "-n", str(LAUNCH / "slurm.sbatch")], check=True)


def test_the_slurm_script_runs_what_srun_would_start(tmp_path: Path) -> None:
    # An srun that starts one task, with the variables of a step of one.
    srun = tmp_path / "srun"
    one = {
        **STEP,
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_NODEID": "0",
        "SLURM_STEP_NODELIST": "gpu007",
    }
    one["SLURM_STEP_TASKS_PER_NODE"] = "1"
    exports = "\n".join(f"export {name}='{value}'" for name, value in one.items())
    srun.write_text(f'#!/usr/bin/env bash\n{exports}\nshift\nexec "$@"\n')
    srun.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), environment()["PATH"]])
    job = start(
        *("slurm.sbatch", *CASE, "--transport", "gloo"),
        **{"PATH": path, "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "4711"},
    )
    code, out, err = finish(job)
    assert code == 0, err
    assert summary(out)["run"] == str(tmp_path / "runs/4711")


def containers(template: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = template["spec"]["containers"]
    return found


def test_the_mpijob_has_what_the_mpi_operator_requires() -> None:
    job = yaml.safe_load((LAUNCH / "mpijob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    replicas = job["spec"]["mpiReplicaSpecs"]
    assert set(replicas) == {"Launcher", "Worker"}
    (launcher,) = containers(replicas["Launcher"]["template"])
    ranks = int(launcher["command"][launcher["command"].index("-n") + 1])
    assert ranks == job["spec"]["slotsPerWorker"] * replicas["Worker"]["replicas"]
    for replica in replicas.values():
        assert replica["replicas"] >= 1
        for container in containers(replica["template"]):
            assert container["name"]
            assert container["image"]


def test_the_pytorchjob_has_what_the_training_operator_requires() -> None:
    job = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["replicas"] == 1
    for replica in replicas.values():
        # The operator looks for a container of this very name.
        (container,) = containers(replica["template"])
        assert container["name"] == "pytorch"
        assert int(job["spec"]["nprocPerNode"]) == container["resources"]["limits"]["nvidia.com/gpu"]


@pytest.mark.parametrize("name", ["mpijob.yaml", "pytorchjob.yaml"])
def test_every_volume_that_is_mounted_is_there(name: str) -> None:
    spec = yaml.safe_load((LAUNCH / name).read_text())["spec"]
    replicas = spec.get("mpiReplicaSpecs") or spec["pytorchReplicaSpecs"]
    for replica in replicas.values():
        pod = replica["template"]["spec"]
        mounted = {mount["name"] for container in pod["containers"] for mount in container.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
