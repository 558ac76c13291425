"""A cluster of one's own is closed to everything else."""

import json
import os
import re
import socket
import subprocess
import sys

import pytest

from vivace.cluster.connect import connect, reach
from vivace.errors import InputError


def test_a_cluster_of_ones_own_listens_on_this_machine_only(cluster):
    import psutil
    import ray

    assert {node["NodeManagerAddress"] for node in ray.nodes()} == {"127.0.0.1"}
    mine = [psutil.Process(), *psutil.Process().children(recursive=True)]
    ours = {process.pid for process in mine if "ray" in " ".join(process.cmdline()) or process.pid == os.getpid()}
    listening = [one for one in psutil.net_connections("inet") if one.status == psutil.CONN_LISTEN and one.pid in ours]
    assert listening
    assert {one.laddr.ip for one in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_who_imported_ray_first_is_told():
    code = "import ray\nfrom vivace.cluster.connect import connect\nwith connect(): pass"
    free = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=free)
    assert done.returncode == 1
    assert "InputError: Ray was imported before" in done.stderr


def test_what_is_missing_is_named():
    code = "import sys; sys.modules['ray'] = None\nfrom vivace.cluster.connect import connect\nwith connect(): pass"
    free = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=free)
    assert "pip install -c constraints.txt -e '.[ray]'" in done.stderr


def test_the_dashboard_is_for_who_has_the_token():
    code = """
import json, urllib.error, urllib.request
from vivace.cluster.connect import connect, token

def ask(url, **headers):
    try:
        return urllib.request.urlopen(urllib.request.Request(f"{url}/api/version", headers=headers), timeout=60).status
    except urllib.error.HTTPError as error:
        return error.code

with connect(cpus=1, store_bytes=100 * 2**20, dashboard=True) as url:
    told = token()
    print(json.dumps([url, [*told], ask(url), ask(url, Authorization=f"Bearer {told.get('token')}")]))
"""
    free = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    home = {"HOME": "/nowhere"}  # where no token of the user's is
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, env=free | home)
    assert done.returncode == 0, done.stderr
    url, told, without, within = json.loads(done.stdout.strip().splitlines()[-1])
    assert url.startswith("http://127.0.0.1:")
    assert (told, without, within) == (["token"], 401, 200)


@pytest.mark.parametrize("place", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "[::1]:{port}", "127.0.0.1:99999"])
def test_an_address_where_nobody_listens_is_an_error_at_once(place):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = place.format(port=taken.getsockname()[1])
        with pytest.raises(InputError, match=rf"no Ray cluster at {re.escape(address)}: .+; give the address"):
            reach(address)


def test_an_address_is_tried_before_ray_is(cluster, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "init", lambda **given: pytest.fail("it would go on asking for a quarter of an hour"))
    with pytest.raises(InputError, match="no Ray cluster at"), connect("127.0.0.1:99999"):
        pass


JOIN = """
import os, ray
from vivace.cluster.connect import connect
ray.util.get_node_ip_address = lambda: "192.0.2.1"  # as if it were on a network, which no test is to open it to
with connect(os.environ["CLUSTER"]):
    print("joined")
"""
OPEN = f"""
import os, subprocess, sys
from vivace.cluster.connect import connect
with connect(cpus=1, store_bytes=100 * 2**20):
    import ray
    os.environ["CLUSTER"] = ray.get_runtime_context().gcs_address
    # What the one who joins has is nothing to a cluster that asks for nothing.
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)
    sys.exit(subprocess.run([sys.executable, "-c", {JOIN!r}]).returncode)
"""


def test_who_joins_a_cluster_that_is_open_to_its_network_is_warned():
    free = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env = free | {"RAY_AUTH_MODE": "disabled"}
    done = subprocess.run([sys.executable, "-c", OPEN], capture_output=True, text=True, timeout=240, env=env)
    assert done.stdout.strip().endswith("joined"), done.stderr
    assert "asks for no token: whoever reaches 192.0.2.1 runs code on it" in done.stderr
    for export in ("RAY_USAGE_STATS_ENABLED=0", "RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN_PATH=~/.ray/auth_token"):
        assert export in done.stderr


def test_who_joins_a_cluster_that_asks_for_its_token_is_not(cluster):
    import ray

    env = {**os.environ, "CLUSTER": ray.get_runtime_context().gcs_address}
    done = subprocess.run([sys.executable, "-c", JOIN], capture_output=True, text=True, timeout=240, env=env)
    assert done.stdout.strip().endswith("joined"), done.stderr
    assert "token" not in done.stderr
