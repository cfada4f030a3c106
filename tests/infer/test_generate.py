"""`dit-generate` from its arguments to its files, on a tiny model with random weights."""

import json
import os
import shutil
import subprocess
import sys
import warnings

import av
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from infer import contact_sheet, generate, latents_file, media
from infer.wan_pipeline import WanPipeline

SMALL = ["--size", "48x32", "--frames", "5", "--steps", "2"]
PROMPT = "a red cat runs"


def run(folder, *arguments):
    return generate.main(["--model", str(folder), *arguments])


def frames_of(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture
def model(text_to_video):
    return text_to_video[0]


def test_a_video_with_its_metadata(model, tmp_path, capsys):
    out = tmp_path / "deep" / "cat.mp4"
    told = ["--seed", "5", "--guidance", "2", "--shift", "7"]
    assert run(model, "--prompt", PROMPT, "--out", str(out), *told, *SMALL, "--json") == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out.splitlines()[-1])
    assert set(report) == {"compile_seconds", "run_seconds", "tokens", "steps", "plan", "out"}
    assert report["tokens"] == 2 * 2 * 3 and report["steps"] == 2 and report["plan"] == "dense"
    assert frames_of(out).shape == (5, 32, 48, 3)
    metadata = media.read_metadata(out)
    assert metadata["seed"] == 5 and metadata["prompt"] == PROMPT and metadata["plan"] == "dense"
    assert metadata["shift"] == 7
    assert len(metadata["checkpoint"]) >= 8
    assert "denoise" in printed.err or "decode" in printed.err
    assert sorted(path.name for path in out.parent.iterdir()) == ["cat.mp4"], "no latents, no partial files"


def test_a_plan_is_warned_of_once_and_in_a_line(model, tmp_path, capsys):
    with warnings.catch_warnings(record=True) as raw:
        warnings.simplefilter("always")
        assert run(model, "--prompt", PROMPT, "--out", str(tmp_path / "x.gif"), "--plan", "teacache:0.1", *SMALL) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "no model that TeaCache's" in line]
    assert len(told) == 1 and told[0].startswith("warning: plan teacache:0.1 names")
    assert not [one for one in raw if "TeaCache" in str(one.message)]


@pytest.mark.parametrize("suffix", [".webm", ".gif", ".webp"])
def test_other_types(model, tmp_path, suffix):
    out = tmp_path / f"cat{suffix}"
    assert run(model, "--prompt", PROMPT, "--out", str(out), *SMALL) == 0
    if suffix == ".webm":
        assert len(frames_of(out)) == 5
    else:
        assert Image.open(out).n_frames == 5
    metadata = media.read_metadata(out)
    assert (metadata["prompt"], metadata["seed"], metadata["model"]) == (PROMPT, 0, model.name)


def test_one_frame_as_png(model, tmp_path):
    out = tmp_path / "cat.png"
    assert run(model, "--prompt", PROMPT, "--out", str(out), "--size", "48x32", "--frames", "1", "--steps", "1") == 0
    assert Image.open(out).size == (48, 32) and media.read_metadata(out)["frames"] == 1


def test_a_file_of_prompts(model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\n\nthe dog sleeps\n")
    outputs = ["--out", str(tmp_path / "v.mp4"), "--sheet", str(tmp_path / "s.png")]
    assert run(model, "--prompts", str(prompts), *outputs, *SMALL, "--seed", "3") == 0
    first, second = (media.read_metadata(tmp_path / f"v-00{i}.mp4") for i in range(2))
    assert (first["prompt"], first["seed"]) == ("a red cat", 3) and (second["prompt"], second["seed"]) == (
        "the dog sleeps",
        4,
    )
    sheets = sorted(tmp_path.glob("s*.png"))
    assert [path.name for path in sheets] == ["s-000.png", "s-001.png"]
    assert sheets[0].read_bytes() != sheets[1].read_bytes()


def test_a_failed_decode_loses_nothing(model, tmp_path, monkeypatch):
    whole, again = tmp_path / "whole.mp4", tmp_path / "again.mp4"
    assert run(model, "--prompt", PROMPT, "--out", str(whole), *SMALL) == 0
    decode = WanPipeline.decode

    def out_of_memory(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr(WanPipeline, "decode", out_of_memory)
    with pytest.raises(MemoryError):
        run(model, "--prompt", PROMPT, "--out", str(again), *SMALL)
    kept = tmp_path / "again.mp4.latents.safetensors"
    assert kept.exists() and not again.exists()
    monkeypatch.setattr(WanPipeline, "decode", decode)
    assert run(model, "--from-latents", str(kept), "--out", str(again)) == 0
    np.testing.assert_array_equal(frames_of(again), frames_of(whole))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", PROMPT, "--out", "x.mp4", "--size", "50x32"], ["50x32", "48x32"]),
        (["--prompt", PROMPT, "--out", "x.mp4", "--size", "big"], ["big", "832x480"]),
        (["--prompt", PROMPT, "--out", "x.mp4", "--frames", "6"], ["6 frames", "5 and 9"]),
        (["--prompt", "", "--out", "x.mp4"], ["prompt is empty"]),
        (["--out", "x.mp4"], ["--prompt"]),
        (["--prompt", PROMPT, "--out", "x.avi"], ["x.avi", ".mp4"]),
        (["--prompt", PROMPT, "--out", "x.png", "--frames", "5"], ["5 frames", ".png"]),
        (["--prompt", PROMPT, "--out", "x.mp4", "--image", __file__], ["test_generate.py"]),
        (["--prompt", PROMPT, "--out", "x.mp4", "--mesh", "dta=2"], ["dta"]),
        (["--prompt", PROMPT, "--out", "x.mp4", "--mesh", "data=3"], ["data=3"]),
        (["--prompts", "nowhere.txt", "--out", "x.mp4"], ["nowhere.txt"]),
        (["--from-latents", "nowhere.safetensors", "--out", "x.mp4"], ["nowhere.safetensors"]),
        (["--prompt", PROMPT, "--out", "x.mp4", "--solver", "heun"], ["heun", "unipc"]),
        (["--prompt", PROMPT, "--out", "x.mp4", "--shift", "-1"], ["shift is -1.0", "above 0"]),
        (["--prompt", PROMPT, "--out", "x.mp4", "--sheet", "x.gif"], ["x.gif", ".png"]),
        (["--prompt", PROMPT, "--out", "x.mp4", "--seed", "4294967296"], ["4294967296", "4294967295"]),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(model, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert run(model, *arguments) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in printed for word in words)
    assert list(tmp_path.iterdir()) == []


def test_an_image_for_a_text_model_is_refused(model, tmp_path, capsys):
    image = tmp_path / "first.png"
    Image.new("RGB", (48, 32)).save(image)
    assert run(model, "--prompt", PROMPT, "--out", str(tmp_path / "x.mp4"), "--image", str(image)) == 2
    assert "text-to-video" in capsys.readouterr().err


def test_an_unknown_model_or_flag(tmp_path, capsys):
    assert run(tmp_path / "nothing-here", "--prompt", PROMPT, "--out", "x.mp4") == 2
    assert "nothing-here" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        generate.main(["--prompt", PROMPT, "--out", "x.mp4", "--colour", "red"])
    assert stop.value.code == 2


def test_help_shows_the_grammar_of_the_shipped_model(capsys):
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    assert "on a BACKGROUND background" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--out", "--sheet"])
@pytest.mark.parametrize("name", ["file/x.png", "/proc/x.png", "folder.png"])
def test_what_cannot_be_written_is_told_before_the_model_is_loaded(tmp_path, monkeypatch, capsys, option, name):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(generate, "_load", lambda options: pytest.fail("a model was loaded"))
    outputs = {"--out": str(tmp_path / "fine.png"), option: str(tmp_path / name)}
    assert generate.main(["--prompt", PROMPT, *(word for pair in outputs.items() for word in pair)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and name in lines[0]


def test_a_disk_that_fails_later_is_one_sentence_and_keeps_the_latents(model, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "cat.mp4")

    monkeypatch.setattr(media, "save", full)
    assert run(model, "--prompt", PROMPT, "--out", str(tmp_path / "cat.mp4"), *SMALL) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "dit-generate: cat.mp4: No space left on device."
    assert [path.name for path in tmp_path.iterdir()] == ["cat.mp4.latents.safetensors"]


def test_half_written_latents_are_never_seen(model, tmp_path, monkeypatch):
    def cut_off(tensors, path, details):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(latents_file, "save_file", cut_off)
    assert run(model, "--prompt", PROMPT, "--out", str(tmp_path / "cat.mp4"), *SMALL) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_failed_sheet_leaves_the_video(model, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no room")

    monkeypatch.setattr(contact_sheet, "contact_sheet", fail)
    out, sheet = tmp_path / "cat.mp4", tmp_path / "cat.png"
    assert run(model, "--prompt", PROMPT, "--out", str(out), "--sheet", str(sheet), *SMALL) == 2
    assert len(frames_of(out)) == 5


def test_a_word_outside_the_grammar_is_told(model, tmp_path, capsys):
    folder = shutil.copytree(model, tmp_path / "digits")
    (folder / "generation_defaults.json").write_text('{"grammar": "moving-digits"}')
    assert run(folder, "--prompt", "a red 7 chasing a blue 2", "--out", str(tmp_path / "x.mp4"), *SMALL) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "'chasing'" in warnings[0]


def test_an_image_to_video_model(image_to_video, tmp_path, capsys):
    image, out = tmp_path / "first.png", tmp_path / "x.mp4"
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (50, 70, 3), np.uint8)).save(image)
    arguments = ["--prompt", PROMPT, "--out", str(out), *SMALL]
    assert run(image_to_video[0], *arguments) == 2
    assert "pass one as image (--image FILE in a command)" in capsys.readouterr().err
    assert run(image_to_video[0], *arguments, "--image", str(image), str(image)) == 2
    assert "2 images came with 1 prompts: expected one for each, or one for all" in capsys.readouterr().err
    assert run(image_to_video[0], *arguments, "--image", str(image)) == 0
    assert frames_of(out).std() > 10


def test_a_model_with_nan_in_it(model, tmp_path, capsys):
    folder = shutil.copytree(model, tmp_path / "nan")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["patch_embedding.bias"] = np.full_like(tensors["patch_embedding.bias"], np.nan)
    save_file(tensors, file, {"format": "pt"})
    assert run(folder, "--prompt", PROMPT, "--out", str(tmp_path / "x.mp4"), *SMALL) == 2
    assert "NaN" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["nan"]


def test_a_mesh_of_two_devices(model, tmp_path):
    out = tmp_path / "x.png"
    run = subprocess.run(
        [sys.executable, "-m", "infer.generate", "--model", str(model), "--prompt", PROMPT, "--out", str(out),
         "--size", "48x32", "--frames", "1", "--steps", "1", "--mesh", "context=2"],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert Image.open(out).size == (48, 32)
