"""`dit-generate --names vbench`: many videos in one folder, gone on with after a stop, on a tiny model."""

import json
import os
import signal
import subprocess
import sys

import jax
import pytest

from infer import generate, media, video_series

SMALL = ["--size", "48x32", "--frames", "5", "--steps", "2"]
PROMPTS = ["a red cat runs", "the dog sleeps."]
ALL = [f"{prompt}-{index}.mp4" for prompt in PROMPTS for index in range(2)]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "videos"


@pytest.fixture
def command(text_to_video, folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, PROMPTS[0]]))
    prompts = ["--prompts", str(tmp_path / "prompts.txt"), "--seeds", "2"]
    return ["--model", str(text_to_video[0]), *prompts, "--names", "vbench", "--out", str(folder), "--json", *SMALL]


@pytest.fixture
def run(command, capsys):
    def run(*arguments):
        """The report, or what was told of bad input."""
        code = generate.main([*command, *arguments])
        printed = capsys.readouterr()
        return json.loads(printed.out.splitlines()[-1]) if code == 0 else printed.err.splitlines()[-1]

    return run


@pytest.fixture
def saves(monkeypatch):
    """For each video that is written, its name and how many programs had been compiled."""
    compiled, found, save = [], [], media.save
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )

    def noted(path, *rest):
        save(path, *rest)
        found.append((path.name, len(compiled)))

    monkeypatch.setattr(media, "save", noted)
    return found


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_samples_of_every_prompt_by_the_same_programs(run, folder, saves):
    report = run("--seed", "7", "--plan", "coredit:0.3")
    assert (report["made"], report["there"], report["out"]) == (4, 0, [str(folder)])
    assert [name for name, _ in saves] == ALL and names(folder) == sorted(ALL)
    compiled = [count for _, count in saves]
    assert compiled[0] > 0 and len(set(compiled)) == 1, "only the first video may compile"
    for name in ALL:
        metadata = media.read_metadata(folder / name)
        assert f"{metadata['prompt']}-{metadata['seed'] - 7}.mp4" == name
        assert metadata["plan"] == "coredit:0.3"


def test_what_is_there_whole_is_skipped(run, folder, saves, text_to_video):
    run()
    first, cut = folder / ALL[0], folder / ALL[2]
    before = {name: (folder / name).read_bytes() for name in ALL}
    assert len({*before.values()}) == 4
    (folder / ALL[1]).unlink()
    cut.write_bytes(before[ALL[2]][: len(before[ALL[2]]) // 2])
    saves.clear()
    report = run()
    assert (report["made"], report["there"]) == (2, 2) and [name for name, _ in saves] == [ALL[1], ALL[2]]
    assert {name: (folder / name).read_bytes() for name in ALL} == before
    cut.write_bytes(b"")
    first.rename(folder / "other.mp4")
    report = run("--seeds", "3")
    assert (report["made"], report["there"]) == (4, 2) and len(names(folder)) == 7
    report = run("--seeds", "3")
    assert (report["made"], report["there"]) == (0, 6) and report["compile_seconds"] == 0


def test_videos_of_another_setting_are_refused(run, folder, tmp_path, text_to_video):
    ratios = tmp_path / "ratios.json"
    ratios.write_text('{"ratios": [0.3, 0.3, 0.3], "stride": 3}')
    plan = ["--plan", f"coredit:{ratios}"]
    run(*plan)
    before = {name: (folder / name).stat().st_mtime_ns for name in ALL}
    changed = {"--steps": "3", "--seed": "1", "--guidance": "2", "--negative-prompt": "blue", "--solver": "euler"}
    for option, value in changed.items():
        told = run(*plan, option, value)
        assert option.strip("-").replace("-", "_") in told and "expected one setting" in told and ALL[0] in told
    assert "plan 'coredit:" in run() and "this run has 'dense'" in run()
    ratios.write_text('{"ratios": [0.3, 0.4, 0.3], "stride": 3}')
    assert "plan_settings" in run(*plan)
    assert {name: (folder / name).stat().st_mtime_ns for name in ALL} == before
    ratios.write_text('{"ratios": [0.3, 0.3, 0.3], "stride": 3}')
    assert run(*plan)["there"] == 4


def test_videos_that_something_else_made_are_refused(run, folder, monkeypatch):
    run()
    with monkeypatch.context() as bare:
        bare.setattr(media.json, "dumps", lambda *_, **__: "")
        media.save(folder / ALL[3], video_frames(folder / ALL[3]), 16, {})
    assert "was not made by dit-generate" in run()


def video_frames(path):
    import av
    import numpy as np

    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_videos_are_named_after_the_prompts_that_theirs_stand_for(run, folder, tmp_path):
    (tmp_path / "names.txt").write_text("a cat\na dog\na cat\n")
    assert run("--names-from", str(tmp_path / "names.txt"))["made"] == 4
    assert names(folder) == ["a cat-0.mp4", "a cat-1.mp4", "a dog-0.mp4", "a dog-1.mp4"]
    assert media.read_metadata(folder / "a dog-1.mp4")["prompt"] == "the dog sleeps."


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--seeds", "0"], "--seeds is 0"),
        (["--images-per-prompt", "2"], "--images-per-prompt has no place"),
        (["--sheet", "x.png"], "leave out --sheet"),
        (["--image", __file__], "leave out --image"),
        (["--out", "x.mp4"], "expected a folder"),
        (["--names-from", __file__], "lines for 3 prompts"),
    ],
)
def test_bad_input_is_one_sentence_before_the_model_is_loaded(run, folder, monkeypatch, arguments, told):
    monkeypatch.setattr(generate, "_load", lambda options: pytest.fail("a model was loaded"))
    found = run(*arguments)
    assert found.startswith("dit-generate: ") and told in found
    assert not folder.exists()


def test_seeds_without_names_are_numbered(text_to_video, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    shared = ["--model", str(text_to_video[0]), "--prompts", str(tmp_path / "prompts.txt"), *SMALL, "--steps", "1"]
    assert generate.main([*shared, "--seeds", "2", "--seed", "5", "--out", str(tmp_path / "v.mp4")]) == 0
    told = [media.read_metadata(tmp_path / f"v-00{index}.mp4") for index in range(4)]
    assert [(one["prompt"], one["seed"]) for one in told] == [(prompt, seed) for prompt in PROMPTS for seed in (5, 6)]


WAITS_IN_THE_SECOND = """
import sys, time
from infer import generate, media

save = media._save_video

def waits(path, *rest):
    save(path, *rest)
    if waits.first:
        waits.first = False
        return
    print("writing", flush=True)
    time.sleep(60)

waits.first = True
media._save_video = waits
sys.exit(generate.main(sys.argv[1:]))
"""


def test_a_polite_kill_leaves_whole_videos_alone(command, run, folder):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS_IN_THE_SECOND, *command], env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "writing\n"
        assert len(names(folder)) == 2 and not (folder / ALL[1]).exists()
        process.terminate()
        errors = process.communicate(timeout=50)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors and "1/4" in errors
    assert names(folder) == [ALL[0]]
    report = run()
    assert (report["made"], report["there"]) == (3, 1)


def test_an_interrupt_leaves_whole_videos_alone(run, folder, monkeypatch):
    save = media._save_video

    def interrupted(path, *rest):
        save(path, *rest)
        if len(names(folder)) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(media, "_save_video", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 128 + signal.SIGINT and names(folder) == [ALL[0]]


def test_a_full_disk_leaves_nothing_half_written(run, folder, monkeypatch):
    save = media._save_video

    def full(path, *rest):
        save(path, *rest)
        if len(names(folder)) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(media, "_save_video", full)
    assert "No space left on device" in run()
    assert names(folder) == [ALL[0]]


def test_a_file_that_has_lost_its_end_is_not_there(run, folder, monkeypatch):
    run()
    whole = (folder / ALL[0]).read_bytes()
    told = media.read_metadata(folder / ALL[0])
    video = video_series.Video(folder / ALL[0], None, told)
    assert video_series.is_there(video)
    for share in (0, 0.1, 0.5, 0.8, 0.95, 0.999):
        video.path.write_bytes(whole[: int(share * len(whole))])
        assert not video_series.is_there(video)
