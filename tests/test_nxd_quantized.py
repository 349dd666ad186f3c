"""Are neuronx-distributed's quantised layers trained through? The real ones, in the processes of nxd_quantized.py."""

import re

import pytest
from test_nxd import needs_nxd, ran_fixture, wrong  # noqa: F401  (a fixture)

REFUSED = {
    "float8_e5m2": r"layer: quantized_dtype: is torch.float8_e5m2, expected one of \[torch.int8, torch.float8_e4m3fn\]",
    "blocks": "layer: quantization_type: is blockwise_symmetric, expected one of",
    "activations": "layer: activation_quantization_type: is dynamic, expected one of",
}


@needs_nxd
@pytest.mark.parametrize("size", [4, 2])
def test_quantised_layers_are_their_own_and_have_a_backward(ran, size):
    """Forward as theirs, which has no backward at all; all gradients are those of the dequantised weight."""
    found = ran("nxd_quantized")[str(size)]
    assert len(found) == 36
    assert wrong(found, size) == {}
    assert all({"own fails", "zero B to its own", "y", "dx"} <= set(checks) for checks in found.values())


@needs_nxd
def test_one_that_is_not_adapted_lets_gradients_through(ran):
    assert ran("nxd_quantized")["behind"] == 1.0


@needs_nxd
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused(ran, name):
    assert re.match(REFUSED[name], ran("nxd_quantized")["refused"][name])
