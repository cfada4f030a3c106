"""The papers' ablations as options of recipes: what they train and export, and the checkpoints that they refuse."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from convert.checkpoint import open_checkpoint
from convert.method_parts import read_parts
from convert.transfer import convert
from dit_jax.config import UserError
from dit_jax.methods.plan import parse_plan
from dit_jax.models.flux import FluxConfig
from infer.adapt import main as adapt
from infer.side_files import DEFAULTS_FILE
from train.models import Source
from train.pare_loss import PareWeights
from train.placement import training_mesh
from train.recipe import POSITION, abstract_batch
from train.recipes import coredit, ddit, pare_stage1, pare_stage2, step_distill
from train.step import TrainStep, of_modules, params_of


def source_of(model="demo-wan"):
    return Source(str(model), training_mesh("fsdp=1"))


def exported(training, folder):
    """The checkpoint with what is trained, as it is before the first step."""
    weights = of_modules(params_of(training.trained))
    convert(training.result(training.target.checkpoint, weights), folder, "diffusers")
    return folder


def traced(recipe, config):
    """The step of a preset, for a batch of shapes alone."""
    source = source_of("wan2.1-t2v-1.3b")
    training = recipe.training(config, source)
    step = TrainStep(training.trained, training.plan, source.mesh, training.frozen)
    step.trace(abstract_batch(config, source.config, config.batch), training.first_turn)
    return training


def test_a_router_that_is_told_the_timestep_alone_is_trained_further_and_kept_apart(tmp_path):
    config = pare_stage2.Config(student="demo-wan", content=False, seed=3)
    made = pare_stage2.training(config, source_of())
    alone = exported(made, tmp_path / "alone")
    parts = read_parts(open_checkpoint(alone))
    assert (parts["router"].settings["content"], parts["router"].settings["features"]) == ("none", 0)
    assert parts["router"].leaves["up.kernel"].shape == (256, 256)
    parse_plan("routing").check((10,), parts)
    later = replace(config, student=str(alone), seed=5)
    further = pare_stage2.training(later, source_of())
    assert further.around is None and made.around is not None, "a router that was trained keeps its ranking"
    assert pare_stage2.training(replace(config, ranked=False), source_of()).around is None
    again = further.trained["router"]
    np.testing.assert_array_equal(again.up.kernel[...], made.trained["router"].up.kernel[...])
    routed = step_distill.training(step_distill.Config(student=str(alone)), source_of()).trained["router"]
    assert routed.config.content == "none"
    with pytest.raises(UserError, match=r"content is True, and the router of .*alone is told the timestep alone"):
        pare_stage2.training(replace(later, content=True), source_of())

    assert adapt(["--model", "demo-wan", "--add", "router", "--out", str(tmp_path / "usual")]) == 0
    usual = replace(config, student=str(tmp_path / "usual"))
    with pytest.raises(UserError, match="told content too: expected the timestep alone; set content=True, or give"):
        pare_stage2.training(usual, source_of())
    assert pare_stage2.training(replace(usual, content=True), source_of()).trained["router"].config.features > 0


def test_a_router_keeps_with_how_many_blocks_it_was_trained(tmp_path):
    first = pare_stage2.Config(student="demo-wan", least=3, most=6)
    routed = exported(pare_stage2.training(first, source_of()), tmp_path / "routed")
    later = pare_stage2.Config(student=str(routed), most=7)
    further = exported(pare_stage2.training(later, source_of()), tmp_path / "further")
    few = step_distill.training(step_distill.Config(student=str(further)), source_of())
    parts = [read_parts(open_checkpoint(each)) for each in (routed, further, exported(few, tmp_path / "few"))]
    assert [(each["router"].settings["least"], each["router"].settings["most"]) for each in parts] == [
        (3, 6),
        (3, 7),
        (3, 7),
    ]


def test_a_presets_router_may_be_told_the_timestep_alone():
    training = traced(pare_stage2, pare_stage2.Config(model="wan2.1-t2v-1.3b", content=False))
    assert training.trained["router"].config.content == "none"


def test_adapters_have_the_rank_that_is_asked_for(tmp_path):
    config = ddit.Config(rank=3, seed=3)
    low = exported(ddit.training(config, source_of()), tmp_path / "low")
    parts = read_parts(open_checkpoint(low))
    assert parts["ddit"].leaves["2p.lora.blocks.mlp.up.down"].shape == (10, 192, 3)
    again = ddit.training(replace(config, seed=5), source_of(low)).trained
    np.testing.assert_array_equal(again["4p"].residual.conv[...], parts["ddit"].leaves["4p.residual.conv"])
    with pytest.raises(UserError, match=r"rank is 0, and .*low has adapters of rank 3: expected the same; set rank=3"):
        ddit.training(replace(config, rank=0), source_of(low))
    with pytest.raises(UserError, match="rank is -1, expected a whole number from 0"):
        ddit.training(replace(config, rank=-1), source_of())


def test_adapters_are_trained_for_the_sizes_that_are_asked_for(tmp_path):
    small = ddit.training(ddit.Config(sizes="2p"), source_of())
    assert list(small.trained) == ["2p"] and [update.trains for update in small.plan.updates] == [("2p",)]
    parts = read_parts(open_checkpoint(exported(small, tmp_path / "small")))
    parse_plan("ddit:sizes=2p").check((10,), parts)
    both = exported(ddit.training(ddit.Config(), source_of()), tmp_path / "both")
    more = ddit.training(ddit.Config(sizes="4p"), source_of(both))
    assert sorted(more.trained) == ["2p", "4p"] and [update.trains for update in more.plan.updates] == [("4p",)]
    with pytest.raises(
        UserError, match=r"sizes are 2p/4p, and .*small has adapters for 2p: expected no 4p; set sizes=2p"
    ):
        ddit.training(ddit.Config(), source_of(tmp_path / "small"))
    with pytest.raises(UserError, match="sizes are '8p', expected one of 2p/4p, 2p, 4p"):
        ddit.training(ddit.Config(sizes="8p"), source_of())


def test_every_size_comes_up_as_often_and_its_rate_ends_at_nothing():
    steps = 201
    training = ddit.training(ddit.Config(steps=steps, warmup=4, weight_decay=0.0), source_of())
    turns = [training.turn(position) for position in range(steps)]
    assert turns.count(0) in (100, 101) and turns != [0, 1] * 100 + [0]
    for number, update in enumerate(training.plan.updates):
        weights = {"x": np.ones(1, np.float32)}
        state, sizes = update.optimizer.init(weights), []
        for _ in range(turns.count(number)):
            change, state = update.optimizer.update({"x": np.ones(1, np.float32)}, state, weights)
            sizes.append(float(abs(change["x"][0])))
        assert np.argmax(sizes) == 2 and sizes[2] == pytest.approx(1e-4, rel=1e-3), "warmed up over its own half"
        assert sizes[-1] < 1e-6


def test_prodigy_is_told_a_factor_and_not_a_rate():
    with pytest.raises(UserError, match=r"learning_rate is 0.0001 with optimizer prodigy.* set learning_rate=1"):
        ddit.training(ddit.Config(optimizer="prodigy", learning_rate=1e-4), source_of())
    assert ddit.training(ddit.Config(optimizer="prodigy"), source_of()).plan.updates


def test_adapters_of_flux_are_trained_by_prodigy_and_those_of_wan_by_adamw():
    weights = {"x": np.ones(1, np.float32)}
    for model, expected in (("flux.1-dev", True), ("wan2.1-t2v-1.3b", False)):
        update, *_ = ddit.training(ddit.Config(), source_of(model)).plan.updates
        assert ("Prodigy" in str(update.optimizer.init(weights))) == expected


def test_a_folder_of_a_whole_model_is_planned_with_the_student_that_it_would_have():
    planned = Source("demo-wan", training_mesh("fsdp=1"), planned=True)
    student = pare_stage1.training(pare_stage1.Config(), planned).target.config
    assert (student.heads, student.mlp_width) == (6, 352) != (planned.config.heads, planned.config.mlp_width)


def test_all_blocks_are_compared_where_none_are_drawn():
    source = source_of("wan2.1-t2v-1.3b")
    assert pare_stage1.Config(sampled_blocks=0).settings(source).sampled_blocks == 30


@pytest.mark.parametrize("recipe", [pare_stage1, pare_stage2])
def test_block_outputs_weigh_as_much_as_is_asked_for(recipe):
    settings = [recipe.Config(**told).settings(source_of("demo-flux")) for told in ({}, {"features": 0.5})]
    assert [each.weights for each in settings] == [
        PareWeights(features=10, motion=0), PareWeights(features=0.5, motion=0),
    ]  # fmt: skip
    assert settings[0] == replace(settings[1], weights=settings[0].weights)


def test_a_model_that_is_told_its_guidance_is_told_the_same_in_training_and_after():
    dev, demo = FluxConfig(guidance=True), source_of("demo-flux").config
    config = step_distill.Config(guidance=2.5)
    of_dev, of_demo = (step_distill.run_with(config, each) for each in (dev, demo))
    assert (of_dev["few_step"]["guidance"], of_dev["few_step"]["guidance_scale"]) == (2.5, 1.0)
    assert (of_dev[DEFAULTS_FILE]["guidance"], of_dev[DEFAULTS_FILE]["true_cfg"]) == (2.5, 1.0)
    assert "guidance" not in of_demo["few_step"] and of_demo[DEFAULTS_FILE]["guidance"] == 1.0


def test_the_real_score_is_guided_once(monkeypatch):
    scales = []
    monkeypatch.setattr(step_distill, "step_distill", lambda *told, settings: scales.append(settings.guidance_scale))
    given = step_distill.Config(teacher_scale=2.0, data="")
    for model, config in (
        ("flux.1-dev", step_distill.Config()),
        ("flux.1-dev", given),
        ("demo-wan", step_distill.Config()),
    ):
        student = step_distill.training(config, Source(model, training_mesh("fsdp=1"), planned=True)).plan.updates[-1]
        student.loss(None, None, {"latents": np.zeros(1)}, None)
    assert scales == [1.0, 2.0, 3.0]


def test_adapters_without_low_rank_maps(tmp_path):
    config = ddit.Config(rank=0)
    bare = exported(ddit.training(config, source_of()), tmp_path / "bare")
    parts = read_parts(open_checkpoint(bare))
    assert parts["ddit"].settings["rank"] == 0 and not any(".lora." in name for name in parts["ddit"].leaves)
    assert set(params_of(ddit.training(config, source_of(bare)).trained)) == set(parts["ddit"].leaves)
    with pytest.raises(UserError, match=r"rank is 32, and .*bare has adapters of rank 0"):
        ddit.training(ddit.Config(), source_of(bare))
    assert not traced(ddit, replace(config, model="wan2.1-t2v-1.3b")).trained["2p"].lora


def test_blocks_that_are_ramped_alike_skip_alike_and_need_no_coherence(tmp_path):
    config = coredit.Config(adaptive=False, ratio=0.1, ramp_every=2, out=str(tmp_path))
    told = []
    ramp = coredit.Ramp(
        config=config, source=source_of(), driven=lambda state, batch, key: told.append(batch["skipped"].tolist())
    )
    latents = np.zeros((1, 2, 4, 20, 14, 16), np.float16)  # 4 frames of 10x7 tokens; a turn is of 4
    for position in range(150):
        ramp(None, {"latents": latents[0], POSITION: position}, jax.random.key(0))
    assert told[:5] == [[1] * 4 + [0] * 6] * 2 + [[1] * 8 + [0] * 2] * 2 + [[2, 2] + [1] * 8]
    assert told[-1] == [28] * 10
    assert len({sum(skipped) for skipped in told}) == 70 and max(map(np.ptp, told)) == 1
