"""Stage 1 and 3: the reader, on clean and careless pictures; the second time on autoencoded ones too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from course import Average, Course, follow, optimizer, update
from diffusers import AutoencoderTiny
from extent import Run
from safetensors.torch import save_file
from scenery import Supply, photographed
from train_autoencoder import reconstruct

from vivace.builtin.judge import agree
from vivace.builtin.reader import GRID, Reader, read
from vivace.builtin.render import render
from vivace.builtin.world import SIDE, Scenes


def targets(scenes: Scenes) -> dict[str, torch.Tensor]:
    """What every cell should say: peak [B, 16, 16], owner [B, 16, 16], offset [B, 2, 16, 16]."""
    line = torch.arange(GRID, device=scenes.count.device) + 0.5
    cell = torch.stack(torch.meshgrid(line, line, indexing="xy"))  # [2, 16, 16] x, y
    away = scenes.centre[..., None, None] * (GRID / SIDE) - cell  # [B, 3, 2, 16, 16]
    near = torch.exp(-away.square().sum(2) / 2) * scenes.present()[..., None, None]  # [B, 3, 16, 16]
    peak, owner = near.max(1)
    index = owner[:, None, None].expand(-1, 1, 2, -1, -1)
    return {"peak": peak, "owner": owner, "offset": away.gather(1, index)[:, 0]}


def loss(reader: Reader, pictures: torch.Tensor, scenes: Scenes) -> torch.Tensor:
    """Cross entropies of the cells near an object and of the whole picture."""
    cells, whole = reader(pictures)
    aim = targets(scenes)
    peak = F.binary_cross_entropy_with_logits(cells["peak"][:, 0].float(), aim["peak"], reduction="none")
    near = (aim["peak"] > 0.55).float()  # a little under one cell from a centre
    weight = near / near.sum()
    total = peak.mul(1 + 4 * near).sum((1, 2)).mean() * 0.3
    for name in ("shape", "colour", "size", "outlined"):
        label = getattr(scenes, name).long().gather(1, aim["owner"].flatten(1)).view_as(aim["owner"])
        total = total + (F.cross_entropy(cells[name].float(), label, reduction="none") * weight).sum()
    total = total + ((cells["offset"].float() - aim["offset"]).abs().sum(1) * weight).sum()
    for name in ("background", "ground"):
        total = total + F.cross_entropy(whole[name].float(), getattr(scenes, name))
    present = scenes.present().float()
    for name, attribute in (("shapes", scenes.shape), ("colours", scenes.colour)):
        held = torch.zeros_like(whole[name].float()).scatter_add_(1, attribute, present).clamp(max=1)
        total = total + F.binary_cross_entropy_with_logits(whole[name].float(), held)
    return total


def share_right(reader: Reader, run: Run, *, seed: int, vae: AutoencoderTiny | None = None) -> float:
    """The share of held-out renders (or of their reconstructions) that the reader reads entirely right."""
    n, right = run.extent.judged, 0
    supply, chunk = Supply(seed, run.device, pool=run.extent.pool), min(n, 500)
    for _ in range(n // chunk):
        scenes = supply.take(chunk)
        pictures = render(scenes)
        if vae is not None:
            pictures = reconstruct(vae, pictures).clamp(0, 1)
        right += sum(agree(read(reader, pictures), scenes))
    return right / (n // chunk * chunk)


def train(course: Course, run: Run, *, vae: AutoencoderTiny | None = None) -> Reader:
    """Train a new reader, or go on with the saved one on autoencoded pictures when `vae` is given."""
    device, batch = run.device, run.extent.reader
    reader = Reader().to(device, memory_format=torch.channels_last)
    with torch.no_grad():
        reader.cells.get_parameter("2.bias")[:1] = -4.0  # most cells hold no object's centre
    if vae is not None:
        reader.load_state_dict(torch.load(run.state / "reader.pt", weights_only=True))
    average, generator = Average(reader, 0.999), torch.Generator(device).manual_seed(11)
    optim = optimizer([{"params": list(reader.parameters())}])
    supply = Supply(100 if vae is None else 101, device, pool=run.extent.pool)
    fast = torch.compile(loss) if device == "cuda" else loss
    drawer = torch.compile(render) if device == "cuda" else render
    for step, progress in enumerate(course):
        scenes = supply.take(batch)
        pictures = drawer(scenes)
        if vae is not None and step % 2:
            noise = 0.15 * torch.rand((), generator=generator, device=device)
            pictures = torch.cat(
                (reconstruct(vae, pictures[: batch * 3 // 4], noise=noise), pictures[batch * 3 // 4 :])
            )
        pictures = photographed(pictures.clamp(0, 1), generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            value = fast(reader, pictures, scenes)
        follow([optim], course.rate(progress, step))
        update([optim], value, list(reader.parameters()))
        average.update()
        if step % 200 == 0:
            course.log(step, loss=value.item())
    average.swap()
    reader.eval()
    torch.save(reader.state_dict(), run.state / "reader.pt")
    save_file({k: v.half().contiguous() for k, v in reader.state_dict().items()}, run.out / "reader.safetensors")
    values = {"renders": share_right(reader, run, seed=900)}
    if vae is not None:
        values["reconstructions"] = share_right(reader, run, seed=901, vae=vae)
    course.log(course.steps, **values)
    course.save(run.out)
    return reader
