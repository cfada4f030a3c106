"""The manifest of docs/serving, and the buckets that docs/serving.md shows."""

import json
import re
from pathlib import Path

import kubernetes_validate
import yaml

from dit_jax.methods.plan import parse_plan
from dit_jax.sharding import parse_mesh
from infer.buckets import read_buckets
from infer.serve import parser

DOCS = Path(__file__).parents[1] / "docs"


def test_the_manifests_are_valid_and_the_server_understands_them():
    servers, service = yaml.safe_load_all((DOCS / "serving" / "deployment.yaml").read_text())
    for manifest in (servers, service):
        kubernetes_validate.validate(manifest, "1.31", strict=True)
    pod = servers["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["dit-serve"]
    options = parser().parse_args(container["args"])
    assert options.host == "0.0.0.0" and options.api_key_file and options.port == container["ports"][0]["containerPort"]
    assert parse_mesh(options.mesh)["context"] == container["resources"]["limits"]["google.com/tpu"]
    before = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert before + options.patience + 30 <= pod["terminationGracePeriodSeconds"]
    mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
    named = (options.model[0], options.buckets, str(options.data), str(options.api_key_file))
    assert all(any(path.startswith(f"{folder}/") for folder in mounted) for path in named)
    probed = {container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert probed == {"/health/live", "/health/ready"}


def test_the_buckets_that_are_shown_can_be_read(tmp_path):
    shown = re.search(r"```json\n(.+?)```", (DOCS / "serving.md").read_text(), re.DOTALL)
    assert shown is not None
    (tmp_path / "buckets.json").write_text(shown[1])
    (name,) = json.loads(shown[1])
    assert read_buckets(str(tmp_path / "buckets.json"), [name])[name].offer("standard", None, None).plan == parse_plan(
        "hsa:50"
    )
