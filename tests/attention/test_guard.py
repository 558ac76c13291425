"""The NaN guard names layer, backend and step, and never switches."""

import pytest

import vivace
from vivace.accelerate import acceleration_of
from vivace.attention.guard import NotFiniteError


@pytest.mark.parametrize("fuse", ["auto", "off"])
def test_names_layer_backend_and_step(sd3_pipe, sd3_latents, fuse):
    vivace.accelerate(sd3_pipe, check_nan=True, fuse=fuse)
    sd3_latents(sd3_pipe)
    (lane,) = acceleration_of(sd3_pipe).target.lanes.values()
    assert [*lane.calls] == ["fused blocks" if fuse == "auto" else "stock blocks"]

    def spoil(pipe, step, timestep, tensors):
        if step == 1:
            pipe.transformer.transformer_blocks[1].attn.to_v.bias.data.fill_(float("nan"))
        return {}

    with pytest.raises(NotFiniteError, match=r"transformer_blocks\.1, backend native, step 2"):
        sd3_latents(sd3_pipe, callback_on_step_end=spoil)
