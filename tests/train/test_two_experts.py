"""Training one of Wan 2.2's two experts: at which noise levels, what is written, and what is refused."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from small_wan import BUCKET, write_data, write_model

from convert.checkpoint import open_checkpoint
from convert.method_parts import read_parts
from convert.transfer import LORA_WEIGHTS, convert
from dit_jax.config import UserError
from dit_jax.parameters import named_leaves
from infer import load_pipeline
from infer.loras import parse_choice
from infer.prune import main as prune
from infer.request import Request
from train import plan
from train.block_ranking import RANKING
from train.cli import main as train
from train.models import Source
from train.placement import training_mesh
from train.recipe import made, prepared, samples_of, source_of
from train.recipes import coredit, ddit, finetune, pare_stage1, pare_stage2
from train.step import of_modules, params_of

HIGH, LOW = "transformer", "transformer_2"
SHORT = ["steps=2", "save_every=2", "log_every=1", "batch=2", "mesh=fsdp=1", "warmup=1", "dtype=float32", "remat=none"]
FAST = "learning_rate=0.01"

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'dit-jax[dev]'"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("experts") / "tiny-a14b")


@pytest.fixture(scope="module")
def data(model, tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("encoded") / "data", model)


@pytest.fixture
def run(model, data, tmp_path):
    """Trains an expert by the command; returns the exported folder."""

    def trained(recipe, expert, name, *settings):
        words = [*SHORT, f"model={model}", f"data={data}", f"expert={expert}", f"out={tmp_path}/runs/{name}"]
        words += [f"export={tmp_path}/{name}", *settings]
        assert train([recipe, *(word for each in words for word in ("--set", each))]) == 0
        return f"{tmp_path}/{name}"

    return trained


def logged(model):
    """What the run that exported a model has told."""
    out = Path(model).parent / "runs" / Path(model).name
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def exported(recipe, config, folder):
    """What a recipe would export before its first step."""
    training = recipe.training(config, source_of(config, training_mesh("fsdp=1")))
    convert(training.result(training.target.checkpoint, of_modules(params_of(training.trained))), folder, "diffusers")
    return str(folder)


def changed(left, right):
    """Components whose weights differ."""
    left, right = open_checkpoint(left), open_checkpoint(right)
    assert list(left.settings) == list(right.settings)

    def same(name):
        ours, theirs = left.leaves(name), right.leaves(name)
        return all(np.array_equal(ours[leaf].rectangle(None), theirs[leaf].rectangle(None)) for leaf in theirs)

    return {name for name in right.settings if not same(name)}


def part(model, component, name):
    return read_parts(open_checkpoint(model), component).get(name)


def equal(left, right):
    """Whether two parts are the same."""
    leaves = all(np.array_equal(left.leaves[name], leaf) for name, leaf in right.leaves.items())
    return left.settings == right.settings and left.leaves.keys() == right.leaves.keys() and leaves


def job(pipe, steps=4, plan="dense"):
    return pipe.prepare(Request(prompt="a cat", size=BUCKET.size, frames=BUCKET.frames, steps=steps, plan=plan))


def runs(model, plan):
    """Four steps, two of each expert's."""
    pipe = load_pipeline(model)
    return np.isfinite(pipe.denoise(job(pipe, plan=plan))).all()


def configured(model, expert, **options):
    """The options that a recipe is given."""
    config = finetune.Config(model=model, expert=expert, **options)
    return made(config, lambda config, source: config, source_of(config, training_mesh("fsdp=1")))


def test_an_expert_learns_at_the_noise_levels_that_it_runs_at(model):
    assert configured(model, HIGH).levels == (0.875, 1.0)
    assert configured(model, LOW).levels == (0.0, 0.875)
    flow = configured(model, LOW, lowest_level=0.25).flow
    assert (flow.lowest, flow.highest) == (0.25, 0.875)
    assert configured(model, LOW, highest_level=1.0).levels == (0.0, 1.0)
    assert configured("demo-wan", "").levels == (0.0, 1.0)
    pipe = load_pipeline(model)
    of_steps = job(pipe, steps=100)
    schedule = pipe.schedule(of_steps)
    crossing = next(stage.first for stage in pipe.stages(of_steps, schedule) if stage.component == LOW)
    assert schedule.sigmas[crossing - 1] >= 0.875 > schedule.sigmas[crossing]


def test_finetuning_changes_one_expert(model, run, capsys):
    tuned = run("finetune", HIGH, "tuned", FAST)
    assert changed(tuned, model) == {HIGH}
    assert all(line["loss_high_noise"] > 0 and "loss_low_noise" not in line for line in logged(tuned))
    capsys.readouterr()
    with pytest.raises(AssertionError):
        run("finetune", LOW, "tuned", FAST)
    told = "finetune with expert=transformer, expected the recipe recipe_finetune with expert=transformer_2"
    assert told in capsys.readouterr().err


@pytest.mark.long
def test_a_lora_of_an_expert_is_merged_into_that_one(model, run):
    alone = run("finetune", LOW, "lora", "lora=2", FAST)
    merged = f"{alone}-merged"
    run("finetune", LOW, "lora", "lora=2", FAST, "merge=True", f"export={merged}")
    assert changed(merged, model) == {LOW}
    pipe = load_pipeline(model, lora=[parse_choice(f"transformer_2={alone}")])
    own = open_checkpoint(model)
    for name, source in ((HIGH, own), (LOW, open_checkpoint(merged))):
        leaves = source.leaves(name)
        for leaf, array in named_leaves(pipe.experts[name]):
            np.testing.assert_allclose(array, leaves[leaf].rectangle(None), rtol=1e-6, atol=1e-7)
    # What begins with `transformer.` is what diffusers' load_lora_weights(..., load_into_transformer_2=True) takes.
    with safe_open(f"{alone}/{LORA_WEIGHTS}", "np") as file:
        assert all(key.startswith("transformer.") for key in file.keys())  # noqa: SIM118
    assert np.isfinite(pipe.denoise(job(pipe))).all()


def test_samples_are_drawn_with_the_trained_expert_in_its_place(model, data, tmp_path):
    options = {"mesh": "fsdp=1", "batch": 2, "dtype": "float32", "out": str(tmp_path)}
    config = finetune.Config(model=model, data=data, expert=LOW, **options)
    ready = prepared(config, finetune.training)
    samples = samples_of(config, ready)
    mean = {name: leaf + 1 for name, leaf in ready.state.ema.items()}
    assert samples(ready.state._replace(ema=mean), 1) == {}
    own = open_checkpoint(model).leaves(HIGH)
    for leaf, array in named_leaves(samples.pipe.experts[HIGH]):
        np.testing.assert_array_equal(array, own[leaf].rectangle(None))
    for leaf, array in named_leaves(samples.pipe.experts[LOW]):
        np.testing.assert_array_equal(array, mean[f"student.{leaf}"])


def test_the_same_expert_teaches_and_learns(model):
    config = pare_stage1.Config(model=model, student=model, expert=LOW, dtype="float32")
    training = pare_stage1.training(config, source_of(config, training_mesh("fsdp=1")))
    own = open_checkpoint(model).leaves(LOW)
    for module in (training.trained["student"], training.frozen["teacher"]):
        for leaf, array in named_leaves(module):
            np.testing.assert_array_equal(array, own[leaf].rectangle(None))


def test_pare_takes_one_expert_after_the_other(model, run, tmp_path):
    pruned = f"{tmp_path}/pruned"
    assert prune(["--model", model, "--heads", "0", "--ffn", "0.5", "--out", pruned]) == 0
    one = run("pare_stage1", LOW, "one", FAST, f"student={pruned}")
    assert changed(one, pruned) == {LOW} and logged(one)[0]["kept_neurons"] == 0.5
    two = run("pare_stage2", HIGH, "two", FAST, f"student={one}")
    assert changed(two, one) == {HIGH} and part(two, LOW, "router") is None
    assert (tmp_path / "runs" / "two" / RANKING).exists()
    both = exported(pare_stage2, pare_stage2.Config(model=model, student=two, expert=LOW, seed=3), tmp_path / "both")
    assert changed(both, two) == set()
    assert equal(part(both, HIGH, "router"), part(two, HIGH, "router"))
    assert not equal(part(both, LOW, "router"), part(two, HIGH, "router"))
    assert runs(both, "routing")


@pytest.mark.long
def test_coredit_keeps_the_ratios_of_the_other_expert(model, run, tmp_path):
    low = run("coredit", LOW, "low", FAST, "ratio=0.1", "ramp_every=1")
    assert changed(low, model) == {LOW}
    first = part(low, LOW, "coredit").settings
    assert first["ratios"] == [0, 0] and sum(first["experts"][LOW]) > 0
    (tmp_path / "high").mkdir()
    (tmp_path / "high" / coredit.RAMP).write_text("[[0, [0.1, 0.2]]]")
    config = coredit.Config(model=low, expert=HIGH, ratio=0.15, out=str(tmp_path / "high"))
    both = exported(coredit, config, tmp_path / "both")
    second = part(both, HIGH, "coredit").settings
    assert (second["ratios"], second["experts"]) == ([0.1, 0.2], first["experts"])
    pipe = load_pipeline(both)
    assert str(job(pipe, plan="coredit").plan) == "coredit", "it fits both experts"


def test_ddit_trains_the_adapters_of_one_expert(model, run, tmp_path):
    low = run("ddit", LOW, "low", "sizes=2p", "rank=2", FAST)
    assert changed(low, model) == set() and part(low, HIGH, "ddit") is None
    config = ddit.Config(model=low, expert=HIGH, sizes="2p", rank=2, seed=3)
    both = exported(ddit, config, tmp_path / "both")
    assert equal(part(both, LOW, "ddit"), part(low, LOW, "ddit"))
    assert not equal(part(both, HIGH, "ddit"), part(low, LOW, "ddit"))
    assert runs(both, "ddit:2p@0-3")


@pytest.mark.parametrize(
    ("recipe", "settings", "expected"),
    [
        ("finetune", [], "tiny-a14b has two experts, and expert is '': expected transformer or transformer_2; train"),
        ("finetune", ["expert=high"], "has two experts, and expert is 'high': expected transformer or transformer_2"),
        ("finetune", ["expert=transformer", "model=demo-wan"], "and demo-wan has one transformer: expected none; leav"),
        ("finetune", ["expert=transformer", "highest_level=0.5"], "noise levels are from 0.875 to 0.5: expected 0 <="),
        ("pare_stage1", ["expert=transformer", "student=demo-wan"], "and demo-wan has one transformer: expected none"),
        ("step_distill", ["expert=transformer"], "expert is 'transformer', and step_distill rolls its student out"),
        ("step_distill", ["lowest_level=0.5"], "noise levels are from 0.5 to 1, and step_distill rolls its student"),
    ],
)  # fmt: skip
def test_what_names_no_expert_is_refused_in_a_sentence(model, data, tmp_path, capsys, recipe, settings, expected):
    words = [*SHORT, f"model={model}", f"data={data}", f"out={tmp_path}/run", *settings]
    assert train([recipe, *(word for each in words for word in ("--set", each))]) == 2
    told = capsys.readouterr().err
    assert expected in told and told.count("\n") == 1, told


@needs_libtpu
def test_a_step_of_an_expert_is_planned(model, monkeypatch):
    monkeypatch.setattr(plan, "report", lambda subject, target, mesh: subject)
    words = [f"model={model}", f"expert={LOW}", "batch=4", "size={}x{}".format(*BUCKET.size), f"frames={BUCKET.frames}"]
    found = plan.of_recipe("finetune", words, plan.Target(topology="v5e:2x2", slices=1, mesh="data=2,fsdp=2"))
    assert found.tokens == 4 * 2 * 2 * 3 and found.flops > 0


def test_a_preset_has_the_sizes_of_every_expert():
    assert Source("wan2.2-t2v-a14b", training_mesh("fsdp=1")).noise_levels == (0.0, 1.0)
    with pytest.raises(UserError, match="is a preset, whose sizes are those of every expert: expected none; leave"):
        Source("wan2.2-t2v-a14b", training_mesh("fsdp=1"), expert=HIGH)
