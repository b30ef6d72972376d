"""Which element types NCCL adds."""

import numpy as np
import pytest

from ncclbench.errors import Unable
from ncclbench.schedule import DTYPES, Collective, Op
from ncclbench.transports.cuda.nccl_limits import adds_float8, refuse_float8

WORLD = np.arange(2)[None]


@pytest.mark.parametrize(
    ("op", "dtype", "adds"),
    [
        (Op.ALL_REDUCE, "float8_e4m3fn", True),
        (Op.REDUCE_SCATTER, "float8_e5m2", True),
        (Op.ALL_GATHER, "float8_e5m2", False),  # what is only moved travels as bytes
        (Op.ALL_REDUCE, "int8", False),
        (Op.ALL_REDUCE, "bfloat16", False),
    ],
)
def test_which_phases_add_floats_of_8_bits(op: Op, dtype: str, adds: bool) -> None:
    assert adds_float8(Collective("x", op, WORLD, 2), DTYPES[dtype]) is adds


@pytest.mark.parametrize(
    ("nccl", "capability", "reason"),
    [(22400, 90, None), (22809, 100, None), (22304, 90, "from 2.24 on"), (22809, 89, "compute capability 9.0")],
)
def test_float8_reductions_need_nccl_and_gpu_support(nccl: int, capability: int, reason: str | None) -> None:
    if reason is None:
        refuse_float8(DTYPES["float8_e4m3fn"], nccl, capability)
        return
    with pytest.raises(Unable, match=f"float8_e4m3fn .*{reason}"):
        refuse_float8(DTYPES["float8_e4m3fn"], nccl, capability)
