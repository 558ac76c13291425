"""What a batch keeps for its backward pass, and whether the device has room for it: `gradient_checkpointing: auto`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vivace.distill.objective import Start
from vivace.distill.student import recompute, trainable

if TYPE_CHECKING:
    from vivace.distill.objective import Item
    from vivace.distill.training import Training

logger = logging.getLogger(__name__)

ROOM = 0.6  # share of the free memory that activations may fill: rollout, VAE and gradients on their way need the rest
STATE = 12  # bytes of a learnt weight's gradient and AdamW's moments


def settle(training: Training, item: Item, *, room: int) -> None:
    """Have student, critic and features compute activations again, unless `room` bytes can keep those of a batch.

    `item` is of one picture of the largest size.
    """
    if room:
        learnt = sum(sum(map(torch.numel, trainable(one.plain).values())) for one in training.learners.values())
        needed = training.config.batch * of_picture(training, item) + STATE * learnt
        told = "are kept" if needed <= room else "are computed again"
        logger.info("activations %s: they take %.2f GiB, of %.2f that may go", told, needed / 2**30, room / 2**30)
        if needed <= room:
            return
    for name in ("student", "critic"):
        if name in training.learners:
            recompute(training.learners[name].plain)
    training.objective.features.recompute = True


def room_of(training: Training) -> int:
    """Bytes of the GPU that activations may fill; 0 on a CPU and where the student is sharded, which is to spare it."""
    device = training.accelerator.device
    if device.type != "cuda" or training.sharded:
        return 0
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(ROOM * (torch.cuda.mem_get_info(device)[0] + held))


def of_picture(training: Training, item: Item) -> int:
    """Bytes that the student's losses on one picture keep for their gradients."""
    objective, config = training.objective, training.config
    start = Start(item.z, objective.view.levels.grid(4, tokens=objective.tokens(item.z)), config.stages[-1].guidance[0])

    def losses() -> Any:
        picture = objective.predict(training.cast(training.plain), start, item)
        apart = objective.distance(picture, item.z, item, start)
        if not any(stage.adversarial for stage in config.stages):
            return apart
        told = objective.told(item, start.guidance)
        return apart, objective.seen(picture, objective.levels_at([500.0], picture), told)

    parts = (part for part in training.actors.pipe.components.values() if isinstance(part, nn.Module))
    # As it would be for all pictures at once, and compiled for no batch of one.
    with torch.compiler.set_stance("force_eager"):
        return kept(losses, but=(training.plain, *parts))


def kept(call: Callable[[], Any], *, but: Iterable[nn.Module]) -> int:
    """Bytes that `call` keeps for a backward pass, beside the weights of the modules `but`."""
    weights = {one.untyped_storage().data_ptr() for part in but for one in (*part.parameters(), *part.buffers())}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # Held until all is counted: no two of its tensors then lie in one place.
        made = call()
    total = sum(found.values())
    del made
    return total
