"""NCCL's log, from lines as NCCL 2.28 writes them."""

from pathlib import Path

import pytest

from ncclbench.store.records import PathRecord
from ncclbench.transports.cuda.nccl_log import NcclLog, parse_nccl_log
from tests.helpers.stored import known

P2P = """node0:1612:1612 [0] NCCL INFO NCCL version 2.28.9+cuda13.0
node0:1612:1640 [0] NCCL INFO NET/IB : No device found.
node0:1612:1640 [0] NCCL INFO Using network Socket
node0:1612:1640 [0] NCCL INFO NVLS multicast support is not available on dev 0 (NVLS_NCHANNELS 0)
node0:1612:1640 [0] NCCL INFO 24 coll channels, 24 collnet channels, 0 nvls channels, 32 p2p channels
node0:1612:1655 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM
"""
IB = """node0:9:9 [0] NCCL INFO Using network IB
node0:9:9 [0] NCCL INFO Channel 00/0 : 0[0] -> 8[0] [send] via NET/IB/0/GDRDMA
node0:9:9 [0] NCCL INFO Channel 01/0 : 8[0] -> 0[0] [receive] via NET/IB/0
node0:9:9 [0] NCCL INFO Channel 02/0 : 1[1] -> 0[0] via SHM/direct/direct
node0:9:9 [0] NCCL WARN NET/IB : Got completion from peer with status=12
node0:9:9 [0] NCCL INFO AllReduce: 1048576 Bytes -> Algo RING proto LL128 channel{Lo..Hi}={0..15}
"""


def test_one_host_talks_over_nvlink() -> None:
    found = parse_nccl_log(P2P.splitlines())
    assert found == PathRecord(
        version="2.28.9", network="Socket", nvls=False, nvls_switched_off=False, channels=24, links=["P2P/CUMEM"]
    )


ASKED = "node0:9:9 [0] NCCL INFO NCCL_NVLS_ENABLE set by environment to {}."
THERE = "node0:9:9 [0] NCCL INFO NVLS multicast support is available on dev 0 (NVLS_NCHANNELS 16)"
NOT_THERE = "node0:9:9 [0] NCCL INFO NVLS multicast support is not available on dev 0 (NVLS_NCHANNELS 0)"


@pytest.mark.parametrize(
    ("lines", "there", "switched_off"),
    [
        ([THERE], True, False),
        ([ASKED.format(1), THERE], True, False),
        ([ASKED.format(1), NOT_THERE], False, False),
        ([ASKED.format(0)], False, True),
        ([ASKED.format(0), NOT_THERE], False, True),
        ([NOT_THERE, ASKED.format(0)], False, True),
    ],
)
def test_missing_nvls_differs_from_disabled_nvls(lines: list[str], there: bool, switched_off: bool) -> None:
    assert parse_nccl_log(lines) == PathRecord(nvls=there, nvls_switched_off=switched_off)


def test_two_hosts_talk_over_infiniband_with_gpudirect() -> None:
    found = known(parse_nccl_log(IB.splitlines()))
    assert found.links == ["NET/IB", "SHM/direct"]
    assert found.gdr is True
    assert found.calls == ["AllReduce RING/LL128"]
    assert found.warnings == ["NET/IB : Got completion from peer with status=12"]


def test_sockets_without_gpudirect_are_seen() -> None:
    found = parse_nccl_log(["x NCCL INFO Channel 00/0 : 0[0] -> 1[1] [send] via NET/Socket/0"])
    assert found == PathRecord(links=["NET/Socket"], gdr=False, pxn=False)


def test_send_through_another_nic_is_pxn() -> None:
    found = parse_nccl_log(["x NCCL INFO Channel 00/1 : 0[0] -> 9[1] [send] via NET/IB/1(1)/GDRDMA"])
    assert known(found).pxn is True
    received = parse_nccl_log(["x NCCL INFO Channel 00/1 : 9[1] -> 0[0] [receive] via NET/IB/1/GDRDMA"])
    assert known(received).pxn is None


def test_log_without_nccl_lines_gives_none() -> None:
    assert parse_nccl_log(["", "noise", "via carrier pigeon"]) is None


def test_the_log_is_switched_on_for_this_process_and_removed() -> None:
    environ: dict[str, str] = {}
    log = NcclLog.switch_on(environ)
    assert environ["NCCL_DEBUG"] == "INFO"
    assert "COLL" not in environ["NCCL_DEBUG_SUBSYS"].split(",")
    path = Path(environ["NCCL_DEBUG_FILE"])
    assert log.read() is None
    path.write_text(P2P)
    assert known(log.read()).version == "2.28.9"
    log.remove()
    assert not path.exists()


def test_user_variables_keep_their_values(tmp_path: Path) -> None:
    own = tmp_path / "mine.log"
    own.write_text(IB)
    environ = {"NCCL_DEBUG_FILE": str(own), "NCCL_DEBUG": "TRACE"}
    log = NcclLog.switch_on(environ)
    assert environ == {"NCCL_DEBUG_FILE": str(own), "NCCL_DEBUG": "TRACE"}
    log.remove()
    assert own.exists()
