"""The cache section of cache-dit's YAML files, as its examples write them."""

import pytest

import vivace
from vivace import InputError
from vivace.cache import DiCache, FirstBlock, Steps, parse

DBCACHE = """
cache_config:
  max_warmup_steps: 8
  warmup_interval: 2
  max_cached_steps: -1
  max_continuous_cached_steps: 2
  Fn_compute_blocks: 1
  Bn_compute_blocks: 0
  residual_diff_threshold: 0.12
  enable_taylorseer: true
  taylorseer_order: 1
"""


def write(tmp_path, text):
    path = tmp_path / "cache.yaml"
    path.write_text(text)
    return str(path)


def test_dbcache_is_firstblock(tmp_path):
    path = write(tmp_path, DBCACHE)
    policy = FirstBlock(threshold=0.12, depth=1, warmup=8, warmup_every=2, max_skips=2, order=1)
    assert parse(path) == policy
    assert vivace.Config(cache=path).cache == policy


def test_what_is_left_out_is_cache_dits_default(tmp_path):
    policy = FirstBlock(threshold=0.08, depth=8, warmup=8)
    assert parse(write(tmp_path, "cache_config: {}")) == policy
    assert parse(write(tmp_path, "enable_taylorseer: false\ntaylorseer_order: 2")) == policy
    assert parse(write(tmp_path, "taylorseer_order: 2")) == policy, "an order alone turns no calibrator on"
    assert parse(write(tmp_path, "cache_type: FBCache")) == FirstBlock(threshold=0.08, warmup=8)


def test_a_flat_file_and_other_types(tmp_path):
    flat = "residual_diff_threshold: 0.2\nFn_compute_blocks: 4\nmax_warmup_steps: 0"
    assert parse(write(tmp_path, flat)) == FirstBlock(threshold=0.2, depth=4)
    dicache = "cache_type: DiCache\nresidual_diff_threshold: 0.3\nmax_warmup_steps: 2"
    assert parse(write(tmp_path, dicache)) == DiCache(threshold=0.3, warmup=2)
    mask = "cache_config:\n  steps_computation_mask: [1, 1, 0, 1]\n  steps_computation_policy: static"
    assert parse(write(tmp_path, mask)) == Steps(compute="1101")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("warmup_interval: 0", "warmup_every is a whole number from 1 on, got 0"),
        ("max_cached_steps: 5", "max_cached_steps=5 has no counterpart"),
        ("cache_config:\n  residual_dif_threshold: 0.1", "nearest is 'residual_diff_threshold'"),
        ("cache_config:\n  Bn_compute_blocks: 8", "Bn_compute_blocks=8 has no counterpart"),
        ("steps_computation_mask: [1, 0, 1]", "steps_computation_policy: static"),
        ("cache_config:\n  cache_type: PruneX", "DBCache, FBCache and DiCache have"),
        ("taylorseer_order: x", "taylorseer_order is a whole number from 0 on, got 'x'"),
        ("max_warmup_steps: null", "max_warmup_steps is a whole number from 0 on, got None"),
        ("steps_computation_policy: static\nsteps_computation_mask: [1, x]", "a list of 0 and 1"),
        ("steps_computation_policy: static\nsteps_computation_mask: 5", "a list of 0 and 1"),
        ("steps_computation_policy: static\nsteps_computation_mask: [1, 0]", "at least three"),
        ("enable_calibrator: true\ncalibrator_type: foca", "calibrator_type='foca' has no counterpart"),
        ("enable_taylorseer: true\ntaylorseer_cache_type: hidden_states", "only value that has is 'residual'"),
        ("enable_dmd: true", "enable_dmd=True has no counterpart"),
        ("steps_computation_policy: static", "only together, got steps_computation_policy: static"),
        ("max_warmup_steps: -3", "a whole number from 0 on, got -3"),
        ("enable_taylorseer: 'no'", "enable_taylorseer is true or false, got 'no'"),
        ("cache_type: DiCache\nenable_taylorseer: true", "enable_taylorseer has no counterpart with .*'DiCache'"),
        ("max_accumulated_residual_diff_threshold: 0.5", "=0.5 has no counterpart here; the only value .* is None"),
        ("Fn_compute_blocks: many", "depth is a whole number"),
        ("- 1\n- 2", "holds no mapping"),
        ("a: [", "is not YAML"),
    ],
)
def test_what_we_cannot_do_is_said(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        parse(write(tmp_path, text))


def test_what_changes_nothing_here_is_taken(tmp_path):
    more = "  enable_encoder_taylorseer: true\n  calibrator_cache_type: residual\n  enable_separate_cfg: true\n"
    assert parse(write(tmp_path, DBCACHE + more)) == parse(write(tmp_path, DBCACHE))


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "cache.yaml"
    path.write_bytes(b"cache_type: \xff\xfe")
    with pytest.raises(InputError, match="is not YAML"):
        parse(str(path))


def test_a_missing_file():
    with pytest.raises(InputError, match="cannot read"):
        parse("none/cache.yaml")
