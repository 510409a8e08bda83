"""The one tolerance rule of the tests, which is that of `moe_lora.verify`."""

from moe_lora.verify import Case, Inputs, errors


def assert_right(case: Case, inputs: Inputs, backend: str = "auto") -> None:
    """The output and every gradient of a case are within tolerance of the float64 oracle."""
    for name, (error, allowed) in errors(case, inputs, backend).items():
        assert error <= allowed, f"{name} of {case}: error {error:.3e}, allowed {allowed:.3e}"
