"""`dit-generate` from its arguments to its files, on a tiny model with random weights."""

import json

import av
import numpy as np
import pytest
from PIL import Image

from infer import generate, media

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
    assert run(model, "--prompt", PROMPT, "--out", str(out), "--seed", "5", "--guidance", "2", *SMALL, "--json") == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out.splitlines()[-1])
    assert set(report) == {"compile_seconds", "run_seconds", "tokens", "steps", "plan", "out"}
    assert report["tokens"] == 2 * 2 * 3 and report["steps"] == 2 and report["plan"] == "dense"
    assert frames_of(out).shape == (5, 32, 48, 3)
    metadata = media.read_metadata(out)
    assert metadata["seed"] == 5 and metadata["prompt"] == PROMPT and metadata["plan"] == "dense"
    assert len(metadata["checkpoint"]) >= 8
    assert "denoise" in printed.err or "decode" in printed.err
    assert sorted(path.name for path in out.parent.iterdir()) == ["cat.mp4"], "no latents, no partial files"


@pytest.mark.parametrize("suffix", [".webm", ".gif", ".webp"])
def test_other_types(model, tmp_path, suffix):
    out = tmp_path / f"cat{suffix}"
    assert run(model, "--prompt", PROMPT, "--out", str(out), *SMALL) == 0
    if suffix == ".webm":
        assert len(frames_of(out)) == 5
    else:
        assert Image.open(out).n_frames == 5


def test_one_frame_as_png(model, tmp_path):
    out = tmp_path / "cat.png"
    assert run(model, "--prompt", PROMPT, "--out", str(out), "--size", "48x32", "--frames", "1", "--steps", "1") == 0
    assert Image.open(out).size == (48, 32) and media.read_metadata(out)["frames"] == 1


def test_a_file_of_prompts(model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\n\nthe dog sleeps\n")
    assert run(model, "--prompts", str(prompts), "--out", str(tmp_path / "v.mp4"), *SMALL, "--seed", "3") == 0
    first, second = (media.read_metadata(tmp_path / f"v-00{i}.mp4") for i in range(2))
    assert (first["prompt"], first["seed"]) == ("a red cat", 3) and (second["prompt"], second["seed"]) == (
        "the dog sleeps",
        4,
    )


def test_a_failed_decode_loses_nothing(model, tmp_path, monkeypatch):
    from infer.pipeline import WanPipeline

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
