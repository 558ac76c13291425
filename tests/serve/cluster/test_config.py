"""The example for Kubernetes says what the application takes, and what is wrong in a plan is named."""

import re
from pathlib import Path

import pytest
import yaml

from vivace.errors import InputError
from vivace.serve.cluster import leave
from vivace.serve.cluster.run import check_room
from vivace.serve.plan import Plan, read_plan

EXAMPLE = Path(__file__).parents[3] / "docs" / "rayservice.yaml"


@pytest.fixture
def example():
    return yaml.safe_load(EXAMPLE.read_text())["spec"]


def test_the_example_is_a_serve_config_for_our_application(example, monkeypatch):
    from ray.serve.schema import ServeDeploySchema

    from vivace.serve.cluster import app

    config = ServeDeploySchema.model_validate(yaml.safe_load(example["serveConfigV2"]))
    (found,) = config.applications
    module, _, name = found.import_path.partition(":")
    assert (module, getattr(app, name)) == (app.__name__, app.build)
    assert found.name == app.NAME
    assert config.http_options.host == found.args["host"]
    # The folder of its model is not on this machine.
    args = found.args | {"models": {"builtin": "builtin"}, "folder": None}
    monkeypatch.delenv("VIVACE_API_KEY", raising=False)
    with pytest.raises(InputError, match="--api-key"):
        app.build(args)
    monkeypatch.setenv("VIVACE_API_KEY", "a-key-of-the-tests-alone")
    made = app.build(args)
    door = made._bound_deployment
    assert door.name == "Door"
    assert door.ray_actor_options["resources"] == {"node:__internal_head__": 0.001}
    replicas = door.init_args[0]._bound_deployment
    # A constructor would be too late: diffusers looks when it is imported.
    for one in (door, replicas):
        assert one.ray_actor_options["runtime_env"]["env_vars"]["DIFFUSERS_DISABLE_REMOTE_CODE"] == "1"


def test_the_examples_machines_have_what_a_replica_asks_for(example):
    plan = read_plan(yaml.safe_load(example["serveConfigV2"])["applications"][0]["args"])
    cluster = example["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert workers["maxReplicas"] >= plan.most_replicas > plan.replicas
    # Else KubeRay starts `replicas` of them and looks at no limit.
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"] == {"version": "v2"}
    assert example["rayClusterDeletionDelaySeconds"] > plan.drain_seconds
    users = re.findall(r"--uid (\d+)", (EXAMPLE.parents[1] / "docker" / "Dockerfile.cuda").read_text())
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        # The image's user can write the videos, and Kubernetes asks for nothing that the image lacks.
        assert [str(pod["securityContext"][name]) for name in ("runAsUser", "fsGroup")] == users * 2
        last = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert last == ["python", "-m", leave.__name__, f"{plan.drain_seconds:g}"]
        for probe in ("livenessProbe", "readinessProbe"):
            assert pod["containers"][0][probe]["httpGet"]["path"].startswith("/api/")
        assert pod["terminationGracePeriodSeconds"] > plan.drain_seconds
        assert "VIVACE_API_KEY" in [one["name"] for one in pod["containers"][0]["env"]]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert float(limits["nvidia.com/gpu"]) >= plan.gpus
    assert float(limits["cpu"]) >= plan.cpus


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"replica": 2}, "replica: .*there are models"),
        ({"replicas": 4, "max_replicas": 2}, "max_replicas is 2"),
        ({"replicas": 0}, "replicas"),
        ({"models": {}}, "models"),
        ({"api_key": "x"}, "api_key"),
    ],
)
def test_what_is_wrong_in_a_plan_is_named(fields, said):
    with pytest.raises(InputError, match=said):
        read_plan(fields)


MACHINES = ({"CPU": 8.0, "GPU": 2.0}, {"CPU": 2.0})


@pytest.mark.parametrize(
    ("fields", "cards", "said"),
    [
        (
            {"replicas": 3},
            1,
            "3 replicas of 1 processors and 1 GPUs are asked for, and the cluster has room for 2; set",
        ),
        ({"replicas": 1, "max_replicas": 3}, 1, "3 replicas"),
        ({"replicas": 3, "cpus": 4}, 0, "3 replicas of 4 processors are asked for, and the cluster has room for 2;"),
        ({"replicas": 1, "cpus": 9}, 0, "room for 0"),
    ],
)
def test_more_replicas_than_the_cluster_holds_are_refused_unless_it_grows(fields, cards, said, caplog):
    plan = Plan(**fields)
    with pytest.raises(InputError, match=said):
        check_room(plan, MACHINES, cards=cards, grows=False)
    check_room(plan, MACHINES, cards=cards, grows=True)
    assert "has to grow first" in caplog.text
    check_room(Plan(replicas=2, cpus=2), MACHINES, cards=cards, grows=False)


def test_a_plan_is_the_same_after_it_was_sent():
    plan = Plan(models={"a": "builtin"}, allowed_hosts=("x",), replicas=2)
    assert read_plan(plan.model_dump()) == plan
