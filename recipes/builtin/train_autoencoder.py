"""Stage 2: the autoencoder, on random crops, judged by pixels, edges and the reader's own features."""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn.functional as F
from course import Average, Course, follow, optimizer, update
from diffusers import AutoencoderTiny
from extent import Run
from parts import autoencoder
from scenery import Supply

from vivace.builtin.reader import Reader
from vivace.builtin.render import render

NOISE = 0.08  # of the latents' deviation, added before decoding: the generator's latents will not be perfect either


def reconstruct(vae: AutoencoderTiny, pictures: torch.Tensor, *, noise: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Pictures in [0, 1] encoded and decoded again, in bfloat16 arithmetic, without gradients."""
    with torch.no_grad(), torch.autocast(pictures.device.type, torch.bfloat16):
        z = vae.encoder(pictures * 2 - 1)
        return vae.decoder(z + noise * z.std() * torch.randn_like(z)).float() / 2 + 0.5


def edges(pictures: torch.Tensor) -> torch.Tensor:
    """Horizontal and vertical differences, as Sobel's operator takes them: [B, 6, H - 2, W - 2]."""
    kernel = torch.tensor([[1.0, 2, 1]], device=pictures.device).T @ torch.tensor(
        [[-1.0, 0, 1]], device=pictures.device
    )
    kernel = torch.stack((kernel, kernel.T))[:, None].repeat(3, 1, 1, 1) / 4
    return F.conv2d(pictures, kernel, groups=3)


def loss(vae: AutoencoderTiny, reader: Reader, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the mean absolute error of the pictures alone."""
    z = vae.encoder(pictures * 2 - 1)
    out = vae.decoder(z + NOISE * z.detach().std() * torch.randn_like(z)).float() / 2 + 0.5
    pixel = (out - pictures).abs().mean()
    edge = (edges(out) - edges(pictures)).abs().mean()
    seen = zip(reader.trunk(out.to(z.dtype)), reader.trunk(pictures.to(z.dtype)), strict=True)
    feature = sum((a.float() - b.float()).abs().mean() / b.float().std().detach() for a, b in seen)
    unit = (z.float().square().mean() - 1).square() + z.float().mean((0, 2, 3)).square().mean()
    return pixel + 0.5 * edge + 0.05 * feature + 0.01 * unit, pixel.detach()


def crops(pictures: torch.Tensor, side: int) -> torch.Tensor:
    """One random window for the batch."""
    x, y = (int(torch.randint(0, pictures.shape[-1] - side + 1, ())) for _ in range(2))
    return pictures[..., y : y + side, x : x + side].contiguous(memory_format=torch.channels_last)


def train(course: Course, run: Run, *, side: int = 128) -> AutoencoderTiny:
    """Train the autoencoder, then measure its latents for the scaling that stock code applies."""
    device = run.device
    torch.manual_seed(21)
    vae = autoencoder().to(device, memory_format=torch.channels_last)
    reader = Reader().to(device, memory_format=torch.channels_last).requires_grad_(False)
    reader.load_state_dict(torch.load(run.state / "reader.pt", weights_only=True))
    average, optim = Average(vae, 0.999), optimizer([{"params": list(vae.parameters())}], weight_decay=0.0)
    supply = Supply(200, device, pool=run.extent.pool)
    fast, drawer = (torch.compile(f) if device == "cuda" else f for f in (loss, render))
    for step, progress in enumerate(course):
        pictures = crops(drawer(supply.take(run.extent.autoencoder)), side)
        with torch.autocast(device, torch.bfloat16):
            value, pixel = fast(vae, reader, pictures)
        follow([optim], course.rate(progress, step))
        update([optim], value, list(vae.parameters()))
        average.update()
        if step % 400 == 0:
            course.log(step, loss=value.item(), pixel=pixel.item())
    average.swap()
    vae.eval().requires_grad_(False)
    measure(vae, course, run)
    vae.save_pretrained(run.state / "vae")
    deepcopy(vae).half().save_pretrained(run.out / "vae")
    course.save(run.out)
    return vae


def measure(vae: AutoencoderTiny, course: Course, run: Run) -> None:
    """Set the latents' mean and deviation as shift and scale; log the reconstruction's PSNR in dB."""
    pictures = render(Supply(201, run.device, pool=run.extent.pool).take(run.extent.measured))
    with torch.no_grad(), torch.autocast(run.device, torch.bfloat16):
        z = vae.encoder(pictures * 2 - 1).float()
    vae.register_to_config(shift_factor=round(z.mean().item(), 4), scaling_factor=round(1 / z.std().item(), 4))
    error = (reconstruct(vae, pictures).clamp(0, 1) - pictures).square().mean((1, 2, 3))
    course.log(course.steps, psnr=(-10 * error.log10()).mean(), mean=z.mean(), deviation=z.std(), largest=z.abs().max())
