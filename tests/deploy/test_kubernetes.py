"""The files for Kubernetes: against its schemas, against each other, and their commands against the scripts."""

import copy

import jsonschema
import kubernetes_validate
import pytest
from clusters import DOCKERFILE, KUBERNETES, containers, documents
from conftest import ROOT
from dockerfiles import by_name
from test_docs import check_command

from shell.files import project_version

FILES = sorted(KUBERNETES.rglob("*.yaml"))
OBJECTS = [(path, each) for path in FILES for each in documents(path)]
OURS = [(path, each) for path, each in OBJECTS if "kueue" not in each["apiVersion"]]
JOBS = [(path, each) for path, each in OBJECTS if each["kind"] == "Job"]
TRAIN = [(path, each) for path, each in JOBS if path.name == "train-job.yaml"]
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"}


def label(pair):
    path, each = pair
    return f"{path.relative_to(KUBERNETES)}: {each['kind']} {each['metadata']['name']}"


def check(each):
    kubernetes_validate.validate(each, "1.37", strict=True)


@pytest.mark.parametrize("pair", OURS, ids=label)
def test_the_schema_of_kubernetes(pair):
    check(pair[1])


@pytest.mark.parametrize("pair", JOBS, ids=label)
@pytest.mark.parametrize("place", ["spec", "rule", "container", "mount"])
def test_a_mistyped_field_would_be_found(pair, place):
    each = copy.deepcopy(pair[1])
    container = each["spec"]["template"]["spec"]["containers"][0]
    places = {"spec": each["spec"], "rule": each["spec"]["podFailurePolicy"]["rules"][0], "container": container}
    (places | {"mount": container["volumeMounts"][0]})[place]["no_such_field"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        check(each)


# ----------------------------------------------------------------------------------------------------- each other


@pytest.mark.parametrize("pair", JOBS, ids=label)
def test_the_names_in_a_job_are_there(pair):
    claims = {each["metadata"]["name"] for each in documents(KUBERNETES / "volumes.yaml")}
    job = pair[1]["spec"]
    volumes = {volume["name"]: volume for volume in job["template"]["spec"]["volumes"]}
    used = {volume["persistentVolumeClaim"]["claimName"] for volume in volumes.values() if len(volume) == 2
            and "persistentVolumeClaim" in volume}  # fmt: skip
    assert used == claims
    for container in containers(pair[1]).values():
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
    named = {rule["onExitCodes"]["containerName"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule}
    assert named == containers(pair[1]).keys()


@pytest.mark.parametrize("pair", [pair for pair in OURS if pair[1]["kind"] in ("Job", "Pod")], ids=label)
def test_containers_are_those_of_the_image(pair):
    """Its version, its user and its folders; nothing of it can be changed, and it may do nothing else."""
    spec = pair[1]["spec"].get("template", pair[1])["spec"]
    (user,) = by_name(DOCKERFILE)["USER"]
    ids = {key: spec["securityContext"][key] for key in ("runAsUser", "runAsGroup", "fsGroup")}
    assert spec["securityContext"]["runAsNonRoot"] and {str(each) for each in ids.values()} == {*user.split(":")}
    assert spec["automountServiceAccountToken"] is False and spec["restartPolicy"] == "Never"
    for container in containers(pair[1]).values():
        assert container["image"].endswith(f"/onetune:{project_version()}") and "command" not in container
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        folders = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {"/onetune/checkpoints", "/onetune/prepared", "/onetune/out"} <= folders
        assert pair[1]["kind"] == "Pod" or {"/cache", "/tmp", "/dev/shm"} <= folders


def test_no_secret_stands_in_a_file():
    for path, each in OBJECTS:
        assert each["kind"] != "Secret", path
        for container in containers(each).values() if each["kind"] in ("Job", "Pod") else ():
            assert "env" not in container, f"{path}: values come from a Secret that is made by hand"
            assert all(source["secretRef"]["optional"] for source in container.get("envFrom", []))


def test_kueues_job_is_the_same_but_for_its_queue():
    ((_, plain), (_, queued)) = sorted(TRAIN, key=lambda pair: len(pair[0].parts))
    queued = copy.deepcopy(queued)
    assert queued["spec"].pop("suspend") is True
    queue = queued["metadata"]["labels"].pop("kueue.x-k8s.io/queue-name")
    assert queued == plain
    assert queue in [each["metadata"]["name"] for _, each in OBJECTS if each["kind"] == "LocalQueue"]


# -------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("pair", JOBS, ids=label)
def test_commands_can_be_given(pair):
    for container in containers(pair[1]).values():
        check_command(["python", *container["args"]])


@pytest.mark.parametrize("pair", TRAIN, ids=label)
def test_a_run_is_always_resumed(pair):
    (container,) = containers(pair[1]).values()
    assert container["args"][0] == "finetune.py" and "--resume" in container["args"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_the_evaluation_measures_the_run_that_was_trained():
    config = (ROOT / "configs" / "dev.yaml").read_text()
    (job,) = documents(KUBERNETES / "evaluate-job.yaml")
    for container in containers(job).values():
        args = container["args"]
        assert f"out_dir: {args[args.index('--adapter_dir') + 1].removesuffix('/final')}\n" in config
        assert "method: lora\n" in config


# ------------------------------------------------------------------------------------------ Kueue, by its structure
# No package that can be had carries Kueue's own schemas. These are its fields that the file uses, and no others.


def structure(**spec):
    fields = {"type": "object", "additionalProperties": False, "properties": spec, "required": [*spec]}
    return {
        "type": "object", "additionalProperties": False, "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {"const": "kueue.x-k8s.io/v1beta2"}, "kind": {"type": "string"}, "spec": fields,
            "metadata": {"type": "object", "additionalProperties": False, "properties": {"name": NAME}},
        },
    }  # fmt: skip


def objects(**properties):
    return {
        "type": "object", "properties": properties, "required": [*properties], "additionalProperties": False
    }  # fmt: skip


QUOTA = objects(name={"type": "string"}, nominalQuota={"type": ["integer", "string"]})
FLAVOR = objects(name=NAME, resources={"type": "array", "items": QUOTA})
GROUP = objects(coveredResources={"type": "array"}, flavors={"type": "array", "items": FLAVOR})
KUEUE = {
    "ResourceFlavor": structure(nodeLabels={"type": "object", "additionalProperties": {"type": "string"}}),
    "ClusterQueue": structure(
        namespaceSelector={"type": "object"}, queueingStrategy={"enum": ["StrictFIFO", "BestEffortFIFO"]},
        preemption=objects(withinClusterQueue={"enum": ["Never", "LowerPriority", "LowerOrNewerEqualPriority"]}),
        resourceGroups={"type": "array", "items": GROUP},
    ),
    "LocalQueue": structure(clusterQueue=NAME),
}  # fmt: skip


def test_the_queues():
    found = {each["kind"]: each for each in documents(KUBERNETES / "kueue" / "queues.yaml")}
    assert found.keys() == KUEUE.keys()
    for kind, each in found.items():
        jsonschema.validate(each, KUEUE[kind])
    assert found["LocalQueue"]["spec"]["clusterQueue"] == found["ClusterQueue"]["metadata"]["name"]
    (group,) = found["ClusterQueue"]["spec"]["resourceGroups"]
    assert [flavor["name"] for flavor in group["flavors"]] == [found["ResourceFlavor"]["metadata"]["name"]]
    for flavor in group["flavors"]:
        assert [resource["name"] for resource in flavor["resources"]] == group["coveredResources"]


def test_the_queue_counts_all_that_a_job_asks_for():
    """Kueue never starts a Job that asks for what its queue does not cover, or for more than there is."""
    queue = documents(KUBERNETES / "kueue" / "queues.yaml")[1]
    ((container),) = containers(documents(KUBERNETES / "kueue" / "train-job.yaml")[0]).values()
    asked = container["resources"]["limits"] | container["resources"]["requests"]
    (group,) = queue["spec"]["resourceGroups"]
    quotas = {
        each["name"]: int(str(each["nominalQuota"]).removesuffix("Gi")) for each in group["flavors"][0]["resources"]
    }
    assert asked.keys() == quotas.keys()
    assert all(int(str(amount).removesuffix("Gi")) <= quotas[name] for name, amount in asked.items())
