"""dit-convert: the commands, their output, and one sentence with exit code 2 for bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from convert import cli, transfer


def run(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_there_and_back(text_pipeline, tmp_path, capsys):
    assert run("to-jax", text_pipeline, tmp_path / "native") == 0
    assert "native layout" in capsys.readouterr().out
    assert run("to-torch", tmp_path / "native", tmp_path / "original", "--layout", "original") == 0
    assert (tmp_path / "original" / "Wan2.1_VAE.safetensors").is_file()
    assert run("to-torch", tmp_path / "native", tmp_path / "original", "--max-shard-size", "20KB", "--overwrite") == 0
    assert len(list((tmp_path / "original" / "transformer").glob("*-of-*.safetensors"))) > 1


def test_inspect(text_pipeline, capsys):
    assert run("inspect", text_pipeline) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{text_pipeline}: pipeline WanPipeline in diffusers layout, Wan text-to-video")
    assert any(line.split()[:2] == ["vae", "AutoencoderKLWan"] for line in lines)
    assert run("inspect", text_pipeline, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["components"]["vae"]["class_name"] == "AutoencoderKLWan" and summary["layout"] == "diffusers"


@pytest.mark.parametrize("arguments", [("inspect", "/no/such"), ("to-jax", "/no/such", "/tmp/out")])
def test_bad_input_is_one_sentence(arguments, capsys):
    assert run(*arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dit-convert: there is no /no/such; expected")


def test_an_existing_destination(text_pipeline, tmp_path, capsys):
    assert run("to-jax", text_pipeline, tmp_path) == 2
    assert "exists" in capsys.readouterr().err


def test_a_destination_that_cannot_be_written(text_pipeline, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("to-jax", text_pipeline, tmp_path / "file" / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dit-convert: ") and "Traceback" not in error


@pytest.mark.parametrize("command", ["to-jax", "to-torch"])
def test_a_disk_that_fills_up(command, largest_file, text_pipeline, tmp_path, capsys):
    with largest_file(1 << 12):
        assert run(command, text_pipeline, tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"dit-convert: {tmp_path / 'out'}") and "File too large" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [(), ("to-jax", "a"), ("to-torch", "a", "b", "--layout", "x"), ("inspect", "a", "-z")]
)
def test_usage_errors_exit_with_2(arguments):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize("text", ["0", "5PB", "1.5GB", "", "GB"])
def test_bad_sizes(text, capsys):
    with pytest.raises(SystemExit):
        run("to-torch", "a", "b", "--max-shard-size", text)
    assert "is no size" in capsys.readouterr().err


WAITS_IN_THE_MIDDLE = r"""
import os, sys, time
from convert import cli, transfer

def read_third(leaf, progress):
    def read(block):
        progress.update()
        if progress.n >= 3:
            os.write(1, b"writing\n")
            time.sleep(5)
        return leaf.read(block)
    return transfer.replace(leaf, read=read)

transfer._watched = read_third
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("command", "number"), [("to-jax", signal.SIGTERM), ("to-jax", signal.SIGINT), ("to-torch", signal.SIGTERM)]
)
def test_a_signal_stops_a_conversion_and_leaves_nothing(command, number, text_pipeline, tmp_path):
    arguments = [sys.executable, "-c", WAITS_IN_THE_MIDDLE, command, str(text_pipeline / "transformer")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [*arguments, str(tmp_path / "out")], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "writing\n"
        assert [path.name for path in tmp_path.iterdir()] == [f"out.partial-{process.pid}"]
        process.send_signal(number)
        errors = process.communicate(timeout=50)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_the_end_of_standard_error_is_not_the_end(text_pipeline, tmp_path):
    command = [
        sys.executable,
        "-m",
        "convert.cli",
        "to-torch",
        str(text_pipeline / "transformer"),
        str(tmp_path / "out"),
    ]
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=writer, timeout=100)
    os.close(writer)
    assert ended.returncode == 0 and (tmp_path / "out").is_dir()


def test_a_second_signal_does_not_stop_the_cleaning_up(text_pipeline, tmp_path, monkeypatch):
    remove = shutil.rmtree

    def impatient(path, **options):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        remove(path, **options)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(transfer, "_flush_folders", lambda folder: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(transfer.shutil, "rmtree", impatient)
    with pytest.raises(SystemExit) as caught:
        run("to-torch", text_pipeline / "vae", tmp_path / "out")
    assert caught.value.code == 128 + signal.SIGINT
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is handler
