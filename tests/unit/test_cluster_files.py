"""cluster.yaml and deploy/: as Ray's own validators read them, and in step with the lock file."""

import importlib
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from protopnet.budget import Cluster, Group, Node, pass_plan, training_plan
from protopnet.cli import parse
from protopnet.config import ComputeSettings, RunSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CLUSTERS = [ROOT / "cluster.yaml", DEPLOY / "on-premise.yaml"]
KUBERAY = [DEPLOY / "rayjob.yaml", DEPLOY / "rayservice.yaml"]


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def locked(name: str) -> str:
    """Its version in the lock; the first one where there are several for different machines."""
    lock = (ROOT / "requirements.lock").read_text()
    return re.findall(rf"^{re.escape(name)}==([^\s;]+)", lock, re.MULTILINE)[0]


# ------------------------------------------------------------------------------------------- ray up


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
class TestRayUp:
    def test_ray_accepts_it(self, path: Path) -> None:
        config = prepare_config(load(path))
        validate_config(config)
        # What the file says stays: without it Ray would install a nightly build of itself.
        assert config["setup_commands"] == config["head_setup_commands"] == config["worker_setup_commands"] == []

    def test_a_misspelt_key_would_be_noticed(self, path: Path) -> None:
        with pytest.raises(Exception, match="idle_timeout"):
            validate_config(prepare_config({**load(path), "idle_timeout": 5}))

    def test_the_head_computes_nothing_and_listens_to_this_machine_alone(self, path: Path) -> None:
        start = load(path)["head_start_ray_commands"][-1]
        assert {"--num-cpus=0", "--num-gpus=0", "--dashboard-host=127.0.0.1"} <= set(shlex.split(start))
        assert "0.0.0.0" not in path.read_text()

    def test_every_node_wants_the_token(self, path: Path) -> None:
        config = load(path)
        for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
            assert "export RAY_AUTH_MODE=token;" in commands[-1]
        assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}

    def test_containers_have_shared_memory_and_logs_that_end(self, path: Path) -> None:
        config = load(path)
        options = config["docker"]["run_options"]
        each = [options]
        if kinds := config.get("available_node_types"):
            workers = [kind for name, kind in kinds.items() if name != config["head_node_type"]]
            each = [kind["docker"]["worker_run_options"] for kind in workers] + [config["docker"]["head_run_options"]]
        assert all(any(option.startswith("--shm-size=") for option in own) for own in each)
        assert any("--log-opt max-size=" in option for option in options)
        [folder] = [option.split()[1].split(":")[0] for option in options if option.endswith(":/tmp/ray")]
        made = " ".join(
            config["initialization_commands"]
        )  # by docker it would be root's, and closed to the container's user
        assert f"install -d -m 1777 {folder}" in made

    def test_the_image_is_of_the_version_of_ray_that_is_locked(self, path: Path) -> None:
        assert load(path)["docker"]["image"].endswith(f"/protopnet:ray-{locked('ray')}")


def test_both_start_ray_alike() -> None:
    aws, local = map(load, CLUSTERS)
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert aws[commands] == local[commands]


class TestAWS:
    @pytest.fixture(scope="class")
    def config(self) -> dict[str, Any]:
        return load(ROOT / "cluster.yaml")

    def test_spot_only_where_it_says_so_and_disks_are_encrypted(self, config: dict[str, Any]) -> None:
        types = config["available_node_types"]
        spot = {name for name, kind in types.items() if "InstanceMarketOptions" in kind["node_config"]}
        assert spot == {"gpu_spot"}
        for kind in types.values():
            node = kind["node_config"]
            assert node["MetadataOptions"] == {"HttpTokens": "required"}
            assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])
        profiles = {name: kind["node_config"]["IamInstanceProfile"]["Name"] for name, kind in types.items()}
        assert profiles.pop("head") == "protopnet-head"
        assert set(profiles.values()) == {"protopnet-worker"}
        assert sum(kind.get("max_workers", 0) for kind in types.values()) == config["max_workers"]

    def test_jobs_find_their_nodes_by_kind(self, config: dict[str, Any]) -> None:
        """What the planner makes of the file, with all nodes but the head still asleep."""
        groups = [
            Group(
                Node(kind["resources"]["CPU"], kind["resources"].get("GPU", 0), frozenset(kind["resources"])),
                kind.get("max_workers", 0),
            )
            for kind in config["available_node_types"].values()
        ]
        asleep = Cluster((Node(0),), tuple(groups))
        train = training_plan(ComputeSettings(nodes="on_demand", workers=(2, 8)), asleep)
        assert (train.num_workers, train.gpu, train.threads) == ((2, 8), True, 8)
        score = pass_plan(ComputeSettings(nodes="spot", pass_workers=16), asleep)
        assert (score.actors, score.gpus) == (16, 1.0)
        assert pass_plan(ComputeSettings(nodes="cpu", pass_workers=4), asleep).gpus == 0

    def test_aws_accepts_it(self, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The provider's own preparation and its first calls, against a model of AWS."""
        moto, boto3 = pytest.importorskip("moto"), pytest.importorskip("boto3")
        monkeypatch.setenv("HOME", str(tmp_path))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
        for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        region = config["provider"]["region"]
        with moto.mock_aws():
            ec2, iam = boto3.resource("ec2", region), boto3.client("iam")
            vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")
            subnet = vpc.create_subnet(CidrBlock="10.0.0.0/24", AvailabilityZone=f"{region}a")
            subnet.meta.client.modify_subnet_attribute(SubnetId=subnet.id, MapPublicIpOnLaunch={"Value": True})
            group = vpc.create_security_group(GroupName="protopnet", Description="protopnet")
            for name in ("protopnet-head", "protopnet-worker"):
                iam.create_instance_profile(InstanceProfileName=name)
            filled = json.loads(
                json.dumps(config)
                .replace("subnet-00000000000000000", subnet.id)
                .replace("sg-00000000000000000", group.id)
                .replace(
                    config["available_node_types"]["head"]["node_config"]["ImageId"],
                    boto3.client("ec2", region).describe_images()["Images"][0]["ImageId"],  # no parameter store here
                )
            )
            assert _instances(filled, ec2) == {
                "gpu_spot": ("g6.2xlarge", "spot", [group.id]),
                "gpu_on_demand": ("g6.2xlarge", None, [group.id]),
                "cpu": ("c7i.4xlarge", None, [group.id]),
            }


def _instances(config: dict[str, Any], ec2: Any) -> dict[str, tuple[str, str | None, list[str]]]:
    """Start a worker of each type as the autoscaler does: instance type, market and security groups of each."""
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    config = prepare_config(config)
    validate_config(config)
    config = bootstrap_aws(config)
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    started = {}
    for name, kind in config["available_node_types"].items():
        if name != config["head_node_type"]:
            (instance,) = provider.create_node(kind["node_config"], {"ray-user-node-type": name}, 1)
            found = ec2.Instance(instance)
            groups = [group["GroupId"] for group in found.security_groups]
            started[name] = (found.instance_type, found.instance_lifecycle, groups)
    return started


# ------------------------------------------------------------------------------------------- KubeRay

# The fields of KubeRay's v1 API (1.5.1) at the levels that are not plain Kubernetes. There is no validator of the
# CRD without its operator; a misspelt field would be dropped in silence, so names are what is checked.
_CLUSTER = {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions"}
_CLUSTER |= {"headGroupSpec", "workerGroupSpecs", "headServiceAnnotations", "suspend"}
_FIELDS = {
    "RayJob": {"entrypoint", "runtimeEnvYAML", "backoffLimit", "activeDeadlineSeconds", "submissionMode"}
    | {"shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec", "submitterPodTemplate", "metadata"},
    "RayService": {"serveConfigV2", "rayClusterConfig", "serveService", "upgradeStrategy"},
}
_HEAD = {"rayStartParams", "template", "serviceType", "headService", "enableIngress"}
_GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template"}
_AUTOSCALER = {"idleTimeoutSeconds", "upscalingMode", "resources", "env", "image", "version"}
_POD = {"serviceAccountName", "nodeSelector", "tolerations", "containers", "volumes"}
_CONTAINER = {"name", "image", "ports", "resources", "volumeMounts", "env"}


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"]["rayClusterSpec" if manifest["kind"] == "RayJob" else "rayClusterConfig"]


def pods_of(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
class TestKubeRay:
    def test_fields_are_those_of_the_resource(self, path: Path) -> None:
        manifest = load(path)
        assert manifest["apiVersion"] == "ray.io/v1"
        assert set(manifest["spec"]) <= _FIELDS[manifest["kind"]]
        cluster = cluster_of(manifest)
        assert set(cluster) <= _CLUSTER
        assert set(cluster["autoscalerOptions"]) <= _AUTOSCALER
        assert cluster["autoscalerOptions"]["upscalingMode"] in ("Default", "Aggressive", "Conservative")
        assert set(cluster["headGroupSpec"]) <= _HEAD
        for group in cluster["workerGroupSpecs"]:
            assert set(group) <= _GROUP
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        for pod in pods_of(cluster):
            assert set(pod) <= _POD
            volumes = {volume["name"] for volume in pod["volumes"]}
            for container in pod["containers"]:
                assert set(container) <= _CONTAINER
                assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
                assert container["resources"]["requests"] == container["resources"]["limits"]

    def test_options_of_ray_start_are_such(self, path: Path) -> None:
        from ray.scripts.scripts import start

        known = {option.removeprefix("--") for parameter in start.params for option in parameter.opts}
        cluster = cluster_of(load(path))
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            assert set(group["rayStartParams"]) <= known
            assert all(isinstance(value, str) for value in group["rayStartParams"].values())
            if resources := group["rayStartParams"].get("resources"):
                assert list(json.loads(shlex.split(resources)[0]).values()) == [1]  # the shell takes the outer quotes

    def test_tokens_versions_and_a_head_that_computes_nothing(self, path: Path) -> None:
        cluster = cluster_of(load(path))
        assert cluster["rayVersion"] == locked("ray")
        assert cluster["authOptions"] == {"mode": "token"}
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        images = {container["image"] for pod in pods_of(cluster) for container in pod["containers"]}
        assert {image.rpartition("/")[2] for image in images} == {f"protopnet:ray-{locked('ray')}"}
        for pod in pods_of(cluster):
            assert {volume["name"]: volume for volume in pod["volumes"]}["shm"]["emptyDir"]["medium"] == "Memory"


def test_the_job_of_the_rayjob_is_one_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    job = load(DEPLOY / "rayjob.yaml")
    command, script, *options = shlex.split(job["spec"]["entrypoint"].replace("/opt/protopnet/", f"{ROOT}/"))
    assert command == "python"
    assert Path(script).is_file()
    nodes = parse(RunSettings, options).compute.nodes
    groups = cluster_of(job)["workerGroupSpecs"]
    assert any(f'"{nodes}' in group["rayStartParams"]["resources"].replace("\\", "") for group in groups)


def test_the_configuration_of_the_rayservice_is_valid_for_serve_and_for_our_application() -> None:
    from ray.serve.schema import ServeDeploySchema

    from protopnet.serving.settings import AppSettings

    config = ServeDeploySchema.model_validate(yaml.safe_load(load(DEPLOY / "rayservice.yaml")["spec"]["serveConfigV2"]))
    (application,) = config.applications
    settings = AppSettings.model_validate(application.args)
    assert settings.token_file  # it is reached from elsewhere: never open
    module, _, builder = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), builder))
    mounts = pods_of(cluster_of(load(DEPLOY / "rayservice.yaml")))[0]["containers"][0]["volumeMounts"]
    assert any(settings.token_file.startswith(mount["mountPath"] + "/") for mount in mounts)


# --------------------------------------------------------------------------------------------- image


def test_everything_that_the_image_installs_is_in_the_lock() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["aws"]]:
        assert locked(re.split(r"[\[<>=~! ]", requirement)[0])


def test_the_image_has_what_it_copies_and_lets_nothing_in_without_a_token() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert re.findall(r"RAY_AUTH_MODE=(\w+)", dockerfile) == ["token"]
    assert f"protopnet:ray-{locked('ray')}" in dockerfile
    assert re.findall(r"^USER (.+)", dockerfile, re.MULTILINE) == ["ray"]
    assert re.search(r"useradd .*--uid 1000 .*\bray$", dockerfile, re.MULTILINE)
    wanted = [line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    assert [name for name in wanted if not (ROOT / name).exists()] in ([], ["sbom.json"])  # which `make sbom` makes
    assert dict(re.findall(r"([\w.]+)=(\S+)", re.findall(r"^LABEL (.+)", dockerfile, re.MULTILINE)[0])) == {
        "org.opencontainers.image.base.name": "${BASE}",
        "org.cyclonedx.sbom": "/opt/protopnet/sbom.json",
    }
