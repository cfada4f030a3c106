"""Every recipe of distillation, run by its command on a few small clips: what it learns, writes and goes on from."""

import itertools
import json
import os
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from first_frames import text_or_image
from joined_processes import joined
from PIL import Image

from convert.checkpoint import open_checkpoint
from convert.lora import read_lora
from convert.lora_keys import Target
from convert.method_parts import read_parts
from convert.transfer import LORA_WEIGHTS
from dit_jax.lora import merged_leaf
from dit_jax.methods.plan import parse_plan
from infer import load_pipeline
from infer.adapt import main as adapt
from infer.evaluate import evaluate, parser
from infer.generate import main as generate
from infer.prune import main as prune
from infer.request import Defaults
from infer.side_files import read_defaults, read_shift
from infer.similarity import psnr
from train.block_ranking import RANKING
from train.checkpoints import load_ema, newest_step
from train.cli import main as train
from train.demo_media import main as demo_media
from train.encode import main as encode
from train.overlap import main as measure
from train.overlap import overlap
from train.preview import draw
from train.recipes.coredit import read_ramp

SMALL = ["steps=3", "save_every=2", "log_every=1", "batch=4", "mesh=fsdp=1", "warmup=1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Encoded data of demo-wan in small clips, and of demo-flux in small pictures."""
    made = {}
    for kind, model, bucket in (("clips", "demo-wan", "64x64x5"), ("pictures", "demo-flux", "64x64")):
        folder = tmp_path_factory.mktemp(kind)
        assert demo_media([f"--{kind}", "12", "--out", str(folder / "media")]) == 0
        media = ["--videos" if kind == "clips" else "--images", str(folder / "media")]
        captions = ["--captions", str(folder / "media" / "metadata.jsonl")]
        out = ["--out", str(folder / "data"), "--buckets", bucket]
        assert encode(["--model", model, *media, *captions, *out]) == 0
        made[model] = folder / "data"
    return made


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """demo-wan with fewer neurons: no prompts are needed to choose them."""
    out = tmp_path_factory.mktemp("pruned") / "model"
    assert prune(["--model", "demo-wan", "--heads", "0", "--ffn", "0.5", "--out", str(out)]) == 0
    return out


def run(recipe, out, data, *settings, model="demo-wan", steps=None):
    words = [*SMALL, f"model={model}", f"data={data[model]}", f"out={out}", f"export={out}-model", *settings]
    words += [f"steps={steps}"] if steps else []
    code = train([recipe, "--set", "variant=demo", *(word for each in words for word in ("--set", each))])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] if not code else []
    return code, lines


def weights(model):
    return {name: leaf.rectangle(None) for name, leaf in open_checkpoint(model).leaves("transformer").items()}


def changed(left, right):
    return [name for name in right if not np.array_equal(left[name], right[name])]


def test_finetuning_changes_the_weights_and_nothing_else(data, tmp_path):
    code, lines = run("finetune", tmp_path / "run", data)
    assert code == 0
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(np.isfinite(line["loss"]) for line in lines)
    # 3.0 M weights in products, 32 tokens of 4 samples: forward, and twice backward; text and attention besides.
    assert 1 < lines[-1]["flops_per_second"] * lines[-1]["seconds_per_step"] / (6 * 3.0e6 * 32 * 4) < 3
    tuned = tmp_path / "run-model"
    assert len(changed(weights(tuned), weights("demo-wan"))) > 30
    vae = {name: leaf.rectangle(None) for name, leaf in open_checkpoint(tuned).leaves("vae").items()}
    before = {name: leaf.rectangle(None) for name, leaf in open_checkpoint("demo-wan").leaves("vae").items()}
    assert changed(vae, before) == []


def test_a_lora_is_trained_beside_the_weights_and_exported_alone_or_in_them(data, tmp_path, capsys):
    out, alone = tmp_path / "run", tmp_path / "run-model"
    assert run("finetune", out, data, "lora=3", "learning_rate=0.03")[0] == 0
    mean = load_ema(out)
    assert {name.partition(".")[0] for name in mean} == {"lora"}
    assert mean["lora.blocks.attn1.q.linear.kernel.down"].shape == (10, 192, 3)
    assert mean["lora.blocks.attn1.o.kernel.up"].shape == (10, 3, 192)
    assert {name.rpartition(".")[2] for name in mean} == {"down", "up"}
    assert [path.name for path in alone.iterdir()] == [LORA_WEIGHTS]
    target = Target.of(open_checkpoint("demo-wan").component("transformer"))
    lora = read_lora(alone, {"transformer": target})[1]["transformer"]
    found = {f"lora.{name}.{factor}": getattr(lora[name], factor) for name in lora for factor in ("down", "up")}
    assert found.keys() == mean.keys() and changed(found, mean) == []
    assert all(np.all(adapter.alpha == 3) and np.all(adapter.rank == 3) for adapter in lora.values())

    whole = tmp_path / "whole"
    assert run("finetune", out, data, "lora=3", "merge=True", f"export={whole}")[0] == 0
    before, after = weights("demo-wan"), weights(whole)
    assert set(changed(after, before)) == set(lora)
    by_file = {name: merged_leaf(jnp.asarray(before[name]), [(adapter, 1.0)]) for name, adapter in lora.items()}
    assert changed(after, by_file) == []
    name = "blocks.mlp.up.kernel"
    added = np.einsum("gir,gro->gio", mean[f"lora.{name}.down"], mean[f"lora.{name}.up"])
    gap = after[name].astype(np.float32) - before[name].astype(np.float32) - added
    assert np.linalg.norm(gap) < 0.2 * np.linalg.norm(added)
    rounding = 1.001 * 2.0**-8 * np.abs(after[name].astype(np.float32))  # half a unit in the last of bf16's places
    assert (np.abs(gap) <= rounding).all() and np.mean(np.abs(added) > rounding) > 0.1

    # The model that is trained is never what the export replaces.
    shutil.copytree(open_checkpoint("demo-wan").place, tmp_path / "model")
    assert run("finetune", out, data, "lora=3", f"model={tmp_path}/model", f"export={tmp_path}/model")[0] == 2
    assert "lie in one another" in capsys.readouterr().err
    assert changed(weights(tmp_path / "model"), before) == []


@pytest.mark.parametrize(
    "lora", [(), pytest.param(("lora=3", "merge=True", "learning_rate=0.05"), marks=pytest.mark.long)]
)
def test_samples_on_the_way_are_those_of_the_model_that_is_exported(data, tmp_path, lora):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text("a red 7 moving left\n")
    settings = ("sample_every=3", f"prompts={prompts}", "learning_rate=0.01", "ema_decay=0.0", *lora)
    best = () if lora else ("scored=2", "keep_best=1", "best=digit")
    code, lines = run("finetune", out, data, *settings, *best)
    assert code == 0
    assert lora or {"digit", "colour", "direction"} <= set(lines[-2] | lines[-1])
    with Image.open(out / "samples" / "000003.png") as grid:
        drawn = np.asarray(grid)
    assert (out / "samples" / "000003-0.mp4").stat().st_size > 0
    again = {}
    for name, model in (("exported", f"{out}-model"), ("untrained", "demo-wan")):
        frames = load_pipeline(model)("a red 7 moving left", seed=0).frames
        draw(frames, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as grid:
            again[name] = np.asarray(grid)
    drawn, again = drawn[:, :640], {name: grid[:, :640] for name, grid in again.items()}  # the rest of the row is empty
    # What is exported is rounded to bf16.
    assert psnr(drawn, again["exported"]) > 30 > 25 > psnr(drawn, again["untrained"])
    if not lora:
        report = evaluate(parser().parse_args(["--model", f"{out}-model", "--samples", "2"]))
        assert report["frechet"] == pytest.approx((lines[-2] | lines[-1])["frechet"], rel=0.02)


def test_pare_takes_both_stages(data, pruned, tmp_path):
    code, lines = run("pare_stage1", tmp_path / "one", data, f"student={pruned}")
    assert code == 0
    assert {"loss_features", "loss_teacher", "loss_data", "loss_motion"} <= set(lines[-1])
    of_one = lines[0]
    code, lines = run("pare_stage2", tmp_path / "two", data, f"student={tmp_path}/one-model")
    assert code == 0
    assert lines[-1]["active_blocks"] == pytest.approx(sum(lines[-1]["active_by_block"]), rel=1e-4)
    assert len(lines[-1]["active_by_block"]) == 10 > lines[-1]["active_blocks"] >= 5
    student = open_checkpoint(tmp_path / "two-model")
    sizes = [sum(leaf.size for leaf in weights(model).values()) for model in (tmp_path / "two-model", "demo-wan")]
    kept = {"kept_heads": 1.0, "kept_neurons": 0.5, "kept_parameters": pytest.approx(sizes[0] / sizes[1], abs=1e-6)}
    for line in (of_one, lines[0]):
        assert line == {"step": 0, "time": line["time"]} | kept
    assert student.component("transformer").config.mlp_width < 512
    parts = read_parts(student)
    parse_plan("routing").check((10,), parts)
    ranking = json.loads((tmp_path / "two" / RANKING).read_text())
    assert ranking["order"] == np.argsort(parts["router"].leaves["out.bias"]).tolist(), "three steps change no order"
    assert len(ranking["velocity_errors"]) == 5


def test_ddit_trains_adapters_by_turns_and_leaves_the_model(data, tmp_path):
    code, lines = run("ddit", tmp_path / "run", data, steps=6)
    assert code == 0
    sizes = {name.partition("_")[0] for line in lines for name in line if name.endswith("_loss")}
    assert {"2p", "4p"} <= sizes
    adapted = tmp_path / "run-model"
    assert changed(weights(adapted), weights("demo-wan")) == []
    assert adapt(["--model", "demo-wan", "--add", "ddit", "--out", str(tmp_path / "untrained")]) == 0
    left, right = (read_parts(open_checkpoint(each))["ddit"].leaves for each in (adapted, tmp_path / "untrained"))
    assert {name.partition(".")[0] for name in changed(left, right)} == {"2p", "4p"}


def test_coredit_skips_ever_more_and_goes_on_bit_for_bit(data, tmp_path):
    """The run that goes on finds a ramp that was already further than its checkpoint."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    settings = ("ramp_every=1", "ratio=0.02", "keep=9")
    assert run("coredit", straight, data, *settings, steps=4)[0] == 0
    ramp = read_ramp(str(straight))
    shares = [np.mean(share) for _, share in ramp]
    assert all(before < after for before, after in itertools.pairwise(shares) if before < 0.02)
    assert shares[-1] == pytest.approx(0.02, abs=0.01)
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / "4")
    assert run("coredit", resumed, data, *settings, steps=4)[0] == 0
    assert changed(load_ema(resumed), load_ema(straight)) == []
    assert read_ramp(str(resumed)) == ramp
    told = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert told[-1]["step"] == 4 and told[-1]["gathered_error"] <= 1e-4 < told[-1]["gathered_loss_teacher"]
    last = max(told, key=lambda line: ("skipped_by_block" in line, line["step"]))
    assert last["skipped_by_block"] == pytest.approx(ramp[-1][1], abs=1e-6)
    parts = read_parts(open_checkpoint(f"{resumed}-model"))
    assert parts["coredit"].settings["ratios"] == pytest.approx(ramp[-1][1], abs=1e-6)


def test_step_distillation_makes_a_student_of_four_steps(data, tmp_path):
    code, lines = run("step_distill", tmp_path / "run", data, "fake_turns=2", "batch=2")
    assert code == 0
    assert {"fake_loss", "student_loss"} <= set(lines[-1])
    parts = read_parts(open_checkpoint(tmp_path / "run-model"))
    assert parts["few_step"].settings["timesteps"] == [1000.0, 750.0, 500.0, 250.0]
    assert len(changed(weights(tmp_path / "run-model"), weights("demo-wan"))) > 30
    defaults = read_defaults(open_checkpoint(tmp_path / "run-model"), Defaults())
    assert (defaults.steps, defaults.guidance, defaults.solver) == (4, 1.0, "renoise")
    assert read_shift(open_checkpoint(tmp_path / "run-model")).constant == 5.0


def test_half_the_samples_of_a_model_of_first_frames_have_theirs_held(data, tmp_path, capsys):
    """By default; a run that goes on holds the same ones."""
    model = text_or_image(tmp_path / "model")
    data = data | {model: data["demo-wan"]}
    half, resumed, none = (tmp_path / name for name in ("half", "resumed", "none"))
    code, lines = run("finetune", half, data, "microbatches=2", model=model, steps=4)
    assert code == 0
    shutil.copytree(half, resumed)
    shutil.rmtree(resumed / "checkpoints" / "4")
    settings = "microbatches=2", "first_frame_conditioning=0.5"
    assert run("finetune", resumed, data, *settings, model=model, steps=4)[0] == 0
    assert changed(load_ema(resumed), load_ema(half)) == []
    settings = "microbatches=2", "first_frame_conditioning=0"
    assert run("finetune", none, data, *settings, model=model, steps=4)[1][0]["loss"] != lines[0]["loss"]
    assert len(changed(load_ema(none), load_ema(half))) > 30
    assert run("finetune", tmp_path / "all", data, "first_frame_conditioning=1.5", model=model)[0] == 2
    assert "first_frame_conditioning is 1.5: expected a share from 0 to 1" in capsys.readouterr().err


def test_flux_is_trained_as_wan_is(data, tmp_path):
    code, lines = run("pare_stage1", tmp_path / "run", data, "student=demo-flux", model="demo-flux")
    assert code == 0
    assert "loss_motion" not in lines[-1] or lines[-1]["loss_motion"] == 0


def test_what_data_and_checkpoints_add_is_measured(data, capsys):
    settings = [*SMALL, "variant=demo", f"data={data['demo-wan']}"]
    found = overlap("finetune", settings, saves=1, save_every=2)
    assert found["real"] > found["seconds_of_data"] > 0
    assert found["added"] == pytest.approx(
        2 * found["real"] / (found["synthetic_before"] + found["synthetic_after"]) - 1
    )
    assert measure(["finetune", "--set", "variant=demo"]) == 2
    assert "there are no data" in capsys.readouterr().err


def generated(folder, **plans):
    """Every exported model by dit-generate, with its plan."""
    for name, plan in plans.items():
        out = folder / f"{name}.mp4"
        words = ["--model", f"{folder}/{name}-model", "--plan", plan, "--prompt", "a red 7", "--steps", "2"]
        assert generate([*words, "--out", str(out)]) == 0
        assert out.stat().st_size > 0


@pytest.mark.long
def test_what_was_trained_runs(data, tmp_path):
    """The exported models by dit-generate, each with its plan."""
    assert run("ddit", tmp_path / "ddit", data)[0] == 0
    assert run("coredit", tmp_path / "coredit", data, "ramp_every=1")[0] == 0
    assert run("step_distill", tmp_path / "four", data, "fake_turns=1", "batch=2")[0] == 0
    generated(tmp_path, ddit="ddit:2p@0-1", coredit="coredit", four="dense")
    assert run("finetune", tmp_path / "flux", data, "lora=2", model="demo-flux")[0] == 0
    words = ["--model", "demo-flux", "--lora", f"{tmp_path}/flux-model", "--prompt", "a red 7", "--steps", "2"]
    assert generate([*words, "--out", str(tmp_path / "flux.png")]) == 0


@pytest.mark.long
def test_ablations_are_trained_and_run(data, tmp_path):
    code, lines = run("pare_stage2", tmp_path / "alone", data, "student=demo-wan", "content=False")
    assert code == 0 and lines[-1]["active_blocks"] < 10
    student = f"student={tmp_path}/alone-model"
    assert run("step_distill", tmp_path / "four", data, student, "fake_turns=1", "batch=2")[0] == 0
    for name in ("alone", "four"):
        assert read_parts(open_checkpoint(f"{tmp_path}/{name}-model"))["router"].settings["content"] == "none"
    assert run("ddit", tmp_path / "bare", data, "rank=0", steps=4)[0] == 0
    assert run("coredit", tmp_path / "even", data, "ramp_every=1", "adaptive=False")[0] == 0
    assert read_ramp(str(tmp_path / "even"))[-1][1] == [1 / 32] * 3 + [0] * 7
    generated(tmp_path, alone="routing", four="routing", bare="ddit:4p@0-1", even="coredit")


@pytest.mark.long
def test_two_processes_run_the_command_and_one_of_them_draws_and_exports(data, tmp_path):
    """As on a pod: the same command on every host, each with a device of its own."""
    (tmp_path / "prompts.txt").write_text("a red 7 moving left\n")
    samples = ["sample_every=3", f"prompts={tmp_path}/prompts.txt", "scored=2", "keep_best=1", "best=digit"]
    words = [
        *(word for word in SMALL if not word.startswith("mesh")),
        "mesh=data=2",
        "variant=demo",
        f"data={data['demo-wan']}",
        f"out={tmp_path}/two",
        *samples,
    ]
    words += [f"export={tmp_path}/two-model"]
    command = [sys.executable, "-m", "train.cli", "finetune", *(w for each in words for w in ("--set", each))]
    processes = joined(command, os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""})
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    assert "digit" in lines[-1] | lines[-2]
    assert run("finetune", tmp_path / "one", data, *samples)[0] == 0
    left, right = (Image.open(tmp_path / each / "samples" / "000003.png") for each in ("two", "one"))
    assert psnr(np.asarray(left)[:, :640], np.asarray(right)[:, :640]) > 40
    left, right = (load_ema(tmp_path / each) for each in ("two", "one"))
    # Adam divides by the gradient's size: where that is all rounding, a weight may move by the learning rate, 2e-4.
    gaps = np.concatenate([np.abs(left[name] - right[name]).ravel() for name in right])
    assert np.quantile(gaps, 0.99) < 2e-5 and gaps.max() < 1e-3
    assert open_checkpoint(tmp_path / "two-model").is_pipeline


def test_bad_input_is_one_sentence_and_keeps_the_last_checkpoint(data, pruned, tmp_path, capsys):
    assert run("finetune", tmp_path / "run", data, steps=2)[0] == 0
    before = load_ema(tmp_path / "run")
    cases = [
        ("finetune", ["data="], "there are no data"),
        ("finetune", [f"data={data['demo-flux']}"], "vae"),
        ("finetune", ["dtype=float8"], "dtype is 'float8', expected one of bfloat16, float32"),
        ("finetune", ["remat=full"], "remat is 'full'"),
        ("finetune", ["mesh=data=3"], "needs 3 devices"),
        ("finetune", ["microbatches=3"], "does not divide into the 3 microbatches"),
        ("finetune", ["variant=huge"], "no variant 'huge'"),
        ("finetune", ["model=wan2.1-t2v-14b"], "is a preset, which has sizes and no weights"),
        ("finetune", ["sample_every=1", "scored=1"], "scored is 1: expected 0, or at least 2"),
        ("finetune", ["best=digit", "keep_best=1"], "best is 'digit' with sample_every=0 and scored=0"),
        ("finetune", ["merge=True"], "merge is True and lora 0: expected a LoRA to merge"),
        (
            "finetune",
            ["first_frame_conditioning=0.5"],
            "first_frame_conditioning is 0.5 for demo-wan, whose latents hold no first frame: expected 0, or a model",
        ),
        ("pare_stage1", [], "there is no student"),
        ("pare_stage1", ["student=demo-flux"], "demo-flux is no student of demo-wan"),
        ("ddit", ["optimizer=sgd"], "optimizer is 'sgd', expected one of adamw, prodigy"),
        ("coredit", ["ratio=0.9"], "ratio is 0.9, expected above 0"),
        (
            "pare_stage1",
            [f"student={pruned}"],
            "are of the recipe recipe_finetune, expected the",
        ),
        ("pare_stage1", [f"student={pruned}", "sampled_blocks=-1"], "sampled_blocks is -1: expected 0 or more"),
        ("finetune", ["clip=-1"], "clip is -1: expected 0 or more"),
        ("finetune", [f"export={data['demo-wan']}"], "is no checkpoint, so --overwrite leaves it alone"),
        ("step_distill", ["student=demo-flux"], "demo-flux is no student of demo-wan: expected a Wan, found a Flux"),
        ("step_distill", ["least=2"], "demo-wan has no router, found least=2 and most=None"),
    ]
    for recipe, settings, expected in cases:
        capsys.readouterr()
        assert run(recipe, tmp_path / "run", data, *settings)[0] == 2, (recipe, settings)
        told = capsys.readouterr().err
        assert expected in told, told
    assert newest_step(tmp_path / "run") == 2
    after = load_ema(tmp_path / "run")
    assert changed(after, before) == []


def test_a_damaged_shard_is_named(data, tmp_path, capsys):
    folder = tmp_path / "data"
    shutil.copytree(data["demo-wan"], folder)
    shard = next(folder.glob("*.array_record"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert run("finetune", tmp_path / "run", {"demo-wan": folder})[0] == 2
    assert shard.name in capsys.readouterr().err
    assert newest_step(tmp_path / "run") is None
