"""The manifest of docs/pods: valid, and a run that this project's commands understand."""

import copy
import importlib.util
import math
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from dit_jax.sharding import parse_mesh
from train.cli import configure, load_recipe
from train.cli import main as train

ROOT = Path(__file__).parents[1]
PODS = ROOT / "docs" / "pods"

NAME, NUMBER, FLAG = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
NAMES = {"type": "array", "items": NAME}


def fields(required=(), **properties):
    """The schema of an object that has no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def one_of(*values):
    return {"enum": list(values)}


IGNORED = "AndIgnoreMaxRestarts"

# What the spec of jobset.x-k8s.io/v1alpha2 has of its own; the template is an ordinary Job.
DEPENDENCY = fields(("name", "status"), name=NAME, status=one_of("Ready", "Complete"))
REPLICATED = fields(
    ("name", "template"),
    name=NAME,
    replicas=NUMBER,
    groupName=NAME,
    template={"type": "object"},
    dependsOn={"type": "array", "items": DEPENDENCY},
)
RULE = fields(
    ("name", "action"),
    name=NAME,
    action=one_of("FailJobSet", *(f"Restart{what}{limit}" for what in ("Job", "JobSet") for limit in ("", IGNORED))),
    onJobFailureReasons=NAMES,
    onJobFailureMessagePatterns=NAMES,
    targetReplicatedJobs=NAMES,
)
JOBSET = fields(
    ("replicatedJobs",),
    replicatedJobs={"type": "array", "items": REPLICATED, "minItems": 1},
    failurePolicy=fields(
        maxRestarts=NUMBER,
        restartStrategy=one_of("Recreate", "BlockingRecreate", "InPlaceRestart"),
        rules={"type": "array", "items": RULE},
    ),
    successPolicy=fields(("operator",), operator=one_of("All", "Any"), targetReplicatedJobs=NAMES),
    startupPolicy=fields(("startupPolicyOrder",), startupPolicyOrder=one_of("AnyOrder", "InOrder")),
    network=fields(enableDNSHostnames=FLAG, subdomain=NAME, publishNotReadyAddresses=FLAG),
    coordinator=fields(("replicatedJob",), replicatedJob=NAME, jobIndex=NUMBER, podIndex=NUMBER),
    managedBy=NAME,
    suspend=FLAG,
    ttlSecondsAfterFinished=NUMBER,
)


@pytest.fixture(scope="module")
def jobset():
    return yaml.safe_load((PODS / "jobset.yaml").read_text())


@pytest.fixture(scope="module")
def job(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]


def test_the_manifest_is_valid(jobset, job):
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    jsonschema.validate(jobset["spec"], JOBSET)
    assert "alpha.jobset.sigs.k8s.io/exclusive-topology" in jobset["metadata"]["annotations"]
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, **job}
    kubernetes_validate.validate(whole, "1.31", strict=True)


def test_a_mistake_would_be_found(job):
    spec = {**job["spec"], "paralelism": 3}
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, "spec": spec}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(whole, "1.31", strict=True)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("failurePolicy", "maxRestarts"), "100"),
        (("failurePolicy", "restartStrategy"), "Never"),
        (("replicatedJobs", 0, "replicas"), -1),
        (("replicatedJobs", 0, "completions"), 16),
        (("parallelism",), 16),
    ],
)
def test_a_mistake_in_the_jobset_would_be_found(jobset, path, value):
    spec = copy.deepcopy(jobset["spec"])
    inner = spec
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(spec, JOBSET)


def test_a_run_that_was_stopped_is_started_again(jobset, job):
    """A pod that ends with 0 is done for Kubernetes."""
    (container,) = job["spec"]["template"]["spec"]["containers"]
    settings = [word.removeprefix("--set=") for word in container["args"]]
    assert configure(load_recipe(container["command"][1]).Config, settings).stopped_code != 0
    assert (job["spec"]["backoffLimit"], job["spec"]["template"]["spec"]["restartPolicy"]) == (0, "Never")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0


def test_what_would_only_fail_again_is_not_started_again(jobset, job, tmp_path):
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "In")
    assert rule["onExitCodes"]["containerName"] == job["spec"]["template"]["spec"]["containers"][0]["name"]
    (of_set,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (of_set["action"], of_set["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    recipe = tmp_path / "diverging.py"
    recipe.write_text(
        "import train.loop\nclass Config(train.loop.RunConfig): pass\n"
        "def run(config): raise train.loop.TrainingDivergedError('nan')\n"
    )
    assert rule["onExitCodes"]["values"] == [train(["no_recipe"]), train([str(recipe)])]


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


def queued_commands():
    """The gcloud lines of docs/pods.md: (verb, name, options)."""
    found = []
    for line in (ROOT / "docs" / "pods.md").read_text().splitlines():
        words = shlex.split(line) if line.startswith("    gcloud ") else []
        if words:
            assert words[:4] == ["gcloud", "compute", "tpus", words[3]]
            verb, name, rest = " ".join(words[3:5]), words[5], words[6:]
            assert all(option.startswith("--") for option in rest[::2])
            found.append((verb, name, dict(zip(rest[::2], rest[1::2], strict=True))))
    return found


def test_the_queued_slice_is_the_one_that_is_set_up_and_as_large_as_the_runs_mesh():
    (verb, _, slice_), *others = queued_commands()
    assert verb == "queued-resources create"
    assert slice_.keys() == {"--node-id", "--zone", "--accelerator-type", "--runtime-version"}
    for verb, name, options in others:
        assert (verb, name) == ("tpu-vm ssh", slice_["--node-id"])
        assert options.keys() == {"--zone", "--worker", "--command"}
        assert (options["--zone"], options["--worker"]) == (slice_["--zone"], "all")
        subprocess.run(["bash", "-n", "-c", options["--command"]], check=True)
    chip, cores = slice_["--accelerator-type"].split("-")
    program, recipe, *words = shlex.split(others[-1][2]["--command"].partition("&& ")[2])
    assert (chip, program) == ("v5p", "~/dit-jax/bin/dit-train") and set(words[::2]) == {"--set"}
    config = configure(load_recipe(recipe).Config, words[1::2])
    assert math.prod(parse_mesh(config.mesh).values()) == int(cores) / 2, "v5p is named by its cores, two a chip"
    assert config.out.startswith("/data/") and "/data" in others[0][2]["--command"]


def test_the_queued_hosts_install_what_a_run_needs():
    (words,) = (options["--command"] for _, _, options in queued_commands() if "uv pip" in options.get("--command", ""))
    extras = re.search(r"'dit-jax\[([a-z,]+)\]", words)[1].split(",")
    offered = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"tpu", "train"} == set(extras) <= set(offered["optional-dependencies"])
    least, taken = (re.search(r"3\.(\d+)", text)[1] for text in (offered["requires-python"], words))
    assert int(taken) >= int(least)


GATHERED = """
import sys
import jax
from dit_jax.sharding import make_mesh, parse_mesh
from infer.chips import tpu_devices
mesh = make_mesh(parse_mesh(sys.argv[2]), tpu_devices(sys.argv[1]))
rows = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
x = jax.ShapeDtypeStruct((1 << 15, 4096), "bfloat16", sharding=rows)
weights = jax.ShapeDtypeStruct((2, 4096, 4096), "bfloat16", sharding=jax.NamedSharding(mesh, jax.P(None, "fsdp")))

def layer(x, kernel):
    return jax.lax.with_sharding_constraint(jax.nn.gelu(x @ kernel), rows), None

text = jax.jit(lambda x, weights: jax.lax.scan(layer, x, weights)[0]).lower(x, weights).compile().as_text()
print("all-gather" if " all-gather" in text else text)
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'dit-jax[dev]'")
def test_with_the_manifests_environment_weights_are_gathered_on_its_slice(job):
    """XLA flags that libtpu does not know, or refuses on these chips, end a run before its first step."""
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    told = {variable["name"]: variable["value"] for variable in container.get("env", ())}
    chip, shape = (pod["nodeSelector"][f"cloud.google.com/gke-tpu-{what}"] for what in ("accelerator", "topology"))
    topology = f"{chip.removeprefix('tpu-').removesuffix('-slice')}:{shape}"
    (mesh,) = (word.removeprefix("--set=mesh=") for word in container["args"] if word.startswith("--set=mesh="))

    def gathered(flags):
        environment = os.environ | told | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | flags
        command = [sys.executable, "-c", GATHERED, topology, mesh]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    found = gathered({})
    assert found.stdout == "all-gather\n", found.stderr
    of_v5e = "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true --xla_enable_async_all_gather=true"
    refused = gathered({"LIBTPU_INIT_ARGS": of_v5e})
    assert "not supported/recommended on platforms other than TPU v5e" in refused.stderr


def test_the_image_holds_what_the_command_needs():
    lines = (PODS / "Dockerfile").read_text().splitlines()
    install = next(line for line in lines if "pip install" in line)
    assert any("[tpu,train,serve]" in word for word in shlex.split(install))
