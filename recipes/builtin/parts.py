"""The untrained parts of the built-in model, and their assembly into a stock diffusers folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from vivace.builtin.captions import vocabulary

TEXT_LENGTH = 48
LATENT_CHANNELS = 8  # that are trained; widen.py adds what stock classes want besides
WIDTH, HEADS, LAYERS = 192, 6, 7
TEXT_WIDTHS = (160, 32)
SHARD = "10MB"  # of a weights file, at most


def tokenizer() -> CLIPTokenizer:
    """Real CLIP byte-pair encoding whose merges make every word of the world one token."""
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in vocabulary():
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:  # every merge is (letter, ending): only a word's end ever merges
            pair = (pieces[-2], pieces[-1])
            pieces[-2:] = ["".join(pair)]
            if pair not in merges:
                merges.append(pair)
                tokens.append(pieces[-1])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        model_max_length=TEXT_LENGTH,
    )


def text_encoder(tokens: CLIPTokenizer, width: int, layers: int, heads: int) -> CLIPTextModelWithProjection:
    """A CLIP text encoder whose projection is as wide as itself."""
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=TEXT_LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def text_encoders(tokens: CLIPTokenizer) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """The one that reads, and the least one that stock StableDiffusion3Pipeline also requires."""
    return text_encoder(tokens, TEXT_WIDTHS[0], 4, 5), text_encoder(tokens, TEXT_WIDTHS[1], 1, 1)


def transformer() -> SD3Transformer2DModel:
    """Seven joint blocks over 16 x 16 patches of the 32 x 32 latent."""
    return SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        caption_projection_dim=WIDTH,
        joint_attention_dim=sum(TEXT_WIDTHS),
        pooled_projection_dim=sum(TEXT_WIDTHS),
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def autoencoder(width: int = 48) -> AutoencoderTiny:
    """Plain convolutions, eight times down to eight channels; cheap to decode on a CPU."""
    return AutoencoderTiny(
        encoder_block_out_channels=(width,) * 4,
        decoder_block_out_channels=(width,) * 4,
        latent_channels=LATENT_CHANNELS,
        num_encoder_blocks=(0, 2, 2, 2),
        num_decoder_blocks=(2, 2, 2, 1),
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def assemble(vae: AutoencoderTiny, denoiser: SD3Transformer2DModel, encoders: tuple, *, shift: float = 1.0):
    """The stock pipeline of these parts; the T5 slot stays empty."""
    tokens = tokenizer()
    return StableDiffusion3Pipeline(
        transformer=denoiser,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokens,
        text_encoder_2=encoders[1],
        tokenizer_2=tokens,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def export(pipe: StableDiffusion3Pipeline, folder: Path) -> None:
    """Write the pipeline in stock layout, 16 bit on disk, read back as float32 where no dtype is asked for."""
    pipe.to(dtype=torch.float16)
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        encoder.config.dtype = torch.float16
    pipe.save_pretrained(folder, max_shard_size=SHARD)
    for name in ("text_encoder", "text_encoder_2"):  # transformers loads in the dtype that the configuration names
        amend(folder / name / "config.json", dtype="float32")
    amend(folder / "vae" / "config.json", _name_or_path=None, block_out_channels=None)


def amend(path: Path, **entries: str | None) -> None:
    """Set entries of a configuration file; None takes one away."""
    settings = json.loads(path.read_text()) | entries
    path.write_text(
        json.dumps({k: v for k, v in settings.items() if k not in entries or v is not None}, indent=2) + "\n"
    )
