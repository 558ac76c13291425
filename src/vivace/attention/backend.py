"""`Backend`: one attention function, what it needs, and why it may refuse."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from vivace.errors import InputError


class Attend(Protocol):
    """softmax(q k^T * scale + mask) v, with q, k, v and the result `[B, S, H, D]`.

    `mask` is None, boolean (True takes part) or additive, and broadcasts to `[B, H, Sq, Sk]`. `scale` is 1/sqrt(D)
    where None.
    """

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One attention function and what it declares about itself."""

    name: str
    attend: Attend
    devices: frozenset[str] = frozenset({"cuda"})
    dtypes: frozenset[torch.dtype] = frozenset({torch.float16, torch.bfloat16})
    since: tuple[int, int] | None = None  # the lowest compute capability of a GPU that can run it
    exact: bool = True  # to the last digits of 16 bit; others may leave a request's first and last steps to native
    dense_share: float = 0.0  # of a request's steps, at its beginning, that are native's in any case
    leaves: str = ""  # which calls it hands to native, for the report
    masks: bool = False  # takes a mask
    depth: int | None = None  # the largest head it takes
    asks_where: bool = False  # needs to know which layer computes, and where in space and time its tokens lie
    returns_lse: bool = False  # can give the log-sum-exp, which a ring over several GPUs needs
    package: str | None = None  # the module that must be installed
    install: str = ""  # what to type to install it

    def refuses(self, *, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this backend cannot run on that device and dtype, and what to do; None when it can."""
        if device.type not in self.devices:
            return f"it runs on {_listed(self.devices)}, not on {device.type}; use attention='native'"
        have = torch.cuda.get_device_capability(device) if self.since and device.type == "cuda" else None
        if self.since and have and have < self.since:
            wanted, got = (".".join(map(str, sm)) for sm in (self.since, have))
            return f"it needs a GPU of compute capability {wanted} or newer, this one has {got}; use attention='native'"
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"the package {self.package} is not installed; {self.install}"
        if dtype not in self.dtypes:
            wanted = _listed(str(d).removeprefix("torch.") for d in self.dtypes)
            return f"it takes {wanted}, not {str(dtype).removeprefix('torch.')}; use one or attention='native'"
        return None


def within_bounds(backend: Backend) -> Attend:
    """`backend.attend` for one that takes no mask or no large heads, which says so where it is given one."""

    def attend(q, k, v, *, mask=None, scale=None):
        if mask is not None and not backend.masks:
            raise cannot(backend, "a mask", q.shape)
        if backend.depth is not None and q.shape[-1] > backend.depth:
            raise cannot(backend, f"heads larger than {backend.depth}", q.shape)
        return backend.attend(q, k, v, mask=mask, scale=scale)

    return attend


def cannot(backend: Backend, what: str, shape: Sequence[int]) -> InputError:
    """The error for a call that asks for `what`, with q of `shape`."""
    return InputError(
        f"attention={backend.name!r} cannot do a call of this model: it asks for {what} at {tuple(shape)}; "
        "use attention='native'"
    )


def _listed(names) -> str:
    return " or ".join(sorted(names))
