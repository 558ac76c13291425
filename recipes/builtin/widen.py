"""Widen a trained pipeline's latents with channels that hold nothing, so that every stock class takes it.

    python recipes/builtin/widen.py FOLDER

Eight channels are enough for this world and quicker to learn; the stock inpainting class of Stable Diffusion 3 knows by
the number of the denoiser's channels what to do with a mask, and takes 16 or 33. The autoencoder writes zeros into the
further channels, and neither its decoder nor the transformer reads them: the pictures stay what they were.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, ModelMixin, SD3Transformer2DModel, StableDiffusion3Pipeline
from parts import SHARD, amend

CHANNELS = 16


def widen(pipe: StableDiffusion3Pipeline, *, channels: int = CHANNELS) -> None:
    """Give the pipeline a transformer and an autoencoder of `channels` latent channels that draw the same pictures."""
    pipe.register_modules(
        transformer=widened_transformer(pipe.transformer, channels), vae=widened_autoencoder(pipe.vae, channels)
    )


def widened_transformer(narrow: SD3Transformer2DModel, channels: int) -> SD3Transformer2DModel:
    """The same velocities [B, C, H, W] in the first channels, whatever the further ones hold; zeros in those."""
    wide = twin(narrow, in_channels=channels, out_channels=channels)
    patch, state = narrow.config["patch_size"], narrow.state_dict()
    for name in ("proj_out.weight", "proj_out.bias"):  # rows are of [patch, patch, C]
        rows = state[name].unflatten(0, (patch, patch, -1))
        state[name] = padded(rows, (patch, patch, channels, *rows.shape[3:])).flatten(0, 2)
    return filled(wide, state)


def widened_autoencoder(narrow: AutoencoderTiny, channels: int) -> AutoencoderTiny:
    """The same latents [B, C, H, W] in the first channels and zeros after them; the same pictures of those."""
    return filled(twin(narrow, latent_channels=channels), narrow.state_dict())


def twin(model: ModelMixin, **changes: Any) -> Any:
    """A model of the same class and configuration but for `changes`, with weights of its own."""
    known = inspect.signature(type(model).__init__).parameters
    settings = {name: value for name, value in model.config.items() if name in known}
    return type(model)(**{**settings, **changes}).eval()


def filled(wide: Any, state: dict[str, torch.Tensor]) -> Any:
    """`wide` with the weights of `state` in their dtype, each padded to the size that it has there."""
    weights = {name: padded(state[name], tensor.shape) for name, tensor in wide.state_dict().items()}
    wide.load_state_dict(weights, assign=True)
    return wide


def padded(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """x at the beginning of zeros of `shape`."""
    found = x.new_zeros(shape)
    found[tuple(slice(length) for length in x.shape)] = x
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a pipeline folder, whose transformer and autoencoder are replaced")
    folder = parser.parse_args().folder
    denoiser = SD3Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float16)
    vae = AutoencoderTiny.from_pretrained(folder / "vae", torch_dtype=torch.float16)
    widened_transformer(denoiser, CHANNELS).save_pretrained(folder / "transformer", max_shard_size=SHARD)
    widened_autoencoder(vae, CHANNELS).save_pretrained(folder / "vae")
    amend(folder / "vae" / "config.json", block_out_channels=None)


if __name__ == "__main__":
    main()
