"""channels_last reorders convolution weights, and puts back exactly what it reordered."""

import torch

import vivace


def orders(module) -> dict[str, bool]:
    convolutions = {
        n: m for n, m in module.named_modules() if isinstance(m, torch.nn.Conv2d) and max(m.kernel_size) > 1
    }
    return {n: m.weight.is_contiguous(memory_format=torch.channels_last) for n, m in convolutions.items()}


def test_reorders_denoiser_and_vae_and_puts_back(unet_pipe):
    before = orders(unet_pipe.unet), orders(unet_pipe.vae)
    strides = {name: p.stride() for name, p in unet_pipe.unet.named_parameters()}
    vivace.accelerate(unet_pipe, channels_last="on")
    assert all(orders(unet_pipe.unet).values())
    assert all(orders(unet_pipe.vae).values())
    vivace.restore(unet_pipe)
    assert (orders(unet_pipe.unet), orders(unet_pipe.vae)) == before
    assert {name: p.stride() for name, p in unet_pipe.unet.named_parameters()} == strides


def test_not_by_itself_on_a_cpu(unet_pipe):
    vivace.accelerate(unet_pipe)
    notes = {note.name: note for note in vivace.report(unet_pipe).passes}
    vivace.restore(unet_pipe)
    assert not notes["channels_last"].done
    assert "cpu" in notes["channels_last"].detail
