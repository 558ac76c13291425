"""The schedulers that few-step students are sampled with."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler

OTHER_GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")  # than students are trained on


class FewStepFlow(FlowMatchEulerDiscreteScheduler):
    """Stochastic Euler for flow models, on the few-step grid and reproducible.

    Each step goes to the predicted picture and back up: x' = (1 - sigma') x0 + sigma' n. Two things differ from stock
    FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), whose configuration this one has. The steps are 1, 3/4,
    1/2, 1/4 of the path (shifted as the configuration says) and not 1, 2/3, 1/3, 0.001. And n follows from the noise
    that the sample began with, once for every picture: SD3's and FLUX's pipelines hand their generator to no scheduler,
    so that a seed would not name a picture, nor a picture be the same in another batch.
    """

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """As stock, whose parameters pipelines look for by name; without `sigmas` or `timesteps` the few-step grid."""
        if num_inference_steps is not None and sigmas is None and timesteps is None:
            sigmas = [1 - step / num_inference_steps for step in range(num_inference_steps)]
        self._generators: list[torch.Generator] | None = None
        super().set_timesteps(num_inference_steps, device=device, sigmas=sigmas, mu=mu, timesteps=timesteps)

    def step(
        self, model_output: Any, timestep: Any, sample: Any, *args: Any, generator: Any = None, **kwargs: Any
    ) -> Any:
        """As stock, with the sample's own noise where no generator is given."""
        if generator is None:
            if self._generators is None:
                self._generators = [_generator_of(one) for one in sample]
            generator = self._generators
        return super().step(model_output, timestep, sample, *args, generator=generator, **kwargs)


def _generator_of(noise: torch.Tensor) -> torch.Generator:
    """A generator that the first values of `noise` seed."""
    values = noise.flatten()[:256].to("cpu", torch.float32).numpy()
    seed = int.from_bytes(hashlib.sha256(values.tobytes()).digest()[:7], "little")
    return torch.Generator().manual_seed(seed)


def few_step_scheduler(scheduler: Any) -> Any:
    """The few-step scheduler for the noise schedule of `scheduler`: LCM's, or `FewStepFlow` for a flow model."""
    config = scheduler.config
    known = isinstance(scheduler, FewStepFlow) or type(scheduler).__name__.startswith("FlowMatch")
    if known or config.get("prediction_type") == "flow_prediction":
        own = {"stochastic_sampling": True, **dict.fromkeys(OTHER_GRIDS, False)}
        # A solver of another name, run on flow sigmas, calls the shift otherwise.
        shift = {} if "shift" in config else {"shift": config.get("flow_shift", 1.0)}
        return FewStepFlow(**{**_shared(config, FewStepFlow), **own, **shift})
    # With every training step as an original step, N steps begin at the same times that a K-step teacher's modes have.
    own = {"original_inference_steps": config["num_train_timesteps"], "clip_sample": False, "thresholding": False}
    return LCMScheduler(**{**_shared(config, LCMScheduler), **own})


def _shared(config: Mapping[str, Any], scheduler: type) -> dict[str, Any]:
    """What of a configuration another scheduler takes, by name.

    Stock's `from_config` has the new class's defaults, its noise included, for all that the old one had by default.
    """
    return {name: config[name] for name in inspect.signature(scheduler).parameters if name in config}


def save_scheduler(scheduler: Any, folder: Path) -> None:
    """Write the few-step scheduler for `scheduler` as a stock class's configuration."""
    made: Any = few_step_scheduler(scheduler)
    if isinstance(made, FewStepFlow):
        made = FlowMatchEulerDiscreteScheduler.from_config(made.config, stochastic_sampling=True)
    made.save_config(folder)
