"""Diffusers weights under the names they have in Stable Diffusion's own one-file checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, cat

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def unet(weights: Mapping[str, Tensor], *, layers: int) -> dict[str, Tensor]:
    """A UNet with `layers` residual blocks a level."""
    with_attention = {name.rsplit(".attentions", 1)[0] for name in weights if ".attentions." in name}
    found = {}
    for name, weight in weights.items():
        if match := re.match(r"(down_blocks\.(\d+))\.(resnets|attentions|downsamplers)\.(\d+)\.(.*)", name):
            _, level, kind, index, rest = match.groups()
            block = int(level) * (layers + 1) + (layers + 1 if kind == "downsamplers" else 1 + int(index))
            place = {"resnets": "0", "attentions": "1", "downsamplers": "0"}[kind]
            new = f"input_blocks.{block}.{place}.{rest.replace('conv.', 'op.') if kind == 'downsamplers' else rest}"
        elif match := re.match(r"(up_blocks\.(\d+))\.(resnets|attentions|upsamplers)\.(\d+)\.(.*)", name):
            room, level, kind, index, rest = match.groups()
            block = int(level) * (layers + 1) + (layers if kind == "upsamplers" else int(index))
            last = "2" if room in with_attention else "1"
            new = f"output_blocks.{block}.{ {'resnets': '0', 'attentions': '1', 'upsamplers': last}[kind] }.{rest}"
        else:
            start = next(start for start in OUTSIDE if name.startswith(f"{start}."))
            new = OUTSIDE[start] + name.removeprefix(start)
        if ".resnets." in name:
            new = re.sub(r"\b(" + "|".join(RESNET) + r")\b", lambda found: RESNET[found[1]], new)
        found[f"model.diffusion_model.{new}"] = weight
    return found


def vae(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An AutoencoderKL of four levels."""
    found = {}
    for name, weight in weights.items():
        new = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        new = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", new)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", new)
        new = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        if match := re.match(r"(.*)mid_block\.attentions\.0\.(.*)\.(weight|bias)", new):
            coder, part, kind = match.groups()
            new = f"{coder}mid.attn_1.{VAE_ATTENTION[part]}.{kind}"
            if part != "group_norm" and kind == "weight":
                weight = weight[:, :, None, None]
        found[f"first_stage_model.{new}"] = weight
    return found


def clip(weights: Mapping[str, Tensor], *, start: str) -> dict[str, Tensor]:
    """OpenAI's CLIP text encoder below `start`."""
    return {f"{start}.transformer.text_model.{name.removeprefix('text_model.')}": weights[name] for name in weights}


def open_clip(weights: Mapping[str, Tensor], *, start: str) -> dict[str, Tensor]:
    """OpenCLIP's text encoder, q, k and v in one, below `start`."""
    plain = {name.removeprefix("text_model."): weight for name, weight in weights.items()}
    found = {
        "token_embedding.weight": plain["embeddings.token_embedding.weight"],
        "positional_embedding": plain["embeddings.position_embedding.weight"],
        "ln_final.weight": plain["final_layer_norm.weight"],
        "ln_final.bias": plain["final_layer_norm.bias"],
        "text_projection": plain["text_projection.weight"].T,
    }
    for name, weight in plain.items():
        if not (match := re.match(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name)):
            continue
        layer, part, kind = match.groups()
        block = f"transformer.resblocks.{layer}"
        if part in OPEN_CLIP:
            found[f"{block}.{OPEN_CLIP[part]}.{kind}"] = weight
        elif part == "self_attn.q_proj":
            rows = [plain[f"encoder.layers.{layer}.self_attn.{one}_proj.{kind}"] for one in "qkv"]
            found[f"{block}.attn.in_proj_{kind}"] = cat(rows)
    return {f"{start}.model.{name}": weight.contiguous() for name, weight in found.items()}


def flux_shapes(*, width: int = 3072) -> dict[str, list[int]]:
    """Names and shapes of FLUX.1-dev with one double and one single block."""
    linears = {
        "img_in": (width, 64),
        "txt_in": (width, 4096),
        **{
            f"{name}.in_layer": (width, depth)
            for name, depth in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256))
        },
        **{f"{name}.out_layer": (width, width) for name in ("time_in", "vector_in", "guidance_in")},
        "single_blocks.0.modulation.lin": (3 * width, width),
        "single_blocks.0.linear1": (7 * width, width),
        "single_blocks.0.linear2": (width, 5 * width),
        "final_layer.linear": (64, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for stream in ("img", "txt"):
        block = f"double_blocks.0.{stream}"
        linears[f"{block}_mod.lin"] = (6 * width, width)
        linears[f"{block}_attn.qkv"] = (3 * width, width)
        linears[f"{block}_attn.proj"] = (width, width)
        linears[f"{block}_mlp.0"] = (4 * width, width)
        linears[f"{block}_mlp.2"] = (width, 4 * width)
    found = {}
    for name, shape in linears.items():
        found |= {f"{name}.weight": list(shape), f"{name}.bias": [shape[0]]}
    for attention in ("double_blocks.0.img_attn", "double_blocks.0.txt_attn", "single_blocks.0"):
        found |= {f"{attention}.norm.{name}_norm.scale": [128] for name in ("query", "key")}
    return found
