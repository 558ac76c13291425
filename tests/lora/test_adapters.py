"""Adapters held out of the tree: in every order of what people do, the results and the weights are stock's."""

import copy
import itertools
import random

import pytest
import torch

import vivace

NAMES = ("a", "b")
ORDERS = [
    order
    for order in itertools.permutations(("accelerate", "restore", "cast", "load", "set", "fuse", "unfuse", "unload"))
    if order.index("accelerate") < order.index("restore")
    and order.index("load") < min(order.index(later) for later in ("set", "fuse", "unfuse", "unload"))
    and order.index("fuse") < order.index("unfuse")
    and order.index("set") < order.index("unload")
    and order.index("fuse") < order.index("unload")
]


class Pair:
    """A pipeline that is accelerated now and then, and one that never is; both live through the same."""

    def __init__(self, pipe, latents, *, mode, lora_of):
        self.fast, self.stock, self.latents, self.mode = pipe, copy.deepcopy(pipe), latents, mode
        self.files = {name: lora_of(pipe.transformer, seed=seed, rank=3 + seed) for seed, name in enumerate(NAMES)}
        self.loaded = ()

    def do(self, step):
        if step == "accelerate":
            vivace.accelerate(self.fast, lora=self.mode)
        elif step == "restore":
            vivace.restore(self.fast)
        else:
            for pipe in (self.fast, self.stock):
                getattr(self, step)(pipe)
            self.loaded = {"load": NAMES, "unload": ()}.get(step, self.loaded)

    def cast(self, pipe):
        pipe.to(torch.float64)

    def move(self, pipe):
        pipe.to("cuda" if torch.cuda.is_available() else "cpu")
        pipe.to("cpu")

    def load(self, pipe):
        for name in NAMES:
            pipe.load_lora_weights(self.files[name], adapter_name=name)

    def set(self, pipe):
        pipe.set_adapters(list(NAMES), adapter_weights=[0.4, 0.7])

    def only(self, pipe):
        pipe.set_adapters(NAMES[1])

    def fuse(self, pipe):
        pipe.fuse_lora(lora_scale=0.9)

    def unfuse(self, pipe):
        # The components by name: the default of SD3 also names an encoder that is not here.
        pipe.unfuse_lora(components=["transformer"])

    def unload(self, pipe):
        pipe.unload_lora_weights()

    def disable(self, pipe):
        pipe.disable_lora()

    def enable(self, pipe):
        pipe.enable_lora()

    def delete(self, pipe):
        pipe.delete_adapters(NAMES[0])

    def compare(self, step):
        ours, theirs = (self.latents(pipe) for pipe in (self.fast, self.stock))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3, msg=lambda text: f"after {step}: {text}")
        assert self.fast.get_active_adapters() == self.stock.get_active_adapters()
        assert self.fast.get_list_adapters() == self.stock.get_list_adapters()
        assert self.fast.fused_loras == self.stock.fused_loras

    def same_weights(self):
        vivace.restore(self.fast)
        ours, theirs = (pipe.transformer.state_dict() for pipe in (self.fast, self.stock))
        assert list(ours) == list(theirs)
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def live(pair, steps):
    for step in steps:
        pair.do(step)
        pair.compare(step)
    pair.same_weights()


@pytest.mark.parametrize("mode", ["merged", "side"])
@pytest.mark.parametrize("order", ORDERS[::84], ids="-".join)
def test_orders(sd3_pipe, sd3_latents, lora_of, order, mode):
    live(Pair(sd3_pipe, sd3_latents, mode=mode, lora_of=lora_of), order)


@pytest.mark.full
@pytest.mark.parametrize("mode", ["merged", "side"])
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_every_order(sd3_pipe, sd3_latents, lora_of, order, mode):
    live(Pair(sd3_pipe, sd3_latents, mode=mode, lora_of=lora_of), order)


@pytest.mark.parametrize("mode", ["merged", "side"])
@pytest.mark.parametrize("seed", range(6))
def test_long_lives(sd3_pipe, sd3_latents, lora_of, seed, mode):
    pair, chance = Pair(sd3_pipe, sd3_latents, mode=mode, lora_of=lora_of), random.Random(seed)
    for _ in range(14):
        adapting = ["set", "only", "fuse", "unfuse", "unload", "disable", "enable"] if pair.loaded else ["load"]
        step = chance.choice(["accelerate", "restore", "move", *adapting, *adapting])
        pair.do(step)
        pair.compare(step)
    pair.same_weights()


@pytest.mark.parametrize("mode", ["merged", "side"])
def test_layers_that_were_there_before_do_not_keep_blocks_stock(sd3_pipe, sd3_latents, lora_of, mode):
    sd3_pipe.load_lora_weights(lora_of(sd3_pipe.transformer))
    wanted = sd3_latents(sd3_pipe)
    vivace.accelerate(sd3_pipe, lora=mode, fuse="on")
    torch.testing.assert_close(sd3_latents(sd3_pipe), wanted, rtol=1e-3, atol=1e-3)
    assert vivace.report(sd3_pipe).calls["transformer"] == {"fused blocks": 3}


@pytest.mark.parametrize("mode", ["merged", "side"])
def test_a_hotswap_is_a_fresh_load(sd3_pipe, sd3_latents, lora_of, mode):
    stock = copy.deepcopy(sd3_pipe)
    first, second = (lora_of(sd3_pipe.transformer, seed=seed, rank=4) for seed in range(2))
    stock.load_lora_weights(dict(second), adapter_name="style")
    wanted = sd3_latents(stock)
    vivace.accelerate(sd3_pipe, lora=mode)
    sd3_pipe.load_lora_weights(dict(first), adapter_name="style")
    before = sd3_latents(sd3_pipe)
    sd3_pipe.load_lora_weights(dict(second), adapter_name="style", hotswap=True)
    torch.testing.assert_close(sd3_latents(sd3_pipe), wanted, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(before, wanted, rtol=1e-2, atol=1e-2)
