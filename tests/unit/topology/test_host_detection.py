"""Launcher detection: recorded environments of each launcher, incomplete ones, and independent jobs."""

from collections.abc import Mapping

import pytest

from ncclbench.errors import EnvironmentFault
from ncclbench.launch.launcher_detection import LOCAL_STORE, LOCAL_STORE_FD, detect

# As the launchers set them, without variables that launcher detection does not read.
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "ROLE_NAME": "default",
    "ROLE_RANK": "5",
    "ROLE_WORLD_SIZE": "8",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_MAX_RESTARTS": "0",
    "TORCHELASTIC_RUN_ID": "none",
    "OMP_NUM_THREADS": "1",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "OMPI_UNIVERSE_SIZE": "4",
    "PMIX_RANK": "3",
    "PMIX_NAMESPACE": "prterun-node-0-1234@1",
}
MPICH = {
    "PMI_RANK": "2",
    "PMI_SIZE": "4",
    "PMI_FD": "9",
    "MPI_LOCALRANKID": "0",
    "MPI_LOCALNRANKS": "2",
    "HYDI_CONTROL_FD": "7",
}
SLURM_BATCH = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "6",
    "SLURM_NPROCS": "6",
    "SLURM_TASKS_PER_NODE": "3(x2)",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
SLURM_STEP = {
    **SLURM_BATCH,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2)",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
FLUX = {
    "FLUX_JOB_ID": "ƒ2Y3",
    "FLUX_JOB_SIZE": "4",
    "FLUX_JOB_NNODES": "1",
    "FLUX_TASK_RANK": "2",
    "FLUX_TASK_LOCAL_ID": "2",
}
LOCAL = {
    "RANK": "0",
    "WORLD_SIZE": "3",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "3",
    LOCAL_STORE: "127.0.0.1:41234",
    LOCAL_STORE_FD: "5",
}
LAUNCHED = {
    "torchrun": TORCHRUN,
    "openmpi": OPENMPI,
    "mpich": MPICH,
    "slurm": SLURM_STEP,
    "flux": FLUX,
    "local": LOCAL,
}
# The required variables of each launcher.
REQUIRED = {
    "torchrun": ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"],
    "openmpi": [name for name in OPENMPI if name.startswith("OMPI_COMM_WORLD_") and "NODE" not in name],
    "mpich": ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"],
    "slurm": ["SLURM_PROCID", "SLURM_LOCALID"],
    "flux": ["FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID"],
    "local": ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"],
}
NUMBERS = {
    "torchrun": ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"],
    "openmpi": REQUIRED["openmpi"],
    "mpich": REQUIRED["mpich"],
    "slurm": ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE"],
    "flux": ["FLUX_JOB_SIZE", "FLUX_TASK_RANK", "FLUX_TASK_LOCAL_ID"],
    "local": ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", LOCAL_STORE_FD],
}


def identity_of(environ: Mapping[str, str]) -> tuple[str, int, int, int, int]:
    found = detect({"PATH": "/bin", **environ})
    assert found is not None
    return found.launcher, found.rank, found.world_size, found.local_rank, found.local_size


def refusal(environ: Mapping[str, str]) -> str:
    with pytest.raises(EnvironmentFault) as caught:
        detect(environ)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (TORCHRUN, ("torchrun", 5, 8, 1, 4)),
        (OPENMPI, ("openmpi", 3, 4, 1, 2)),
        (MPICH, ("mpich", 2, 4, 0, 2)),
        (SLURM_STEP, ("slurm", 4, 6, 1, 3)),
        (FLUX, ("flux", 2, 4, 2, 4)),
        (LOCAL, ("local", 0, 3, 0, 3)),
    ],
    ids=list(LAUNCHED),
)
def test_every_launcher_is_detected(environ: Mapping[str, str], expected: tuple[str, int, int, int, int]) -> None:
    assert identity_of(environ) == expected


def test_no_launcher_is_detected() -> None:
    assert detect({"PATH": "/bin", "HOME": "/home/user"}) is None


@pytest.mark.parametrize("environ", [SLURM_BATCH, {k: v for k, v in SLURM_BATCH.items() if k != "SLURM_PROCID"}])
def test_batch_script_is_not_a_rank(environ: Mapping[str, str]) -> None:
    assert detect(environ) is None


def test_local_ranks_use_the_parents_socket() -> None:
    found = detect(LOCAL)
    assert found is not None
    assert found.address == ("127.0.0.1", 41234)
    assert found.listen_fd == 5
    follower = detect({name: value for name, value in LOCAL.items() if name != LOCAL_STORE_FD} | {"RANK": "1"})
    assert follower is not None
    assert follower.listen_fd is None


def test_torchrun_needs_no_address() -> None:
    found = detect(TORCHRUN)
    assert found is not None
    assert found.address is None
    assert found.listen_fd is None


@pytest.mark.parametrize(
    ("tasks", "node", "local_id", "expected"),
    [
        ("2(x3),1", "0", "1", 2),
        ("2(x3),1", "2", "1", 2),
        ("2(x3),1", "3", "0", 1),
        ("4,3", "1", "2", 3),
        ("7", "0", "6", 7),
        ("", "0", "6", 7),
    ],
)
def test_slurm_task_list_gives_the_local_size(tasks: str, node: str, local_id: str, expected: int) -> None:
    environ = SLURM_STEP | {
        "SLURM_STEP_NUM_TASKS": "7",
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_NODEID": node,
        "SLURM_LOCALID": local_id,
    }
    assert identity_of(environ)[4] == expected


@pytest.mark.parametrize(
    ("launcher", "name"), [(launcher, name) for launcher in REQUIRED for name in REQUIRED[launcher]]
)
@pytest.mark.parametrize("how", ["unset", "empty"])
def test_incomplete_launcher_variables_are_named(launcher: str, name: str, how: str) -> None:
    environ = {key: value for key, value in LAUNCHED[launcher].items() if key != name}
    message = refusal(environ | ({name: ""} if how == "empty" else {}))
    there, _, missing = message.partition(" but not ")
    assert launcher in there
    assert name in missing
    assert name not in there.replace(",", " ").split()
    for other in REQUIRED[launcher]:
        if other != name:
            assert other in there


@pytest.mark.parametrize("environ", [{"RANK": "0"}, {"WORLD_SIZE": "4"}, {"RANK": "0", "WORLD_SIZE": "4"}])
def test_script_with_only_rank_and_world_size_is_refused(environ: Mapping[str, str]) -> None:
    message = refusal(environ)
    assert "MASTER_ADDR" in message
    assert "--nproc" in message  # what to do instead


@pytest.mark.parametrize(("launcher", "name"), [(launcher, name) for launcher in NUMBERS for name in NUMBERS[launcher]])
@pytest.mark.parametrize("value", ["four", "1.5"])
def test_invalid_number_is_named(launcher: str, name: str, value: str) -> None:
    message = refusal(LAUNCHED[launcher] | {name: value})
    assert name in message
    assert repr(value) in message


@pytest.mark.parametrize(
    "wrong",
    [
        {"RANK": "8"},
        {"RANK": "-1"},
        {"WORLD_SIZE": "0"},
        {"WORLD_SIZE": "5"},
        {"LOCAL_RANK": "4"},
        {"LOCAL_RANK": "-1"},
        {"LOCAL_WORLD_SIZE": "9"},
        {"LOCAL_WORLD_SIZE": "0"},
    ],
)
def test_contradictory_numbers_are_shown(wrong: Mapping[str, str]) -> None:
    message = refusal({**TORCHRUN, **wrong})
    assert "contradict" in message
    assert next(iter(wrong.values())) in message


ALONE = TORCHRUN | {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "1",
}
ONE_NODE = ALONE | {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}
TWO_TASKS = {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("inner", "outer", "number", "name"),
    [
        (ALONE, OPENMPI, 4, "openmpi"),
        (ALONE, MPICH, 4, "mpich"),
        (ALONE, SLURM_STEP, 6, "slurm"),
        (ALONE, FLUX, 4, "flux"),
        (ONE_NODE, SLURM_STEP | TWO_TASKS, 2, "slurm"),
        (ONE_NODE, OPENMPI | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, 2, "openmpi"),
    ],
    ids=["mpirun", "mpich", "srun", "flux", "srun-nnodes-1", "mpirun-nnodes-1"],
)
def test_independent_jobs_that_look_like_one_are_refused(
    inner: Mapping[str, str], outer: Mapping[str, str], number: int, name: str
) -> None:
    message = refusal({**outer, **inner})
    assert f"{name} started {number} processes" in message
    assert "independent jobs" in message
    assert "one launcher" in message


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        # srun or mpirun starts one torchrun agent on each of two nodes, and the agents make one job.
        ({**SLURM_STEP, **TWO_TASKS, **TORCHRUN}, ("torchrun", 5, 8, 1, 4)),
        ({**OPENMPI, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", **TORCHRUN}, ("torchrun", 5, 8, 1, 4)),
        # torchrun in a batch script, with no step around it.
        ({**SLURM_BATCH, **ONE_NODE}, ("torchrun", 2, 4, 2, 4)),
        # One step with one task, which runs torchrun.
        (
            {**SLURM_STEP, **TWO_TASKS, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", **ALONE},
            ("torchrun", 0, 1, 0, 1),
        ),
        # mpirun in an allocation starts its daemons through srun: one task per node, several ranks in each.
        ({**SLURM_STEP, **TWO_TASKS, **OPENMPI}, ("openmpi", 3, 4, 1, 2)),
        ({**SLURM_STEP, **TWO_TASKS, **MPICH}, ("mpich", 2, 4, 0, 2)),
        # Slurm and Flux provide PMI to their tasks, and also set its rank and size.
        ({**SLURM_STEP, "PMI_RANK": "4", "PMI_SIZE": "6", "PMI_FD": "8"}, ("slurm", 4, 6, 1, 3)),
        ({**FLUX, "PMI_RANK": "2", "PMI_SIZE": "4", "PMI_FD": "8"}, ("flux", 2, 4, 2, 4)),
    ],
    ids=[
        "srun-torchrun",
        "mpirun-torchrun",
        "batch-torchrun",
        "one-task",
        "srun-ompi",
        "srun-hydra",
        "pmi2",
        "flux-pmi",
    ],
)
def test_nested_launchers_are_accepted(environ: Mapping[str, str], expected: tuple[str, int, int, int, int]) -> None:
    assert identity_of(environ) == expected


def test_local_ranks_inside_a_slurm_step_of_one() -> None:
    assert identity_of({**SLURM_STEP, "SLURM_STEP_NUM_TASKS": "1", **LOCAL}) == ("local", 0, 3, 0, 3)


def test_invalid_group_size_is_named() -> None:
    message = refusal({**OPENMPI, **TORCHRUN, "GROUP_WORLD_SIZE": "two"})
    assert "GROUP_WORLD_SIZE" in message
