"""The Triton kernels compiled for GPUs: no spills, shared memory that fits, tensor cores in use, as the table says."""

import pytest

pytest.importorskip("triton")

from tests.support import aot


@pytest.mark.slow
@pytest.mark.parametrize("target, case", aot.PAIRS, ids=str)
def test_aot_kernels_are_those_of_the_table(target, case):
    found, limits = aot.rows(target, case), aot.TARGETS[target]
    for row in found:
        assert row.scratch == 0, f"{row} spills"
        assert row.shared <= limits.shared, row
        if case.dtype.itemsize == 2 and row.kernel not in ("gate_grad_kernel", "sum_kernel"):
            few = row.kernel != "expert_grad_kernel" and case.instances * case.rows < 64
            assert (limits.few if few else limits.many) in row.tensor_cores, row
    wanted = [row for row in aot.read() if (row.target, row.case) == (target, str(case))]
    assert found == wanted, "kernels changed: look at the difference, then `python -m tests.support.aot`"
