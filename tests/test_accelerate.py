"""accelerate and restore: close to stock, reversible to the bit, and clear about what they cannot take."""

import copy
import dataclasses
import gc
import inspect
import pickle
import sys

import pytest
import torch
from accelerate import cpu_offload_with_hook, hooks
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

import vivace
from vivace import Config, InputError
from vivace.passes import PASSES


def served(pipe) -> dict[str, int]:
    return vivace.report(pipe).calls["transformer"]


def test_close_to_stock_and_restored_to_the_bit(sd3_pipe, sd3_latents):
    stock, weights = sd3_latents(sd3_pipe), copy.deepcopy(sd3_pipe.transformer.state_dict())
    assert vivace.accelerate(sd3_pipe) is sd3_pipe
    fast = sd3_latents(sd3_pipe)
    assert served(sd3_pipe) == {"fused blocks": 3}
    torch.testing.assert_close(fast, stock, rtol=1e-4, atol=1e-4)
    vivace.restore(sd3_pipe)
    assert type(sd3_pipe) is StableDiffusion3Pipeline
    assert type(sd3_pipe.transformer) is SD3Transformer2DModel
    assert "forward" not in vars(sd3_pipe.transformer)
    assert torch.equal(sd3_latents(sd3_pipe), stock)
    for name, tensor in sd3_pipe.transformer.state_dict().items():
        assert torch.equal(tensor, weights[name])
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_looks_as_before(sd3_pipe, tmp_path):
    signature = inspect.signature(sd3_pipe.__call__), inspect.signature(sd3_pipe.transformer.forward)
    names, parts = list(sd3_pipe.transformer.state_dict()), set(sd3_pipe.components)
    vivace.accelerate(sd3_pipe)
    assert (inspect.signature(sd3_pipe.__call__), inspect.signature(sd3_pipe.transformer.forward)) == signature
    assert isinstance(sd3_pipe, StableDiffusion3Pipeline)
    assert type(sd3_pipe).__qualname__ == "StableDiffusion3Pipeline"
    assert list(sd3_pipe.transformer.state_dict()) == names
    assert set(sd3_pipe.components) == parts
    sd3_pipe.save_pretrained(tmp_path)
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, sd3_pipe.transformer.state_dict()[name])


def test_bare_denoiser(sd3_pipe):
    denoiser = sd3_pipe.transformer
    arguments = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.zeros(1, 9, 24),
        "pooled_projections": torch.randn(1, 20),
        "timestep": torch.tensor([500.0]),
    }
    with torch.no_grad():
        stock = denoiser(**arguments).sample
        vivace.accelerate(denoiser)
        torch.testing.assert_close(denoiser(**arguments).sample, stock, rtol=1e-4, atol=1e-4)
        positional = denoiser(*arguments.values())
        torch.testing.assert_close(positional.sample, stock, rtol=1e-4, atol=1e-4)
    assert vivace.report(denoiser).calls == {"denoiser": {"fused blocks": 2}}
    assert torch.equal(vivace.restore(denoiser)(**arguments).sample, stock)


def test_gradients_go_through_the_stock_forward(sd3_pipe):
    denoiser = vivace.accelerate(sd3_pipe).transformer
    out = denoiser(torch.randn(1, 4, 8, 8), torch.zeros(1, 9, 24), torch.randn(1, 20), torch.tensor([1.0]))
    out.sample.sum().backward()
    assert denoiser.proj_out.weight.grad is not None
    assert "gradients" in next(iter(served(sd3_pipe)))


def test_a_unet_with_nothing_to_fuse_keeps_its_pictures(unet_pipe):
    def picture():
        return unet_pipe(
            "a fox", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)
        ).images

    stock = picture()
    vivace.accelerate(unet_pipe, channels_last="on")
    fast = picture()
    vivace.restore(unet_pipe)
    torch.testing.assert_close(torch.tensor(fast), torch.tensor(stock), rtol=1e-3, atol=1e-3)
    assert (picture() == stock).all()


def test_twice(sd3_pipe):
    vivace.accelerate(sd3_pipe)
    before = type(sd3_pipe)
    vivace.accelerate(sd3_pipe, "exact")
    assert type(sd3_pipe) is before
    vivace.accelerate(sd3_pipe, fuse="off")
    assert vivace.report(sd3_pipe).config["fuse"] == "off"
    with pytest.raises(InputError, match="CUDA"):
        vivace.accelerate(sd3_pipe, graphs="on")
    assert vivace.report(sd3_pipe).config["fuse"] == "off"
    vivace.restore(sd3_pipe)
    assert type(sd3_pipe) is StableDiffusion3Pipeline


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"graphs": "on"}, "graphs='on' cannot be done here: CUDA graphs need a CUDA device"),
        ({"channels_last": "on"}, "no convolutional model"),
        ({"attention": "flash"}, "it runs on cuda, not on cpu"),
        ({"attention": "cudnn"}, "runs on cuda, not on cpu"),
        ({"fuse": "on", "compile": "on"}, "one of the two"),
    ],
)
def test_asked_for_is_done_or_an_error_before_anything_changes(sd3_pipe, fields, message):
    state = dict(vars(sd3_pipe.transformer))
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        vivace.accelerate(sd3_pipe, **fields)
    assert type(sd3_pipe) is StableDiffusion3Pipeline
    assert type(sd3_pipe.transformer) is SD3Transformer2DModel
    assert vars(sd3_pipe.transformer) == state


def test_a_pass_that_fails_leaves_nothing_behind(sd3_pipe, monkeypatch):
    def fail(target):
        raise RuntimeError("no")

    passes = tuple(dataclasses.replace(one, apply=fail) if one.name == "fuse" else one for one in PASSES)
    monkeypatch.setattr(sys.modules["vivace.accelerate"], "PASSES", passes)
    with pytest.raises(RuntimeError, match="no"):
        vivace.accelerate(sd3_pipe)
    assert type(sd3_pipe) is StableDiffusion3Pipeline
    assert type(sd3_pipe.transformer) is SD3Transformer2DModel


def test_follows_a_cast_and_a_load(sd3_pipe, sd3_latents):
    stock = copy.deepcopy(sd3_pipe)
    vivace.accelerate(sd3_pipe)
    sd3_pipe.to(torch.float64)
    torch.testing.assert_close(sd3_latents(sd3_pipe), sd3_latents(stock.to(torch.float64)), rtol=1e-6, atol=1e-6)
    doubled = {name: tensor * 1.5 for name, tensor in stock.transformer.state_dict().items()}
    for assign in (False, True):
        sd3_pipe.transformer.load_state_dict(doubled, assign=assign)
        stock.transformer.load_state_dict(doubled)
        torch.testing.assert_close(sd3_latents(sd3_pipe), sd3_latents(stock), rtol=1e-6, atol=1e-6)
        doubled = {name: tensor / 2 for name, tensor in doubled.items()}
    assert set(served(sd3_pipe)) == {"fused blocks"}


def test_adapters_left_to_peft_take_the_stock_blocks(sd3_pipe, sd3_latents):
    from peft import LoraConfig

    plain = sd3_latents(sd3_pipe)
    vivace.accelerate(sd3_pipe, lora="off")
    torch.manual_seed(3)
    lora = LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    sd3_pipe.transformer.add_adapter(lora)
    adapted = sd3_latents(sd3_pipe)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    assert any("to_q" in reason for reason in served(sd3_pipe))
    sd3_pipe.transformer.fuse_lora()
    sd3_pipe.transformer.unload_lora()
    torch.testing.assert_close(sd3_latents(sd3_pipe), adapted, rtol=1e-3, atol=1e-3)
    assert served(sd3_pipe)["fused blocks"] == 3


def test_deep_copy_and_pickle_are_stock(sd3_pipe, sd3_latents):
    stock = sd3_latents(sd3_pipe)
    vivace.accelerate(sd3_pipe)
    for copied in (copy.deepcopy(sd3_pipe), pickle.loads(pickle.dumps(sd3_pipe))):
        assert type(copied) is StableDiffusion3Pipeline
        assert type(copied.transformer) is SD3Transformer2DModel
        assert torch.equal(sd3_latents(copied), stock)
        assert vivace.report(copied).preset is None
    copied = vivace.accelerate(copy.deepcopy(sd3_pipe))
    sd3_latents(copied)
    assert served(copied) == {"fused blocks": 3}
    assert served(sd3_pipe) == {}


@pytest.mark.parametrize("order", ["offload first", "accelerate first"])
def test_model_offload(sd3_pipe, sd3_latents, order):
    stock = sd3_latents(sd3_pipe)
    steps = [lambda: cpu_offload_with_hook(sd3_pipe.transformer, "cpu"), lambda: vivace.accelerate(sd3_pipe)]
    for step in steps if order == "offload first" else reversed(steps):
        step()
    torch.testing.assert_close(sd3_latents(sd3_pipe), stock, rtol=1e-4, atol=1e-4)
    assert served(sd3_pipe) == {"fused blocks": 3}
    vivace.restore(sd3_pipe)
    assert torch.equal(sd3_latents(sd3_pipe), stock)
    sd3_pipe.remove_all_hooks()
    vivace.accelerate(sd3_pipe)
    sd3_latents(sd3_pipe)
    assert served(sd3_pipe) == {"fused blocks": 3}


def test_hooks_on_blocks_take_the_side_path(sd3_pipe, sd3_latents):
    vivace.accelerate(sd3_pipe)
    seen = []
    handle = sd3_pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: seen.append(1))
    sd3_latents(sd3_pipe)
    assert len(seen) == 3
    handle.remove()
    sd3_latents(sd3_pipe)
    assert len(seen) == 3
    assert served(sd3_pipe)["fused blocks"] == 3


def test_compiled_already_is_an_error(sd3_pipe):
    sd3_pipe.transformer.transformer_blocks[0].compile()
    with pytest.raises(InputError, match="compiled already"):
        vivace.accelerate(sd3_pipe)
    sd3_pipe.transformer = torch.compile(sd3_pipe.transformer)
    with pytest.raises(InputError, match="compiled already"):
        vivace.accelerate(sd3_pipe)


@pytest.mark.parametrize("order", ["casting first", "accelerate first"])
def test_layerwise_casting_takes_the_side_path(sd3_pipe, sd3_latents, order):
    def cast(pipe):
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        return pipe

    stock = sd3_latents(cast(copy.deepcopy(sd3_pipe)))
    for step in (cast, vivace.accelerate) if order == "casting first" else (vivace.accelerate, cast):
        step(sd3_pipe)
    assert torch.equal(sd3_latents(sd3_pipe), stock)
    with pytest.raises(InputError, match="carries a hook"):
        vivace.accelerate(sd3_pipe, fuse="on")


def test_hooks_that_were_removed_leave_nothing_in_the_way(sd3_pipe, sd3_latents):
    expected = sd3_latents(vivace.accelerate(copy.deepcopy(sd3_pipe), fuse="on"))
    hooks.add_hook_to_module(sd3_pipe.transformer, hooks.ModelHook())
    for module in sd3_pipe.transformer.modules():
        hooks.add_hook_to_module(module, hooks.ModelHook())
    hooks.remove_hook_from_submodules(sd3_pipe.transformer)
    assert "forward" in vars(sd3_pipe.transformer.transformer_blocks[0])
    assert torch.equal(sd3_latents(vivace.accelerate(sd3_pipe, fuse="on")), expected)
    assert served(sd3_pipe).keys() == {"fused blocks"}
    vivace.restore(sd3_pipe)
    sd3_pipe.transformer.transformer_blocks[0].norm1.forward = lambda *arguments, **named: None
    with pytest.raises(InputError, match=r"transformer_blocks.0.norm1 carries a hook"):
        vivace.accelerate(sd3_pipe, fuse="on")


def test_a_denoiser_of_two_pipelines(sd3_pipe, sd3_latents):
    other = StableDiffusion3Pipeline(**sd3_pipe.components)
    other.set_progress_bar_config(disable=True)
    vivace.accelerate(sd3_pipe)
    with pytest.raises(InputError, match="through another"):
        vivace.accelerate(other)
    sd3_latents(other)
    assert served(sd3_pipe) == {"fused blocks": 3}


def test_a_forward_of_the_users_own_is_an_error(sd3_pipe):
    sd3_pipe.transformer.forward = lambda *args, **kwargs: "mine"
    with pytest.raises(InputError, match="replaced on the instance"):
        vivace.accelerate(sd3_pipe)
    assert sd3_pipe.transformer.forward() == "mine"


def test_no_denoiser_is_an_error():
    with pytest.raises(InputError, match="found no denoiser"):
        vivace.accelerate(object())


def test_an_unknown_family_takes_the_generic_lane():
    class Novel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    denoiser, x = Novel(), torch.randn(2, 4)
    stock = denoiser(x)
    vivace.accelerate(denoiser)
    assert torch.equal(denoiser(x), stock)
    assert "generic lane" in str(vivace.report(denoiser))


def nbytes(thing: object) -> int:
    """Bytes of a plain dense tensor; other tests leave stranger ones behind, which have no such number."""
    plain = type(thing) in (torch.Tensor, torch.nn.Parameter)
    return thing.nbytes if plain and thing.layout is torch.strided else 0


@pytest.mark.usefixtures("young")
def test_ten_cycles_leave_memory_flat(sd3_pipe, sd3_latents):
    def cycle():
        vivace.accelerate(sd3_pipe)
        sd3_latents(sd3_pipe)
        vivace.restore(sd3_pipe)
        gc.collect()
        return len(gc.get_objects()), sum(map(nbytes, gc.get_objects()))

    cycle()
    first, *_, last = [cycle() for _ in range(10)]
    assert last[1] == first[1]
    assert last[0] <= first[0] + 50


@pytest.mark.parametrize("name", ["unet", "vae"])
def test_a_component_that_came_later_is_told_and_taken_by_the_next_call(unet_pipe, caplog, name):
    pipe = vivace.accelerate(copy.deepcopy(unet_pipe))
    first, second = getattr(pipe, name), copy.deepcopy(getattr(pipe, name))
    setattr(pipe, name, second)
    for _ in range(2):
        pipe("a fox", num_inference_steps=1, output_type="latent")
    assert [f"the {name} was replaced" in record.message for record in caplog.records] == [True]
    assert vivace.report(pipe).replaced == (name,)
    assert f"{name} was replaced since and is stock" in str(vivace.report(pipe))
    with pytest.raises(InputError, match="CUDA"):
        vivace.accelerate(pipe, graphs="on")
    vivace.accelerate(pipe)
    assert vivace.report(pipe).replaced == ()
    pipe("a fox", num_inference_steps=1, output_type="latent")
    assert vivace.report(pipe).calls["unet"] == {"fused blocks": 1}
    assert not any(hasattr(type(module), "vivace_stock") for module in first.modules())
    assert any(hasattr(type(module), "vivace_stock") for module in second.modules())
    vivace.restore(pipe)
    assert not any(hasattr(type(module), "vivace_stock") for module in second.modules())


def test_a_component_that_cannot_be_taken_is_an_error_before_anything_changes(sd3_pipe):
    vivace.accelerate(sd3_pipe)
    before = type(sd3_pipe)
    sd3_pipe.transformer = torch.compile(sd3_pipe.transformer)
    assert vivace.report(sd3_pipe).replaced == ()  # the same one, in a wrapper
    sd3_pipe.transformer = torch.compile(copy.deepcopy(sd3_pipe.transformer._orig_mod))
    with pytest.raises(InputError, match="compiled already"):
        vivace.accelerate(sd3_pipe)
    assert type(sd3_pipe) is before


def test_what_was_dropped_is_no_other_component(unet_pipe):
    pipe = vivace.accelerate(copy.deepcopy(unet_pipe))
    pipe.text_encoder = pipe.vae = None
    assert vivace.report(pipe).replaced == ()


@pytest.mark.parametrize("lora", ["merged", "side"])
def test_inference_mode_leaves_weights_that_can_be_trained(sd3_pipe, sd3_latents, lora_of, lora):
    file = lora_of(sd3_pipe.transformer)
    with torch.inference_mode():
        vivace.accelerate(sd3_pipe, lora=lora, channels_last="off")
        sd3_latents(sd3_pipe)
        sd3_pipe.load_lora_weights(file)
        sd3_latents(sd3_pipe)
        sd3_pipe.unload_lora_weights()
        sd3_latents(sd3_pipe)
        vivace.restore(sd3_pipe)
    assert not any(parameter.is_inference() for parameter in sd3_pipe.transformer.parameters())


def test_weights_of_inference_mode_stay_so(sd3_pipe, sd3_latents):
    with torch.inference_mode():
        pipe = copy.deepcopy(sd3_pipe)
    stock = sd3_latents(pipe)
    vivace.accelerate(pipe)
    sd3_latents(pipe)
    vivace.restore(pipe)
    assert torch.equal(sd3_latents(pipe), stock)


def test_config_object_and_preset_are_the_same(sd3_pipe):
    vivace.accelerate(sd3_pipe, Config(check_nan=True))
    assert vivace.report(sd3_pipe).preset == "custom"
    vivace.accelerate(sd3_pipe, "exact")
    assert vivace.report(sd3_pipe).preset == "exact"


def test_modular_pipeline(sd3_pipe):
    from diffusers.modular_pipelines import ModularPipeline, ModularPipelineBlocks
    from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam

    class Denoise(ModularPipelineBlocks):
        model_name = "one-step"
        expected_components = [ComponentSpec("transformer", SD3Transformer2DModel)]  # noqa: RUF012
        inputs = [InputParam("x"), InputParam("text"), InputParam("pooled")]  # noqa: RUF012
        intermediate_outputs = [OutputParam("sample")]  # noqa: RUF012

        def __call__(self, components, state):
            block_state = self.get_block_state(state)
            block_state.sample = components.transformer(
                block_state.x, block_state.text, block_state.pooled, torch.tensor([300.0])
            ).sample
            self.set_block_state(state, block_state)
            return components, state

    pipe = ModularPipeline(blocks=Denoise())
    pipe.update_components(transformer=sd3_pipe.transformer)
    arguments = {"x": torch.randn(1, 4, 8, 8), "text": torch.zeros(1, 9, 24), "pooled": torch.randn(1, 20)}
    stock = pipe(**arguments, output="sample")
    vivace.accelerate(pipe)
    torch.testing.assert_close(pipe(**arguments, output="sample"), stock, rtol=1e-4, atol=1e-4)
    assert served(pipe) == {"fused blocks": 1}
    vivace.restore(pipe)
    assert type(pipe) is ModularPipeline
    assert torch.equal(pipe(**arguments, output="sample"), stock)
