"""What stage 4 trains: both text encoders and the transformer as one module, with the heads that teach them to bind."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from parts import TEXT_WIDTHS, WIDTH, text_encoders, tokenizer, transformer
from torch import nn

from vivace.builtin.captions import LABEL_CLASSES
from vivace.builtin.world import BACKGROUNDS, COLOURS, SHAPES, SIDE, SIZES, Scenes

ZERO_TOKENS = 256  # identical zero tokens that stock code appends in T5's place
GRID = 16
TAUGHT_AT = 4  # the block after which image tokens must tell what stands where
CELL_CLASSES = (len(SHAPES) + 1, len(COLOURS) + 1, len(SIZES) + 1, 3)
WHOLE_CLASSES = (len(BACKGROUNDS), len(COLOURS))


class FoldedAttention:
    """Joint attention whose last text token stands for ZERO_TOKENS equal ones: its logit is raised by their log.

    softmax over n equal keys gives each exp(l), n exp(l) = exp(l + log n) together, and their values are equal too:
    the result is stock's. The bias rides in extra head dimensions, so that no mask is needed.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        split = hidden_states.shape[1]
        image = self.heads(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        text = self.heads(
            attn,
            encoder_hidden_states,
            (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
            (attn.norm_added_q, attn.norm_added_k),
        )
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(image, text, strict=True))
        out = folded_attention(q, k, v).transpose(1, 2).flatten(2)
        image, text = out[:, :split], out[:, split:]
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)

    @staticmethod
    def heads(attn, x, projections, norms):
        q, k, v = (p(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for p in projections)
        return norms[0](q), norms[1](k), v


def folded_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention [B, H, S, D] with log(ZERO_TOKENS) added to the last key's logit, exact to bfloat16's second order."""
    d = q.shape[-1]
    bias = math.log(ZERO_TOKENS) * math.sqrt(d)
    coarse = round(4 * bias) / 4  # exact in bfloat16; the rest rides in a second dimension
    q, k, v = (F.pad(t, (0, 8)) for t in (q, k, v))  # flash attention wants multiples of eight
    q[..., d : d + 2] = 1.0
    k[:, :, -1, d], k[:, :, -1, d + 1] = coarse, bias - coarse
    return F.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(d))[..., :d]


class Student(nn.Module):
    """Token ids, noisy latents and times to velocities, and the teaching heads' logits."""

    def __init__(self):
        super().__init__()
        self.clip, self.least = text_encoders(tokenizer())
        self.denoiser = transformer()
        self.denoiser.set_attn_processor(FoldedAttention())
        self.tell_text = nn.Sequential(nn.Linear(TEXT_WIDTHS[0], 256), nn.SiLU(), nn.Linear(256, sum(LABEL_CLASSES)))
        self.tell_cell = nn.Linear(WIDTH, sum(CELL_CLASSES))
        self.tell_whole = nn.Linear(WIDTH, sum(WHOLE_CLASSES))

    def shipped(self) -> list[nn.Module]:
        return [self.clip, self.least, self.denoiser]

    def encode(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Text tokens [B, 48 + 1, 192], the last one standing for the zero tokens, and the pooled text [B, 192]."""
        outputs = [encoder(input_ids=ids, output_hidden_states=True) for encoder in (self.clip, self.least)]
        tokens = torch.cat([o.hidden_states[-2] for o in outputs], dim=-1)
        pooled = torch.cat([o.text_embeds for o in outputs], dim=-1)
        return F.pad(tokens, (0, 0, 0, 1)), pooled

    def velocity(
        self, x: torch.Tensor, sigma: torch.Tensor, tokens: torch.Tensor, pooled: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The predicted noise - latents [B, 8, 32, 32], and the image tokens [B, 256, 192] after block TAUGHT_AT."""
        net = self.denoiser
        image = net.pos_embed(x).contiguous()
        temb = net.time_text_embed(sigma * 1000, pooled)
        text, taught = net.context_embedder(tokens), image
        for index, block in enumerate(net.transformer_blocks):
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb)
            if index + 1 == TAUGHT_AT:
                taught = image
        out = net.proj_out(net.norm_out(image, temb)).unflatten(1, (GRID, GRID)).unflatten(-1, (2, 2, -1))
        return out.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3), taught

    def forward(self, ids, labels, cells, whole, x0, noise, sigma):
        """The flow-matching loss, and the teaching loss."""
        tokens, pooled = self.encode(ids)
        s = sigma[:, None, None, None]
        out, taught = self.velocity(torch.lerp(x0, noise, s), sigma, tokens, pooled)
        flow = (out.float() - (noise - x0)).square().mean()
        told = cross_entropies(self.tell_text(pooled[:, : TEXT_WIDTHS[0]]), labels, LABEL_CLASSES)
        sure = (1 - sigma)[:, None]  # what stands where cannot be told from noise alone
        shown = cross_entropies(self.tell_cell(taught), cells, CELL_CLASSES, weight=sure)
        seen = cross_entropies(self.tell_whole(taught.mean(1)), whole, WHOLE_CLASSES)
        return flow, told + 4 * shown + seen


def cross_entropies(
    logits: torch.Tensor, labels: torch.Tensor, classes: tuple[int, ...], *, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean cross entropy over several classifications: logits [..., sum(classes)], labels [..., len(classes)]."""
    parts = logits.float().split(list(classes), dim=-1)
    losses = [
        F.cross_entropy(part.flatten(0, -2), labels[..., i].flatten(), reduction="none").view(labels.shape[:-1])
        for i, part in enumerate(parts)
    ]
    each = torch.stack(losses).mean(0)
    return (each if weight is None else each * weight).mean()


def cell_labels(scenes: Scenes) -> torch.Tensor:
    """What stands at the centre of every patch: [B, 256, 4] shape, colour, size, fill; 0 for background."""
    line = (torch.arange(GRID, device=scenes.count.device) + 0.5) * (SIDE / GRID)
    cell = torch.stack(torch.meshgrid(line, line, indexing="xy"))  # [2, 16, 16] x, y
    away = (scenes.centre[..., None, None] - cell).norm(dim=2)  # [B, 3, 16, 16]
    inside = (away < scenes.radius[..., None, None]) & scenes.present()[..., None, None]
    values = torch.stack((scenes.shape, scenes.colour, scenes.size, scenes.outlined.long()), dim=-1) + 1  # [B, 3, 4]
    return (inside.flatten(2)[..., None] * values[:, :, None]).amax(1)


@torch.no_grad()
def draw(student: Student, ids: torch.Tensor, empty: torch.Tensor, noise: torch.Tensor, *, steps: int, guidance: float):
    """Latents by Euler's method with guidance, as the stock pipeline with shift 1 takes them."""
    tokens, pooled = (torch.cat(pair) for pair in zip(student.encode(empty), student.encode(ids), strict=True))
    sigmas = [*torch.linspace(1, 1 / 1000, steps).tolist(), 0.0]
    x = noise
    for now, following in pairwise(sigmas):
        sigma = torch.full((2 * len(x),), now, device=x.device)
        without, with_text = student.velocity(torch.cat((x, x)), sigma, tokens, pooled)[0].float().chunk(2)
        x = x + (following - now) * (without + guidance * (with_text - without))
    return x
