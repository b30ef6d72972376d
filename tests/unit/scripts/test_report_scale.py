"""The benchmark of reports on large runs."""

import importlib.util

import pytest

from tests.helpers.paths import SCRIPTS


def test_the_scale_benchmark_tells_linear_from_superlinear() -> None:
    path = SCRIPTS / "benchmarks" / "report_scale.py"
    spec = importlib.util.spec_from_file_location("report_scale", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = [128_000, 1_024_000, 4_096_000, 16_384_000]
    fixed, marginal = module.fixed_and_marginal({n: 0.8 + 1e-7 * n for n in sizes})
    assert (fixed, marginal) == (pytest.approx(0.8), pytest.approx(1e-7))
    lower, upper = module.marginal_halves({n: 0.8 + 1e-7 * n for n in sizes})
    assert upper == pytest.approx(lower)
    lower, upper = module.marginal_halves({n: 0.8 + 1e-14 * n**2 for n in sizes})
    assert upper > 1.5 * lower + 30e-9
