"""Formats of the rows of MoE dispatch: size and decoding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncclbench.schedule.row_formats import FORMATS, bf16_to_float, float_to_bf16


@pytest.mark.parametrize(("name", "nbytes"), [("bf16", 14336), ("fp8", 7392), ("mxfp8", 7392), ("nvfp4", 4032)])
def test_row_bytes_match_the_reference(name: str, nbytes: int) -> None:
    assert FORMATS[name].row_bytes(7168) == nbytes


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("hidden", [16, 176, 256])
def test_rows_decode_to_their_values(name: str, hidden: int) -> None:
    form, rng = FORMATS[name], np.random.default_rng(0)
    codes = rng.integers(0, 5, (7, hidden), dtype=np.uint8)
    exponents = rng.integers(0, 2, (7, form.blocks(hidden)), dtype=np.uint8)
    payload, scales = form.encode(codes, exponents)
    assert payload.shape[1] == form.payload_bytes(hidden)
    assert scales.shape[1] == form.scale_bytes(hidden)
    expected = codes.astype(np.float32)
    if form.block:
        expected *= np.repeat(2.0 ** exponents.astype(np.float32), form.block, axis=1)[:, :hidden]
    assert np.array_equal(form.decode(payload, scales, hidden, form.tables()), expected)


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=50))
def test_rounding_to_bfloat16_is_to_nearest(values: list[float]) -> None:
    import ml_dtypes

    array = np.array(values, np.float32)
    assert np.array_equal(float_to_bf16(array), array.astype(ml_dtypes.bfloat16).view(np.uint16))
    assert np.array_equal(bf16_to_float(float_to_bf16(array)), array.astype(ml_dtypes.bfloat16).astype(np.float32))
