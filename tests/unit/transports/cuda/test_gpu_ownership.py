"""The GPU of each rank: one rank per GPU, unless sharing is allowed."""

import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from ncclbench.errors import EnvironmentFault
from ncclbench.transports.base import RankIdentity
from ncclbench.transports.cuda.gpu_ownership import choose_gpu, cupy_gpus, ranks_per_gpu, refuse_shared
from ncclbench.transports.threads import ThreadTransport, play


def identity_of(rank: int, size: int) -> RankIdentity:
    return RankIdentity(rank=rank, world_size=size, local_rank=rank, local_size=size, launcher="torchrun")


def test_each_rank_has_the_gpu_of_its_place() -> None:
    environ: dict[str, str] = {}
    assert [choose_gpu(identity_of(rank, 4), 4, environ) for rank in range(4)] == [0, 1, 2, 3]
    assert not environ


@pytest.mark.parametrize("environ", [{}, {"NCCLBENCH_SHARE_GPU": "0"}, {"NCCLBENCH_SHARE_GPU": ""}])
def test_more_ranks_than_gpus_are_refused(environ: dict[str, str]) -> None:
    with pytest.raises(EnvironmentFault, match="--nproc 2"):
        choose_gpu(identity_of(2, 3), 2, environ)


def test_a_gpu_shown_alone_is_honoured() -> None:
    assert choose_gpu(identity_of(3, 4), 1, {"CUDA_VISIBLE_DEVICES": "3"}) == 0


def test_ranks_sharing_a_gpu_get_different_nccl_host_ids() -> None:
    chosen = []
    for rank in range(5):
        environ = {"NCCLBENCH_SHARE_GPU": "1"}
        chosen.append((choose_gpu(identity_of(rank, 5), 2, environ), environ["NCCL_HOSTID"].rsplit("-", 1)[1]))
    assert chosen == [(0, "0"), (1, "0"), (0, "1"), (1, "1"), (0, "2")]  # no GPU twice on one "host"


def test_a_host_id_of_the_users_own_is_left() -> None:
    environ = {"NCCLBENCH_SHARE_GPU": "1", "NCCL_HOSTID": "mine"}
    choose_gpu(identity_of(1, 2), 1, environ)
    assert environ["NCCL_HOSTID"] == "mine"


def shared(ids: str, environ: dict[str, str]) -> list[int]:
    def main(transport: ThreadTransport) -> int:
        return ranks_per_gpu(transport.control, ids[transport.rank], environ)

    return play(len(ids), main, 20.0)


def test_two_ranks_on_one_gpu_are_named() -> None:
    with pytest.raises(EnvironmentFault, match=r"ranks 1 and 3 are on the same GPU.*NCCLBENCH_SHARE_GPU"):
        shared("abcb", {})


@pytest.mark.parametrize(("ids", "most"), [("abcd", 1), ("abab", 2), ("abbb", 3)])
def test_how_many_share_is_counted(ids: str, most: int) -> None:
    assert shared(ids, {"NCCLBENCH_SHARE_GPU": "1"}) == [most] * 4


@pytest.mark.parametrize(
    ("ids", "environ", "said"),
    [
        ("abcd", {}, None),
        ("abcb", {}, "ranks 1 and 3 are on the same GPU"),
        ("aaaa", {}, "are on the same GPU"),
        ("abcb", {"NCCLBENCH_SHARE_GPU": "1"}, None),
    ],
)
def test_two_ranks_on_one_gpu_are_named_before_nccl_starts(ids: str, environ: dict[str, str], said: str | None) -> None:
    dist = pytest.importorskip("torch.distributed")
    common = dist.PrefixStore("gpus", dist.HashStore())

    def one(rank: int) -> str | None:
        try:
            refuse_shared(common, rank, len(ids), ids[rank], environ)
        except EnvironmentFault as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(ids)) as pool:
        heard = [*pool.map(one, range(len(ids)))]
    assert len({*heard}) == 1  # all end, and for the same reason
    assert (heard[0] is None) if said is None else (said in str(heard[0]))


def test_ranks_that_do_not_come_are_counted() -> None:
    dist = pytest.importorskip("torch.distributed")
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=0.2))
    board = dist.PrefixStore("gpus", store)

    def one(rank: int) -> str:
        with pytest.raises(EnvironmentFault) as caught:
            refuse_shared(board, rank, 4, "abcd"[rank], {})
        return str(caught.value)

    with ThreadPoolExecutor(3) as pool:
        heard = [*pool.map(one, range(3))]
    assert all(text.startswith("only 3 of 4 ranks have met") and "\n" not in text for text in heard)


def cupy_that_says(count: Any, driver: Any) -> Any:
    """CuPy as far as it is asked here: each answer is a number, or an error that is raised."""

    def telling(answer: Any) -> Any:
        def tell() -> int:
            if isinstance(answer, Exception):
                raise answer
            return int(answer)

        return tell

    runtime = SimpleNamespace(getDeviceCount=telling(count), driverGetVersion=telling(driver))
    return SimpleNamespace(__version__="14.2.0", cuda=SimpleNamespace(runtime=runtime))


def test_gpus_are_those_that_cupy_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", cupy_that_says(4, 13000))
    assert cupy_gpus("--transport gloo") == 4


@pytest.mark.parametrize(
    ("count", "driver", "said"),
    [
        (
            RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient\nmore"),
            12040,
            "CuPy 14.2.0 cannot be used here, where the driver is for CUDA 12: pip install cupy-cuda12x, or use "
            "--device cpu (cudaErrorInsufficientDriver: CUDA driver version is insufficient)",
        ),
        (RuntimeError("no CUDA-capable device"), 0, "no NVIDIA driver is loaded: use --device cpu (no CUDA-capable"),
        (
            OSError("libcudart.so.13"),
            RuntimeError("no driver"),
            "no NVIDIA driver is loaded: use --device cpu (libcudart",
        ),
    ],
)
def test_wrong_cupy_error_names_the_wheel_to_install(
    count: Exception, driver: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", cupy_that_says(count, driver))
    with pytest.raises(EnvironmentFault) as caught:
        cupy_gpus("--device cpu")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_cupy_its_wheels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(
        EnvironmentFault, match=r"pip install cupy-cuda13x \(or cupy-cuda12x\), or use --transport gloo"
    ):
        cupy_gpus("--transport gloo")
