"""The report says what was done, what was left alone and why, and what the calls met."""

import json

import vivace


def test_table_and_dict(sd3_pipe, sd3_latents):
    assert str(vivace.report(sd3_pipe)) == "StableDiffusion3Pipeline: not accelerated"
    vivace.accelerate(sd3_pipe)
    assert "not called yet" in str(vivace.report(sd3_pipe))
    sd3_latents(sd3_pipe)
    sd3_latents(sd3_pipe, skip_guidance_layers=[1], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)
    report = vivace.report(sd3_pipe)
    fields = json.loads(json.dumps(report.to_dict()))
    assert fields["family"] == "sd3"
    assert fields["preset"] == "exact"
    joint = {"layers": 2, "backend": "native (torch chooses the kernel)"}
    assert fields["attention"] == {"joint": joint}
    assert fields["calls"] == {"transformer": {"fused blocks": 8}}
    assert fields["weight_bytes"] == sum(t.nbytes for t in sd3_pipe.transformer.state_dict().values())
    assert 0 < fields["accelerate_seconds"] < 60
    assert 0 < fields["first_call_seconds"] < 60
    left = {note["name"]: note["detail"] for note in fields["passes"] if not note["done"]}
    assert left["compile"] == "the blocks are fused by hand"
    assert "CUDA" in left["graphs"]
    table = str(report).splitlines()
    assert table[0] == "StableDiffusion3Pipeline (sd3), preset exact, float32 on cpu"
    assert any(line.split()[:2] == ["fuse", "done"] for line in table)
    assert any("8 calls, fused blocks" in line for line in table)
