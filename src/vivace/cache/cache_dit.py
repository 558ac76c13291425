"""Reads the cache section of a cache-dit YAML file, so that what people have tuned there runs here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vivace.cache.dicache import DiCache
from vivace.cache.first_block import FirstBlock
from vivace.cache.policy import Policy
from vivace.cache.steps import Steps, is_mask
from vivace.errors import InputError

CALIBRATED = ("enable_taylorseer", "enable_calibrator")
MASK, POLICY = "steps_computation_mask", "steps_computation_policy"
OWN = frozenset({"cache_type", *CALIBRATED, MASK, POLICY})
"""Keys that are read by themselves."""

# Guidance's halves are told apart by the pipeline, a run's steps by its scheduler, and no more than the picture's
# stream is estimated: the last block's text goes nowhere.
IGNORED = frozenset(
    {
        "enable_separate_cfg", "cfg_compute_first", "cfg_diff_compute_separate", "num_inference_steps",
        "enable_encoder_taylorseer", "enable_encoder_calibrator",
    }
)  # fmt: skip

# cache-dit's key -> ours.
FIELDS = {
    "residual_diff_threshold": "threshold",
    "Fn_compute_blocks": "depth",
    "max_warmup_steps": "warmup",
    "warmup_interval": "warmup_every",
    "max_continuous_cached_steps": "max_skips",
    "taylorseer_order": "order",
}
# What cache-dit takes for the keys that a section leaves out.
DEFAULTS = {
    "DBCACHE": {"threshold": 0.08, "depth": 8},
    "FBCACHE": {"threshold": 0.08, "depth": 1},
    "DICACHE": {},
}
WARMUP = 8
# Keys that ask for what we do not do, with the only value that we can take.
NEUTRAL: dict[str, Any] = {
    "Bn_compute_blocks": 0,
    "max_cached_steps": -1,
    "max_accumulated_residual_diff_threshold": None,
    "enable_dmd": False,
    "enable_foca": False,
    "calibrator_type": "taylorseer",
    "calibrator_cache_type": "residual",
    "taylorseer_cache_type": "residual",
}


def read(path: str) -> Policy:
    """The policy that the `cache_config` of a cache-dit YAML file asks for. Raises InputError for what we cannot do."""
    import yaml

    try:
        found = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, Mapping):
        raise InputError(f"{path} holds no mapping; it should have a cache_config section")
    section = found.get("cache_config", found)
    if not isinstance(section, Mapping):
        raise InputError(f"cache_config of {path} is {type(section).__name__}; it should be a mapping of settings")
    return policy_of(section)


def policy_of(section: Mapping[str, Any]) -> Policy:
    """The policy that a cache section stands for. Raises InputError, for an unknown key with the nearest one."""
    known = {*OWN, *IGNORED, *FIELDS, *NEUTRAL}
    for key, value in section.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), sorted(known), n=1, cutoff=0.0)[0]
            raise InputError(f"unknown key {key!r} in a cache-dit section; the nearest is {near!r}")
        if key in NEUTRAL and value not in (None, NEUTRAL[key]):
            raise InputError(f"{key}={value!r} has no counterpart here; the only value that has is {NEUTRAL[key]!r}")
    order = _whole(section, "taylorseer_order", 1)
    asked = [key for key in CALIBRATED if _flag(section, key)]
    order = order if asked else 0
    mask, when = section.get(MASK), section.get(POLICY, "dynamic")
    if when != ("dynamic" if mask is None else "static"):
        raise InputError(f"{MASK} and {POLICY}: static have a counterpart only together, got {POLICY}: {when}")
    if mask is not None:
        digits = "".join(map(str, mask)) if isinstance(mask, list) else str(mask)
        if not is_mask(digits):
            raise InputError(f"{MASK} is a list of 0 and 1, one a step and at least three, got {mask!r}")
        return Steps(compute=digits, order=order)
    kind = str(section.get("cache_type", "DBCache"))
    if kind.upper() not in DEFAULTS:
        raise InputError(f"cache_type={kind!r} has no counterpart here; DBCache, FBCache and DiCache have")
    if kind.upper() == "DICACHE" and asked:
        raise InputError(f"{asked[0]} has no counterpart with cache_type={kind!r}; DBCache and FBCache have one")
    given = {ours: section[theirs] for theirs, ours in FIELDS.items() if theirs in section}
    fields = {**DEFAULTS[kind.upper()], **given, "warmup": max(1, _whole(section, "max_warmup_steps", WARMUP))}
    fields.pop("order", None)
    if fields.get("max_skips") == -1:
        fields.pop("max_skips")
    return DiCache(**fields) if kind.upper() == "DICACHE" else FirstBlock(**fields, order=order)


def _whole(section: Mapping[str, Any], key: str, default: int) -> int:
    value = section.get(key, default)
    if type(value) is not int or value < 0:
        raise InputError(f"{key} is a whole number from 0 on, got {value!r}; for example {key}: {default}")
    return value


def _flag(section: Mapping[str, Any], key: str) -> bool:
    value = section.get(key, False)
    if type(value) is not bool:
        raise InputError(f"{key} is true or false, got {value!r}; for example {key}: true")
    return value
