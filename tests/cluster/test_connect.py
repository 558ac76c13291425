"""A cluster of one's own is closed to everything else."""

import json
import os
import subprocess
import sys


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
