"""What earlier outputs foretell of one that is left out."""

import pytest
import torch


def test_a_sum_of_outputs_is_foretold_and_what_is_new_is_not(recipe):
    foretold = recipe("foretold")
    drawn = torch.Generator().manual_seed(0)
    nodes = [torch.randn(4, 16, 8, generator=drawn) for _ in range(2)]
    new = torch.randn(4, 16, 8, generator=drawn)
    known = 2 * nodes[1] - nodes[0]
    assert foretold._fitted(nodes, known) == pytest.approx(0, abs=1e-5)
    assert foretold._fitted(nodes, new) > 0.9
    assert foretold._fitted([*nodes, new], known + new) == pytest.approx(0, abs=1e-5)
