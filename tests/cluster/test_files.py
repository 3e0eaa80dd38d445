"""The files of cluster/ are right by the schemas of those who will read them, offline: Ray's launcher, EC2, Compute Engine, KubeRay, Serve.

What a schema does not know is refused, and a typo put into each file shows that it is.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator
from pydantic import BaseModel
from ray.autoscaler._private.util import validate_config
from ray.autoscaler.sdk import fillout_defaults
from ray.scripts.scripts import drain_node
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import RayActorOptionsSchema, ServeDeploySchema

from retrikt_ray.config import RunConfig, parse
from retrikt_ray.runtime import cluster
from retrikt_ray.runtime.nodes import ClusterConfig, Node, NodeConfig, Nodes, launched
from retrikt_ray.runtime.settings import Scaled
from retrikt_ray.serving.app import build_app
from retrikt_ray.serving.args import parse_args

REPO = Path(__file__).resolve().parents[2]
FILES = REPO / "cluster"
LAUNCHERS = ["aws.yaml", "gcp.yaml"]
KUBERAY = ["raycluster.yaml", "rayjob.yaml", "rayservice.yaml"]
SCHEMAS = json.loads((Path(__file__).parent / "kuberay.json").read_text())
INSTANCE = json.loads((Path(__file__).parent / "gcp_instance.json").read_text())


def read(name: str) -> Any:
    folder = FILES / "kuberay" if name in (*KUBERAY, "redis.yaml") else FILES
    return yaml.safe_load((folder / name).read_text())


def put(config: Any, path: str, value: Any) -> Any:
    """A copy with one more key, or another value: `path` like "a.0.b"."""
    changed = copy.deepcopy(config)
    *parents, leaf = path.split(".")
    inner = changed
    for key in parents:
        inner = inner[int(key) if key.isdigit() else key]
    inner[leaf] = value
    return changed


# -- `ray up` -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_files_are_right_by_rays_own_schema(name: str) -> None:
    validate_config(fillout_defaults(read(name)))


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("idle_timeout_minuts", 5),
        ("docker.imag", "x"),
        ("auth.shs_user", "ubuntu"),
        ("available_node_types.gpu.resources.GPU", "one"),
        ("available_node_types.gpu.max_workers", "many"),
        ("setup_commands", "one string"),
    ],
)
def test_a_wrong_key_of_a_launcher_file_is_refused(name: str, path: str, value: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validate_config(fillout_defaults(put(read(name), path, value)))


@cache
def run_instances() -> Any:
    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def of_ec2(node_config: dict[str, Any]) -> str:
    """What EC2 would find wrong with a node, or nothing."""
    shape = run_instances()
    return str(ParamValidator().validate(node_config | {"MinCount": 1, "MaxCount": 1}, shape).generate_report())


def test_aws_nodes_are_what_ec2_takes() -> None:
    for kind in read("aws.yaml")["available_node_types"].values():
        assert of_ec2(kind["node_config"]) == ""
    gpu = read("aws.yaml")["available_node_types"]["gpu"]["node_config"]
    for path in ("InstanceTyp", "InstanceMarketOptions.SpotOption", "BlockDeviceMappings.0.Ebs.Size", "IamInstanceProfile.Nam"):
        assert "Unknown parameter" in of_ec2(put(gpu, path, "x"))
    assert "Invalid type" in of_ec2(put(gpu, "BlockDeviceMappings.0.Ebs.VolumeSize", "large"))


def test_gcp_nodes_are_what_compute_engine_takes() -> None:
    for kind in read("gcp.yaml")["available_node_types"].values():
        jsonschema.validate(kind["node_config"], INSTANCE)
    gpu = read("gcp.yaml")["available_node_types"]["gpu"]["node_config"]
    for path in ("machinType", "scheduling.spot", "disks.0.initializeParams.size", "serviceAccounts.0.scope"):
        with pytest.raises(jsonschema.ValidationError, match="Additional properties"):
            jsonschema.validate(put(gpu, path, "x"), INSTANCE)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(put(gpu, "scheduling.provisioningModel", "CHEAP"), INSTANCE)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launched_clusters_are_as_the_text_says(name: str) -> None:
    """A head on demand that does no work; GPU nodes from none, on the spot market; nodes know the token; the head finds the launcher's file."""
    config = read(name)
    head, gpu = (config["available_node_types"][kind] for kind in ("head", "gpu"))
    assert config["head_node_type"] == "head" and head["resources"] == {"CPU": 0}
    assert gpu["min_workers"] == 0 and gpu["resources"]["GPU"] == 1
    assert "spot" in yaml.safe_dump(gpu).lower() and "spot" not in yaml.safe_dump(head).lower()
    start = config["head_start_ray_commands"][-1]
    assert all(part in start for part in ("RAY_AUTH_MODE=token", "--num-cpus=0", "--autoscaling-config=~/ray_bootstrap_config.yaml"))
    _, join, notice = config["worker_start_ray_commands"]
    assert "RAY_AUTH_MODE=token ray start" in join and "~/.ray/auth_token" in config["file_mounts"]
    assert f"~/retrikt_ray/cluster/notice.py {name.removesuffix('.yaml')}" in notice and "RAY_AUTH_MODE=token" in notice
    assert config["max_workers"] >= sum(kind.get("max_workers", 0) for kind in config["available_node_types"].values())


# -- KubeRay ------------------------------------------------------------------------------------------------------------


def against(schema: dict[str, Any]) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({"$defs": SCHEMAS["$defs"], **schema})


def check(config: dict[str, Any]) -> None:
    against(SCHEMAS[config["kind"]]).validate(config)


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_files_are_right_by_its_definitions(name: str) -> None:
    config = read(name)
    assert config["apiVersion"] == "ray.io/v1"
    check(config)


CLUSTER_IN = {"raycluster.yaml": "spec", "rayjob.yaml": "spec.rayClusterSpec", "rayservice.yaml": "spec.rayClusterConfig"}


def cluster_in(name: str) -> Any:
    inner = read(name)
    for key in CLUSTER_IN[name].split("."):
        inner = inner[key]
    return inner


@pytest.mark.parametrize("name", KUBERAY)
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("enableInTreeAutoscalin", True),
        ("autoscalerOptions.version", "v3"),
        ("authOptions.mode", "password"),
        ("headGroupSpec.rayStartParams.num-cpus", 0),  # must be a string
        ("workerGroupSpecs.0.maxReplica", 4),
        ("workerGroupSpecs.0.template.spec.toleration", []),
        ("workerGroupSpecs.0.template.spec.containers.0.resource", {}),
        ("workerGroupSpecs.0.template.spec.volumes.0.emptyDir.medum", "Memory"),
        ("workerGroupSpecs.0.template.spec.containers.0.resources.limits", {"memory": "4 GB"}),
    ],
)
def test_a_wrong_key_of_a_kuberay_file_is_refused(name: str, path: str, value: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        check(put(read(name), f"{CLUSTER_IN[name]}.{path}", value))


@pytest.mark.parametrize(("name", "key"), [("rayjob.yaml", "backofLimit"), ("rayservice.yaml", "serveConfig")])
def test_a_wrong_key_around_the_cluster_is_refused(name: str, key: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match="Additional properties"):
        check(put(read(name), f"spec.{key}", "x"))


def test_redis_is_a_pod_that_kubernetes_takes() -> None:
    _, redis = yaml.safe_load_all((FILES / "kuberay" / "redis.yaml").read_text())
    pod: Any = SCHEMAS["RayCluster"]
    for key in ("spec", "headGroupSpec", "template"):
        pod = pod["properties"][key]
        pod = SCHEMAS["$defs"][pod["$ref"].rpartition("/")[2]] if "$ref" in pod else pod
    against(pod).validate(redis["spec"]["template"])
    with pytest.raises(jsonschema.ValidationError, match="'arg' was unexpected"):
        against(pod).validate(put(redis["spec"]["template"], "spec.containers.0.arg", []))


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_clusters_are_as_the_text_says(name: str) -> None:
    found = cluster_in(name)
    assert found["enableInTreeAutoscaling"] and found["autoscalerOptions"]["version"] == "v2" and found["authOptions"]["mode"] == "token"
    assert found["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in (found["headGroupSpec"], *found["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"] and pod["volumes"][0]["emptyDir"]["medium"] == "Memory"
        if "nvidia.com/gpu" in container["resources"]["limits"]:
            assert any(t["key"] == "nvidia.com/gpu" for t in pod["tolerations"]) and container["image"].endswith(":cuda")
            told = shlex.split(container["lifecycle"]["preStop"]["exec"]["command"][-1].split(";")[0])
            assert told[::2][:2] == ["timeout", "ray"] and told[3] == "drain-node"
            drain_node.make_context("drain-node", told[4:])  # raises what click says to an option that there is not


def test_the_service_survives_its_head_and_serves_the_config_of_serve() -> None:
    service = read("rayservice.yaml")["spec"]
    assert service["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisAddress"] == "redis:6379"
    text = (REPO / "serve" / "cluster.yaml").read_text()
    assert yaml.safe_load(service["serveConfigV2"]) == yaml.safe_load(text)


# -- Serve --------------------------------------------------------------------------------------------------------------


def unknown_keys(value: Any, schema: Any, path: str = "") -> list[str]:
    """Keys of the YAML that Serve would ignore in silence; `schema` is the parsed model."""
    if isinstance(value, list):
        return [k for i, (v, s) in enumerate(zip(value, schema, strict=True)) for k in unknown_keys(v, s, f"{path}[{i}]")]
    if not isinstance(value, dict):
        return []
    if path.endswith(".autoscaling_config"):
        schema = AutoscalingConfig.model_validate(value)
    if path.endswith(".ray_actor_options"):
        schema = RayActorOptionsSchema.model_validate(value)
    if not isinstance(schema, BaseModel):
        return []
    known = type(schema).model_fields
    wrong = [f"{path}.{k}" for k in value if k not in known]
    return wrong + [k for name, v in value.items() if name in known for k in unknown_keys(v, getattr(schema, name), f"{path}.{name}")]


def test_the_serve_config_of_clusters_has_only_keys_that_serve_and_the_app_know(monkeypatch: pytest.MonkeyPatch) -> None:
    for pod in (cluster_in("rayservice.yaml")["headGroupSpec"], *cluster_in("rayservice.yaml")["workerGroupSpecs"]):
        for variable in pod["template"]["spec"]["containers"][0]["env"]:
            monkeypatch.setenv(variable["name"], f"a-key-from-{variable['valueFrom']['secretKeyRef']['name']}-{variable['name']}")
    config = yaml.safe_load((REPO / "serve" / "cluster.yaml").read_text())
    assert unknown_keys(config, ServeDeploySchema.model_validate(config)) == []
    assert config["proxy_location"] == "EveryNode" and config["http_options"]["host"] == "0.0.0.0"
    (app,) = config["applications"]
    assert app["import_path"] == f"{build_app.__module__}:{build_app.__name__}" and parse_args(app["args"]).run == "s3://BUCKET/run"
    (deployment,) = app["deployments"]
    assert build_app(app["args"] | {"run": "/nowhere"})._bound_deployment.name == deployment["name"]
    for path in (
        "http_options.hots",
        "applications.0.deployments.0.num_replica",
        "applications.0.deployments.0.autoscaling_config.max_replica",
    ):
        typo = put(config, path, 1)
        assert len(unknown_keys(typo, ServeDeploySchema.model_validate(typo))) == 1, path


# -- what they say to each other ----------------------------------------------------------------------------------------


def kinds(name: str) -> tuple[NodeConfig, ...]:
    """What nodes a run on this cluster may count on."""
    if name in LAUNCHERS:
        return launched(FILES / name)
    found = []
    for group in cluster_in(name)["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        found.append(NodeConfig(cpu=limits["cpu"], gpu=limits.get("nvidia.com/gpu", 0), max=group["maxReplicas"]))
    return tuple(found)


@pytest.mark.parametrize("name", [*LAUNCHERS, "raycluster.yaml", "rayjob.yaml"])
def test_every_stage_finds_room(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a head without CPUs and nothing else, with the config as it comes."""
    monkeypatch.setattr(cluster, "nodes", lambda: Nodes.of([Node(0, 0)], ClusterConfig(nodes=kinds(name))))
    config = RunConfig()
    planned = {
        stage: cluster.plan(section, stage) for stage in RunConfig.model_fields if isinstance(section := getattr(config, stage), Scaled)
    }
    assert planned["generate"].gpus == 1 and (planned["generate"].fewest, planned["generate"].count) == (1, 16)


def test_the_job_tells_the_run_what_its_cluster_can_become() -> None:
    words = shlex.split(read("rayjob.yaml")["spec"]["entrypoint"])
    assert words[:2] == ["retrikt", "run"]
    assert parse("", "entrypoint", [word for word in words if word.startswith("cluster.")]).cluster.nodes == kinds("rayjob.yaml")
    readme = (FILES / "README.md").read_text()
    assert [word for word in words if word.startswith("cluster.nodes=")][0] in readme


def test_versions_are_those_of_the_constraints() -> None:
    version = re.findall(r"^ray==(.*)$", (REPO / "constraints.txt").read_text(), re.M)[0]
    assert f"ARG RAY={version}\n" in (FILES / "Dockerfile").read_text()
    assert {cluster_in(name)["rayVersion"] for name in KUBERAY} == {version}


def test_the_image_has_what_it_copies_and_the_workflow_builds_it() -> None:
    text = (FILES / "Dockerfile").read_text()
    sent = [line.removeprefix("!") for line in (REPO / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for line in re.findall(r"^COPY (.*)$", text, re.M):
        *sources, _ = [word for word in line.split() if not word.startswith("--")]
        assert all((REPO / source).exists() and source in sent for source in sources), line
    workflow = yaml.safe_load((REPO / ".github" / "workflows" / "image.yml").read_text())["jobs"]["build"]
    build = next(step["with"] for step in workflow["steps"] if "build-push" in step.get("uses", ""))
    assert build["file"] == "cluster/Dockerfile" and re.search(rf"^ARG {build['build-args'].partition('=')[0]}=", text, re.M)
    tags = {image.rpartition(":")[2] for image in re.findall(r"ghcr.io/OWNER/retrikt-ray:\w+", (FILES / "aws.yaml").read_text())}
    assert {case["variant"] for case in workflow["strategy"]["matrix"]["include"]} == tags == {"cpu", "cuda"}


def test_the_readme_names_all_that_has_to_be_filled_in() -> None:
    files = [*FILES.glob("*.yaml"), *FILES.glob("kuberay/*.yaml"), REPO / "serve" / "cluster.yaml"]
    found = {word for file in files for word in re.findall(r"\b(?:OWNER|PROJECT|BUCKET|REGION|ACCOUNT|TOKEN|IMAGE)\b", file.read_text())}
    assert found == {"OWNER", "PROJECT", "BUCKET"}
    step = re.search(r"sed -i .*", (FILES / "README.md").read_text())
    assert step and all(word in step.group() for word in found)
