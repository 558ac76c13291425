"""What is free on the host."""

import pytest

from vivace.memory.pinned import available

GIB = 2**30
NEW = {"memory.max": f"{8 * GIB}", "memory.current": f"{3 * GIB}", "memory.stat": f"anon 7\ninactive_file {GIB}"}
OLD = {
    "memory.limit_in_bytes": f"{8 * GIB}",
    "memory.usage_in_bytes": f"{3 * GIB}",
    "memory.stat": f"total_inactive_file {GIB}",
}


def machine(root, *, own: str, groups: dict[str, dict[str, str]]):
    files = {"proc/meminfo": f"MemTotal: {99 << 20} kB\nMemAvailable: {64 << 20} kB\nHugePages_Total: 0"}
    files["proc/self/cgroup"] = own
    files |= {f"sys/fs/cgroup/{group}/{name}": text for group, held in groups.items() for name, text in held.items()}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("own", "groups"),
    [
        ("0::/", {".": NEW}),
        ("0::/a.slice/b.service", {"a.slice": NEW, "a.slice/b.service": NEW | {"memory.max": "max"}}),
        ("0::/outside/of/the/container", {".": NEW}),
        ("5:cpu:/\n4:memory:/x\n0::/", {"memory/x": OLD}),
    ],
)
def test_a_container_has_no_more_than_it_was_given(tmp_path, own, groups):
    assert available(machine(tmp_path, own=own, groups=groups)) == 6 * GIB


@pytest.mark.parametrize(
    ("own", "group"),
    [
        ("0::/", {".": NEW | {"memory.max": "max"}}),
        ("4:memory:/", {"memory": OLD | {"memory.limit_in_bytes": "9223372036854771712"}}),
        ("0::/", {}),
    ],
)
def test_without_a_limit_it_is_the_machines(tmp_path, own, group):
    assert available(machine(tmp_path, own=own, groups=group)) == 64 * GIB


def test_where_the_system_does_not_say(tmp_path):
    assert available(tmp_path) is None
