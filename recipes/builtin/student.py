"""What stage 4 trains: both text encoders and the transformer as one module, with the heads that teach them to bind."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
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
    """Joint attention whose last text token stands for ZERO_TOKENS equal ones."""

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
        out = Folded.apply(q, k[:, :, :-1], v[:, :, :-1], k[:, :, -1:], v[:, :, -1:]).transpose(1, 2).flatten(2)
        image, text = out[:, :split], out[:, split:]
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)

    @staticmethod
    def heads(attn, x, projections, norms):
        q, k, v = (p(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for p in projections)
        return norms[0](q).to(v.dtype), norms[1](k).to(v.dtype), v  # the norms' weights are float32


class Folded(torch.autograd.Function):
    """Attention of q [B, H, Q, D] over k, v [B, H, K, D] and one further key and value [B, H, 1, D] that count
    ZERO_TOKENS times.

    The further key only raises the softmax's log-sum-exp, so that flash attention's own backward is exact once it is
    given the raised one, and the merged output, in place of its own (as in ring attention, arXiv 2310.01889).
    """

    @staticmethod
    def forward(ctx, q, k, v, further_k, further_v):
        out, lse, *state = flash(q, k, v)
        logit = (q.float() * further_k.float()).sum(-1) / math.sqrt(q.shape[-1]) + math.log(ZERO_TOKENS)
        total = torch.logaddexp(lse, logit)
        share = (logit - total).exp()[..., None]
        out = torch.lerp(out.float(), further_v.float(), share).to(q.dtype)
        ctx.save_for_backward(q, k, v, further_k, further_v, out, total, share, *state)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, further_k, further_v, out, total, share, *state = ctx.saved_tensors
        grads = flash_backward(grad, q, k, v, out, total, state)
        grad_q, grad_k, grad_v = (g.transpose(1, 2) for g in grads)
        wide = grad.float()
        slope = share * (wide * (further_v.float() - out.float())).sum(-1, keepdim=True) / math.sqrt(q.shape[-1])
        grad_q = grad_q + (slope * further_k.float()).to(q.dtype)
        grad_further_k = (slope * q.float()).sum(2, keepdim=True).to(q.dtype)
        return grad_q, grad_k, grad_v, grad_further_k, (share * wide).sum(2, keepdim=True).to(q.dtype)


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Flash attention's output, its log-sum-exp [B, H, Q], and what its backward needs besides."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    out, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return out, lse, seed, offset


@torch.library.custom_op("builtin_recipe::flash_backward", mutates_args=())
def flash_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    state: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v, as [B, S, H, D].

    Opaque to the compiler, which would store `lse` in an order of its own; flash attention takes it as contiguous.
    """
    aten, lse = torch.ops.aten, lse.contiguous()
    grad, out = (t if t.stride(-1) == 1 else t.contiguous() for t in (grad, out))
    if q.device.type == "cpu":
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = backward(grad, q, k, v, out, lse, 0.0, is_causal=False)
    else:
        lengths = (None, None, q.shape[2], k.shape[2])
        backward = aten._scaled_dot_product_flash_attention_backward
        grads = backward(grad, q, k, v, out, lse, *lengths, 0.0, False, *state)
    return tuple(g.transpose(1, 2).contiguous() for g in grads)


@flash_backward.register_fake
def _(grad, q, k, v, out, lse, state):
    return tuple(t.new_empty((t.shape[0], t.shape[2], t.shape[1], t.shape[3])) for t in (q, k, v))


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
def draw(
    student: Student,
    ids: torch.Tensor,
    empty: torch.Tensor,
    noise: torch.Tensor,
    *,
    steps: int,
    guidance: float,
    shift: float,
) -> torch.Tensor:
    """Latents by Euler's method with guidance, at the stock scheduler's sigmas."""
    tokens, pooled = (torch.cat(pair) for pair in zip(student.encode(empty), student.encode(ids), strict=True))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.tolist()
    x = noise
    for now, following in pairwise(sigmas):
        sigma = torch.full((2 * len(x),), now, device=x.device)
        without, with_text = student.velocity(torch.cat((x, x)), sigma, tokens, pooled)[0].float().chunk(2)
        x = x + (following - now) * (without + guidance * (with_text - without))
    return x
