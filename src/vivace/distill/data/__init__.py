"""Training data: every kind is an endless iterator with `state()` and `load(state)`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vivace.errors import InputError

if TYPE_CHECKING:
    from vivace.distill.config import DistillConfig
    from vivace.distill.data.sample import Batch
    from vivace.distill.data.stream import Source
    from vivace.distill.objective import Item


class Supply(Protocol):
    """An endless supply of batches, or of items that are ready."""

    def __next__(self) -> Batch | Item: ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: Mapping[str, Any]) -> None: ...


def source_of(config: DistillConfig) -> Source | None:
    """Where samples lie, for data that are samples. Raises InputError where nothing is.

    To be called before a teacher is loaded, which may have to be fetched first.
    """
    data = config.data
    path = data.path or ""
    if data.kind == "builtin" and config.size[0] != config.size[1]:
        raise InputError(f"size is {list(config.size)}; data of kind builtin are squares, such as [256, 256]")
    if data.kind == "cached" and not any(Path(path).expanduser().glob("*.safetensors")):
        raise InputError(f"{path} holds no batches; write some with vivace distill --precache")
    if data.kind == "folder":
        from vivace.distill.data.folder import Folder

        return Folder(path)
    if data.kind == "shards":
        from vivace.distill.data.shards import Shards

        return Shards(path, cache=Path(data.cache or Path(config.output) / "shards").expanduser())
    return None


def supply_of(
    config: DistillConfig,
    *,
    multiple: int,
    source: Source | None = None,
    rank: int = 0,
    world: int = 1,
    device: str = "cpu",
) -> Supply:
    """The data that `config` names, for one of `world` processes; `source` is what `source_of` gave.

    Raises InputError where it is not there.
    """
    data = config.data
    source = source or source_of(config)
    if data.kind == "builtin":
        from vivace.distill.data.world import World

        return World(batch=config.batch, seed=config.seed, rank=rank, side=config.size[0], device=device)
    if data.kind == "cached":
        from vivace.distill.data.cached import Cached, made_of

        made = made_of(config, device=device.partition(":")[0])
        return Cached(
            data.path or "", batch=config.batch, seed=config.seed, rank=rank, world=world, device=device, made=made
        )
    from vivace.distill.conditioners import picture_key
    from vivace.distill.data.stream import Stream

    assert source is not None
    sizes = sizes_of(config, multiple=multiple)
    needs = filter(None, map(picture_key, config.conditioners))
    return Stream(source, data, sizes=sizes, batch=config.batch, seed=config.seed, rank=rank, world=world, needs=needs)


def sizes_of(config: DistillConfig, *, multiple: int) -> list[tuple[int, int]]:
    """Every width and height in pixels that batches of the config's data can have."""
    from vivace.distill.data.sample import bucket_sizes

    if config.data.ratios:
        return bucket_sizes(config.size, config.data.ratios, multiple=multiple)
    return [config.size]
