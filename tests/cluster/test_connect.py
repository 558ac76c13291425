"""A cluster of one's own is closed to everything else."""

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
    assert "pip install 'vivace[ray]'" in done.stderr
