"""The manifest of docs/pods: valid, and a run that this project's commands understand."""

import math
import shlex
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from dit_jax.sharding import parse_mesh
from train.cli import configure, load_recipe

PODS = Path(__file__).parents[1] / "docs" / "pods"

# What jobset.x-k8s.io/v1alpha2 has, of its own; the template is an ordinary Job.
JOBSET = {"coordinator", "failurePolicy", "managedBy", "network", "replicatedJobs", "startupPolicy", "successPolicy"}
JOBSET |= {"suspend", "ttlSecondsAfterFinished"}
REPLICATED = {"dependsOn", "groupName", "name", "replicas", "template"}


@pytest.fixture(scope="module")
def jobset():
    return yaml.safe_load((PODS / "jobset.yaml").read_text())


@pytest.fixture(scope="module")
def job(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]


def test_the_manifest_is_valid(jobset, job):
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobset["spec"]) <= JOBSET
    assert set(jobset["spec"]["replicatedJobs"][0]) <= REPLICATED
    assert set(jobset["spec"]["failurePolicy"]) <= {"maxRestarts", "rules", "restartStrategy"}
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, **job}
    kubernetes_validate.validate(whole, "1.31", strict=True)


def test_a_mistake_would_be_found(job):
    spec = {**job["spec"], "paralelism": 3}
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, "spec": spec}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(whole, "1.31", strict=True)


def test_its_command_is_one_that_the_recipe_understands(job):
    (container,) = job["spec"]["template"]["spec"]["containers"]
    program, recipe = container["command"]
    assert program == "dit-train"
    settings = [word.removeprefix("--set=") for word in container["args"]]
    module = load_recipe(recipe)
    config = configure(module.Config, settings, module.VARIANTS)
    assert config.batch % parse_mesh(config.mesh)["data"] == 0


def test_hosts_chips_and_mesh_agree(job):
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert job["spec"]["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == chips
    mesh = next(word for word in container["args"] if word.startswith("--set=mesh="))
    assert math.prod(parse_mesh(mesh.removeprefix("--set=mesh=")).values()) == chips


def test_the_image_holds_what_the_command_needs():
    lines = (PODS / "Dockerfile").read_text().splitlines()
    install = next(line for line in lines if "pip install" in line)
    assert any("[tpu,train]" in word for word in shlex.split(install))
