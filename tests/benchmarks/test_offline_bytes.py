"""Two independent counts of our kernels' bytes: the offline prediction's, and the kernels' report's."""

import pytest

from benchmarks.kernel_report import __main__ as report
from benchmarks.kernel_report.cases import Case, Sizes
from benchmarks.offline.operators import kernel_of_launch

# They take tensors by address: the prediction counts them at the operator's call.
TABLES = ("adamw", "total_norm squares")
CASES = [case for case in report.cases() if not case.name.startswith(TABLES)]


@pytest.mark.parametrize("arch", report.GPUS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_count_the_same(case: Case, arch: int):
    pytest.importorskip("triton")
    launch = report.record(case, arch)
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    # Another kernel reads the partial sums, and writes the mask token's gradient.
    expected = case.least + sum(values[f"{name}_ptr"].nbytes for name in case.partial)
    expected -= 4 * Sizes().width if case.name.startswith("scatter_tokens backward") else 0
    kernel = kernel_of_launch(launch)
    assert (kernel.moved, kernel.flops) == (expected, case.operations)
