"""Independent counts of the bytes of our kernels agree: the offline prediction's and that of the kernels' report."""

import pytest

from benchmarks.kernel_report import __main__ as report
from benchmarks.kernel_report.cases import Case, Sizes
from benchmarks.offline.operators import kernel_of_launch

# Their tensors are addresses in a table: the prediction counts them where the operator is called.
TABLES = ("adamw", "total_norm squares")
CASES: list[Case] = [case for case in report.cases() if not case.name.startswith(TABLES)]


@pytest.mark.parametrize("arch", report.GPUS)
def test_both_count_the_same(arch: int):
    pytest.importorskip("triton")
    for case in CASES:
        launch = report.record(case, arch)
        values = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
        # Partial sums are written here and read by another kernel, which also writes the mask token's gradient.
        expected = case.least + sum(values[f"{name}_ptr"].nbytes for name in case.partial)
        expected -= 4 * Sizes().width if case.name.startswith("scatter_tokens backward") else 0
        kernel = kernel_of_launch(launch)
        assert (kernel.moved, kernel.flops) == (expected, case.operations), case.name
