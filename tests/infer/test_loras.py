"""LoRAs of a pipeline: against diffusers, and merging, changing and removing them without compiling again."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_flux
import torch
from beside_diffusers import by_diffusers, by_ours, starting_noise
from fake_devices import printed
from safetensors.numpy import load_file, save_file

from convert import lora_export
from convert.checkpoint import open_checkpoint
from convert.lora_keys import Target
from dit_jax.config import UserError
from dit_jax.lora import merged, untrained
from dit_jax.parameters import named_leaves
from infer import generate, load_pipeline, media
from infer.loras import parse_choice, read_choice

SIZE = (96, 64)
VIDEO = dict(size=(32, 48), frames=5, steps=3, guidance=4.0)
FLUX_LAYERS = [
    "transformer_blocks.1.attn.to_q",
    "transformer_blocks.0.attn.add_k_proj",
    "transformer_blocks.0.ff.net.2",
]
FLUX_LAYERS += [
    f"single_transformer_blocks.{i}.{name}" for i in (0, 1) for name in ("attn.to_k", "proj_mlp", "proj_out")
]
CLIP_LAYERS = [f"text_model.encoder.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.fc1")]
T5_LAYERS = ["encoder.block.0.layer.0.SelfAttention.q", "encoder.block.1.layer.1.DenseReluDense.wo"]
WAN_LAYERS = [f"blocks.{i}.{name}" for i in (0, 2) for name in ("attn1.to_k", "attn2.to_out.0", "ffn.net.0.proj")]
EXPERT_LAYERS = [name.replace("blocks.2", "blocks.1") for name in WAN_LAYERS]


def weights_of(model):
    """Shapes of weights, by their names with and without the prefix that transformers 5 has dropped."""
    shapes = {name.removesuffix(".weight"): tuple(p.shape) for name, p in model.state_dict().items()}
    return shapes | {f"text_model.{name}": shape for name, shape in shapes.items()}


def write_lora(file, models, seed=0, key="{component}.{name}.lora_{half}.weight"):
    """A LoRA file in diffusers' style, alphas other than ranks in its metadata.

    models  component -> (diffusers' model, names of layers)
    """
    rng, tensors, metadata = np.random.default_rng(seed), {}, {}
    for component, (model, layers) in models.items():
        shapes, config = weights_of(model), {"r": 2, "lora_alpha": 3, "rank_pattern": {}, "alpha_pattern": {}}
        for number, name in enumerate(layers):
            rank, (outputs, inputs) = 1 + number % 3, shapes[name]
            half = dict(zip("AB", [(rank, inputs), (outputs, rank)], strict=True))
            for letter, shape in half.items():
                value = 0.7 * rng.standard_normal(shape).astype(np.float32) / shape[1] ** 0.5
                tensors[key.format(component=component, name=name, half=letter)] = value
            pattern = name.removeprefix("text_model.") if component != "transformer" else f"^{name}"
            config["rank_pattern"][pattern], config["alpha_pattern"][pattern] = rank, rank * (0.5 + number % 2)
        config["target_modules"] = [name.removeprefix("text_model.") for name in layers]
        metadata |= {f"{component}.{name}": value for name, value in config.items()}
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(metadata)})
    return file


def leaves(pipe):
    models = {name: holder[key] for name, (holder, key) in pipe.lora_models().items()}
    return {f"{c}.{name}": np.asarray(leaf) for c, model in models.items() for name, leaf in named_leaves(model)}


def differing(one, other):
    return {name for name in one if not np.array_equal(one[name], other[name])}


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """(folder, diffusers pipeline, ours) of a tiny FLUX dev."""
    folder, theirs = tmp_path_factory.mktemp("flux") / "tiny-flux", tiny_flux.pipeline(dev=True)
    theirs.save_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    return folder, theirs, load_pipeline(folder)


@pytest.fixture(scope="module")
def wan(text_to_video):
    folder, theirs = text_to_video
    return folder, theirs, load_pipeline(folder)


@pytest.fixture
def flux_lora(flux, tmp_path):
    _, theirs, _ = flux
    models = {"transformer": (theirs.transformer, FLUX_LAYERS), "text_encoder": (theirs.text_encoder, CLIP_LAYERS)}
    return write_lora(tmp_path / "style.safetensors", models)


@pytest.fixture
def wan_loras(wan, tmp_path):
    models = {"transformer": (wan[1].transformer, WAN_LAYERS)}
    return [write_lora(tmp_path / f"{seed}.safetensors", models, seed) for seed in (0, 1)]


def packed(latents):
    b, _, y, x, c = latents.shape
    z = torch.tensor(latents)[:, 0].permute(0, 3, 1, 2).reshape(b, c, y // 2, 2, x // 2, 2)
    return z.permute(0, 2, 4, 1, 3, 5).reshape(b, y * x // 4, 4 * c)


def flux_by_diffusers(theirs, file, strength, noise):
    """Latents [B, 1, Y, X, C] that diffusers makes with a LoRA."""
    options = dict(prompt="a red cat", width=SIZE[0], height=SIZE[1], num_inference_steps=3, guidance_scale=2.5)
    theirs.load_lora_weights(file, adapter_name="style")
    theirs.set_adapters("style", strength)
    try:
        with torch.no_grad():
            latents = theirs(**options, latents=packed(noise), output_type="latent").images
    finally:
        theirs.unload_lora_weights()
    latents = theirs._unpack_latents(latents, SIZE[1], SIZE[0], theirs.vae_scale_factor)
    return latents.permute(0, 2, 3, 1)[:, None].numpy()


def flux_by_ours(pipe, noise):
    return pipe("a red cat", size=SIZE, steps=3, guidance=2.5, latents=noise).latents


def wan_by_diffusers(theirs, files, noise):
    """Latents [B, T, Y, X, C] that diffusers makes with LoRAs, (file, strength) each."""
    for number, (file, _) in enumerate(files):
        theirs.load_lora_weights(file, adapter_name=f"lora{number}")
    theirs.set_adapters([f"lora{number}" for number in range(len(files))], [strength for _, strength in files])
    try:
        with torch.no_grad():
            expected = theirs(
                prompt="a red cat", width=48, height=32, num_frames=5, num_inference_steps=3, guidance_scale=4.0,
                latents=torch.tensor(noise).permute(0, 4, 1, 2, 3), output_type="latent",
            ).frames  # fmt: skip
    finally:
        theirs.unload_lora_weights()
    return expected.permute(0, 2, 3, 4, 1).numpy()


def wan_by_ours(pipe, noise):
    return pipe("a red cat", **VIDEO | {"size": (48, 32), "latents": noise}).latents


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


FLUX_NOISE, WAN_NOISE = normal(1, 1, 8, 12, tiny_flux.CHANNELS), normal(1, 2, 4, 6, 4)


def test_a_flux_pipeline_with_a_lora_equals_diffusers(flux, flux_lora):
    _, theirs, pipe = flux
    expected = flux_by_diffusers(theirs, flux_lora, 0.8, FLUX_NOISE)
    plain = flux_by_ours(pipe, FLUX_NOISE)
    pipe.set_loras([(flux_lora, 0.8)])
    found = flux_by_ours(pipe, FLUX_NOISE)
    pipe.set_loras([])
    assert relative(found, expected) <= 1e-4
    assert relative(plain, expected) > 1e-2


def test_a_wan_pipeline_with_two_loras_equals_diffusers(wan, wan_loras):
    _, theirs, pipe = wan
    loras = [(wan_loras[0], 0.8), (wan_loras[1], -0.5)]
    expected = wan_by_diffusers(theirs, loras, WAN_NOISE)
    plain = wan_by_ours(pipe, WAN_NOISE)
    pipe.set_loras(loras)
    found = wan_by_ours(pipe, WAN_NOISE)
    pipe.set_loras([])
    assert relative(found, expected) <= 1e-4
    assert relative(plain, expected) > 1e-2


@pytest.mark.parametrize("model", ["flux", "wan"])
def test_a_lora_of_our_own_is_in_diffusers_what_it_is_in_our_weights(model, request, tmp_path):
    _, theirs, pipe = request.getfixturevalue(model)
    component = pipe.checkpoint.component("transformer")
    rng, lora = np.random.default_rng(0), untrained(component.abstract, rank=3)
    lora = {
        name: replace(adapter, up=0.2 * rng.standard_normal(adapter.up.shape, np.float32), alpha=1.5 * adapter.alpha)
        for name, adapter in lora.items()
    }
    lora_export.write_lora({"transformer": lora}, {"transformer": Target.of(component)}, tmp_path / "lora")
    if model == "flux":
        expected = flux_by_diffusers(theirs, tmp_path / "lora", 1.0, FLUX_NOISE)
        run = partial(flux_by_ours, pipe, FLUX_NOISE)
    else:
        expected = wan_by_diffusers(theirs, [(tmp_path / "lora", 1.0)], WAN_NOISE)
        run = partial(wan_by_ours, pipe, WAN_NOISE)
    plain = run()
    pipe.set_loras([tmp_path / "lora"])
    from_file = run()
    pipe.set_loras([])
    holder, key = pipe.lora_models()["transformer"]
    own = holder[key]
    holder[key] = merged(own, [(lora, 1.0)])
    found = run()
    holder[key] = own
    assert relative(found, expected) <= 1e-4 and relative(from_file, expected) <= 1e-4
    assert relative(plain, expected) > 1e-2


def test_strengths_change_and_loras_go_without_compiling_again(wan, wan_loras):
    _, _, pipe = wan
    pristine, plain = leaves(pipe), pipe("a red cat", **VIDEO).latents
    known = len(pipe.programs)
    found = []
    for strength in (0.8, 0.3, 0.8):
        pipe.set_loras([(wan_loras[0], strength)])
        found.append((leaves(pipe), pipe("a red cat", **VIDEO).latents))
    assert not differing(found[0][0], found[2][0]), "merging again is not merging twice"
    assert differing(found[0][0], found[1][0]) == differing(found[0][0], pristine)
    assert relative(found[0][1], found[1][1]) > 1e-3
    pipe.set_loras([wan_loras[1]])
    pipe.set_loras([])
    assert not differing(leaves(pipe), pristine), "unmerging is exact"
    np.testing.assert_array_equal(pipe("a red cat", **VIDEO).latents, plain)
    assert len(pipe.programs) == known


def test_a_pipeline_in_bf16_gets_its_own_weights_back(wan, wan_loras):
    folder, _, exact = wan
    pipe = load_pipeline(folder, dtype=jnp.bfloat16, lora=[(wan_loras[0], 0.8)])
    touched = {name for name in leaves(pipe) if "attn1.k.linear.kernel" in name}
    merged = leaves(pipe)
    pipe.set_loras([])
    pristine = leaves(pipe)
    assert touched < differing(merged, pristine) and pristine[min(touched)].dtype == jnp.bfloat16
    assert not differing(pristine, leaves(load_pipeline(folder, dtype=jnp.bfloat16)))
    exact.set_loras([(wan_loras[0], 0.8)])
    gap = [relative(np.float32(merged[name]), leaves(exact)[name]) for name in differing(merged, pristine)]
    exact.set_loras([])
    assert max(gap) < 2**-8


@pytest.mark.parametrize(("clip", "t5"), [("lora_te1_", "lora_te3_"), ("lora_te_", "lora_te2_")])
def test_kohyas_text_encoders_are_merged_into_both_encoders(flux, tmp_path, clip, t5):
    _, theirs, pipe = flux
    models = {"text_encoder": (theirs.text_encoder, CLIP_LAYERS), "text_encoder_2": (theirs.text_encoder_2, T5_LAYERS)}
    pipe.set_loras([write_lora(tmp_path / "a.safetensors", models)])
    expected = leaves(pipe)
    dotted = write_lora(tmp_path / "b.safetensors", models)
    kohya = {}
    for key, value in load_file(dotted).items():
        component, _, name = key.partition(".")
        name, half = name.split(".lora_")
        layer = (t5 if component == "text_encoder_2" else clip) + name.replace(".", "_")
        number = (T5_LAYERS if component == "text_encoder_2" else CLIP_LAYERS).index(name)
        kohya[f"{layer}.{'lora_down' if half[0] == 'A' else 'lora_up'}.weight"] = value
        kohya[f"{layer}.alpha"] = np.array((1 + number % 3) * (0.5 + number % 2), np.float32)
    save_file(kohya, tmp_path / "kohya.safetensors")
    pipe.set_loras([tmp_path / "kohya.safetensors"])
    found = leaves(pipe)
    pipe.set_loras([])
    assert not differing(found, expected)
    assert {name.split(".")[0] for name in differing(found, leaves(pipe))} == {"text_encoder", "text_encoder_2"}


def test_a_lora_that_does_not_fit_leaves_the_pipeline_as_it_was(wan, wan_loras, flux_lora):
    _, _, pipe = wan
    pipe.set_loras([(wan_loras[0], 0.8)])
    before, told = leaves(pipe), pipe.loras
    for loras in ([wan_loras[1], flux_lora], [(wan_loras[1], float("nan"))], [(wan_loras[1], "much")], ["/no/such"]):
        with pytest.raises(UserError):
            pipe.set_loras(loras)
    assert not differing(leaves(pipe), before) and pipe.loras == told
    pipe.set_loras([])


def test_the_command_merges_loras_and_records_them(wan, wan_loras, tmp_path, capsys):
    out = tmp_path / "x.mp4"
    arguments = ["--model", str(wan[0]), "--prompt", "a red cat", "--size", "48x32", "--frames", "5", "--steps", "1"]
    arguments += ["--out", str(out), "--lora", f"{wan_loras[0]}:0.8", "--lora", str(wan_loras[1])]
    assert generate.main(arguments) == 0
    told = media.read_metadata(out)["loras"]
    assert [(lora["name"], lora["strength"]) for lora in told] == [("0.safetensors", 0.8), ("1.safetensors", 1.0)]
    assert told[0]["hash"] != told[1]["hash"] and len(told[0]["hash"]) == 12


def test_latents_that_a_lora_made_are_decoded_under_its_name(wan, wan_loras, tmp_path, monkeypatch, capsys):
    out, latents = tmp_path / "x.mp4", tmp_path / "x.mp4.latents.safetensors"
    arguments = ["--model", str(wan[0]), "--out", str(out)]
    lora = ["--lora", f"{wan_loras[0]}:0.5"]
    with monkeypatch.context() as patched:
        patched.setattr(
            media, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device", "x.mp4"))
        )
        size = ["--prompt", "a red cat", "--size", "48x32", "--frames", "5", "--steps", "1"]
        assert generate.main([*arguments, *lora, *size]) == 2
    capsys.readouterr()
    assert generate.main([*arguments, "--from-latents", str(latents)]) == 2
    assert "pass the --lora that made it" in capsys.readouterr().err
    assert generate.main([*arguments, *lora, "--from-latents", str(latents)]) == 0
    assert media.read_metadata(out)["loras"][0]["strength"] == 0.5


def test_unmatched_keys_stop_the_command_or_are_a_warning(wan, wan_loras, flux_lora, tmp_path, capsys):
    odd = {"transformer.blocks.9.attn1.to_k.lora_A.weight": np.ones((1, 32), np.float32)}
    save_file(load_file(wan_loras[0]) | odd, tmp_path / "odd.safetensors")
    arguments = ["--model", str(wan[0]), "--prompt", "a red cat", "--size", "48x32", "--frames", "5", "--steps", "1"]
    arguments += ["--out", str(tmp_path / "x.mp4"), "--lora", str(tmp_path / "odd.safetensors")]
    assert generate.main(arguments) == 2
    assert "1 keys match no layer" in capsys.readouterr().err and not (tmp_path / "x.mp4").exists()
    assert generate.main([*arguments, "--allow-unmatched"]) == 0
    error = capsys.readouterr().err
    assert "warning: " in error and "blocks.9.attn1.to_k" in error and (tmp_path / "x.mp4").exists()


def test_a_strength_stands_behind_a_colon(tmp_path):
    (tmp_path / "a:1").write_text("")
    assert parse_choice("style.safetensors") == ("style.safetensors", 1.0, "transformer")
    assert parse_choice("style.safetensors:-0.5") == ("style.safetensors", -0.5, "transformer")
    assert parse_choice("transformer_2=style.safetensors:0.5") == ("style.safetensors", 0.5, "transformer_2")
    assert parse_choice(f"{tmp_path}/a:1") == (f"{tmp_path}/a:1", 1.0, "transformer")
    assert parse_choice("a=b.safetensors")[0] == "a=b.safetensors"
    with pytest.raises(UserError, match="expected a number"):
        parse_choice("style.safetensors:strong")


def test_each_expert_has_its_loras_also_when_it_is_read_again(text_experts, tmp_path):
    folder, theirs = text_experts
    files = [
        write_lora(tmp_path / f"{seed}.safetensors", {"transformer": (theirs.transformer, EXPERT_LAYERS)}, seed)
        for seed in (0, 1)
    ]
    theirs.load_lora_weights(files[0], adapter_name="high")
    theirs.load_lora_weights(files[1], adapter_name="low", load_into_transformer_2=True)
    theirs.transformer.set_adapters("high", 0.8)
    theirs.transformer_2.set_adapters("low", -0.5)
    try:
        expected, _ = by_diffusers(theirs, "unipc", starting_noise(), (3.5, 2.0))
    finally:
        theirs.transformer.unload_lora()
        theirs.transformer_2.unload_lora()
    loras = [(files[0], 0.8), (files[1], -0.5, "transformer_2")]
    resident = load_pipeline(folder)
    plain = by_ours(resident, "unipc", starting_noise(), (3.5, 2.0)).latents
    resident.set_loras(loras)
    found = by_ours(resident, "unipc", starting_noise(), (3.5, 2.0)).latents
    assert relative(found, expected) <= 1e-4 and relative(plain, expected) > 1e-2
    offloading = load_pipeline(folder, lora=loras, offload_expert=True)
    for _ in range(2):
        again = by_ours(offloading, "unipc", starting_noise(), (3.5, 2.0)).latents
        np.testing.assert_array_equal(again, found)
    for pipe in (resident, offloading):
        pipe.set_loras([])
        np.testing.assert_array_equal(by_ours(pipe, "unipc", starting_noise(), (3.5, 2.0)).latents, plain)


def test_a_lora_for_an_expert_that_is_not_there_is_refused(wan, wan_loras):
    with pytest.raises(UserError, match="'transformer_2', which the model lacks"):
        wan[2].set_loras([(wan_loras[0], 1.0, "transformer_2")])


def test_a_lora_of_both_experts_is_not_for_one_of_them(text_experts, tmp_path):
    folder, theirs = text_experts
    one = {"transformer": (theirs.transformer, EXPERT_LAYERS)}
    both = one | {"transformer_2": (theirs.transformer_2, EXPERT_LAYERS)}
    checkpoint = open_checkpoint(folder)
    targets = {name: Target.of(checkpoint.component(name)) for name in both}
    file = write_lora(tmp_path / "both.safetensors", both)
    assert read_choice(file, targets, False).parts.keys() == both.keys()
    with pytest.raises(UserError, match=r"both\.safetensors has parts for transformer and transformer_2;.* without"):
        read_choice((file, 1.0, "transformer_2"), targets, False)
    file = write_lora(tmp_path / "low.safetensors", {"transformer_2": both["transformer_2"]})
    assert read_choice((file, 1.0, "transformer_2"), targets, False).parts.keys() == {"transformer_2"}


def test_on_eight_devices_weights_are_the_same_and_programs_stay_valid(wan, wan_loras, tmp_path):
    out = tmp_path / "found.npz"
    printed(Path(__file__).with_name("loras_on_eight_devices.py"), wan[0], wan_loras[0], out)
    pipe = wan[2]
    pipe.set_loras([(wan_loras[0], 0.8)])
    expected, found = leaves(pipe), np.load(out)
    pipe.set_loras([])
    assert max(np.abs(found[name] - weights).max() for name, weights in expected.items()) <= 1e-6
    assert differing(expected, leaves(pipe))
