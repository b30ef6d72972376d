"""Control messages over connections of their own: ranks are threads, the sockets real."""

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from ncclbench.errors import EnvironmentFault
from ncclbench.transports._tcp_control import StarControl


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def played(size: int, main: Callable[[StarControl], Any]) -> list[Any]:
    port = free_port()

    def one(rank: int) -> Any:
        star = StarControl(rank, size, ("127.0.0.1", port), 30.0)
        try:
            return main(star)
        finally:
            star.close()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_rank_gets_what_it_has_to(size: int) -> None:
    def main(star: StarControl) -> tuple[Any, Any, Any]:
        mine = np.array([[star.rank, 7], [1, 2]], np.int64)
        star.barrier()
        told = star.broadcast(np.full(3, float(star.rank)))
        told[0] += 1  # a caller may write into it
        return star.gather(mine), star.all_gather(mine), told

    for rank, (gathered, everyone, told) in enumerate(played(size, main)):
        assert gathered is None if rank else np.array_equal(gathered, everyone)
        assert everyone.shape == (size, 2, 2)
        assert everyone[:, 0, 0].tolist() == list(range(size))
        assert told.tolist() == [1.0, 0.0, 0.0], "rank 0's"


def test_large_messages_arrive_whole() -> None:
    everyone = played(3, lambda star: star.all_gather(np.full(1 << 20, star.rank, np.uint8)))
    assert all(np.array_equal(one.sum(axis=1), np.arange(3) * (1 << 20)) for one in everyone)


def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(EnvironmentFault, match=r"rank 0 did not meet rank 1, 2 at 127\.0\.0\.1:"):
        StarControl(0, 3, ("127.0.0.1", free_port()), 0.2)
    with pytest.raises(EnvironmentFault, match=r"rank 2 did not meet rank 0 at .*MASTER_ADDR"):
        StarControl(2, 3, ("127.0.0.1", free_port()), 0.2)


def test_a_rank_of_another_job_is_refused() -> None:
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        host = pool.submit(StarControl, 0, 2, ("127.0.0.1", port), 20.0)
        pool.submit(StarControl, 1, 3, ("127.0.0.1", port), 20.0).result().close()
        with pytest.raises(EnvironmentFault, match="rank 1 of 3 connected to a job of 2"):
            host.result()
