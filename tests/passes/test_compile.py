"""Regional compile puts a compiled call on every repeated block, and takes it off again."""

import torch

import vivace


def test_blocks_compile_and_uncompile(sd3_pipe, sd3_latents, monkeypatch):
    # The tracer is the real one; the code generator would take half a minute.
    stock = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: stock(*a, **{**k, "backend": "aot_eager"}))
    expected = sd3_latents(sd3_pipe)
    vivace.accelerate(sd3_pipe, compile="on")
    notes = {note.name: note for note in vivace.report(sd3_pipe).passes}
    assert notes["fuse"].detail == "compile was asked for"
    blocks = sd3_pipe.transformer.transformer_blocks
    assert all(block._compiled_call_impl is not None for block in blocks)
    torch.testing.assert_close(sd3_latents(sd3_pipe), expected, rtol=1e-4, atol=1e-4)
    vivace.restore(sd3_pipe)
    assert all(block._compiled_call_impl is None for block in blocks)
    assert torch.equal(sd3_latents(sd3_pipe), expected)
