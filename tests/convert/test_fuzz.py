"""Damaged checkpoints of every layout: one sentence that names the place, exit code 2, nothing left and nothing run."""

import re
import shutil
import signal
import time
import traceback
from pathlib import Path

import pytest
from fuzz_cases import BASES, IT_RAN, Case, cases
from tiny_checkpoints import SETTINGS, tensors

from convert import cli
from convert.components import component_of
from convert.leaves import leaves_from_tensors
from convert.safetensors_files import Tensor
from dit_jax.config import UserError

SECONDS = 60  # of the processor, for one case
HANGS = 300  # seconds after which a case is stopped, on a busy machine too
PROGRESS = re.compile(r"tensor/s\]|s/tensor\]")
SEEDS = 4
ALL = list(cases(SEEDS))
SAMPLE = ALL[:: len(ALL) // 40]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Name -> folder of the sound checkpoint, made when it is first asked for."""
    made: dict[str, Path] = {}

    def base(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("base") / "in"
            BASES[name][0](made[name])
        return made[name]

    return base


@pytest.fixture(autouse=True)
def keep_signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _hangs(number, frame):
    raise TimeoutError(f"still busy after {HANGS} s")


def complaint(case: Case, base: Path, folder: Path, capsys) -> str | None:
    """What went wrong with a case; None when it ended as it must."""
    copy = folder / "in"
    shutil.copytree(base, copy)
    named = case.harm(copy)
    _, source, command = BASES[case.base]
    capsys.readouterr()
    start = time.process_time()
    signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(HANGS)
    try:
        code = cli.main([command, str(copy / source), str(folder / "out")])
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
    seconds, error = time.process_time() - start, capsys.readouterr().err
    lines = [line for line in error.replace("\r", "\n").splitlines() if line.strip() and not PROGRESS.search(line)]
    left = sorted(path.name for path in folder.iterdir() if path != copy)
    problems = {
        f"exit code {code}": code != 2,
        f"{len(lines)} lines: {error[-2000:]}": len(lines) != 1,
        f"no sentence of ours: {lines}": not lines or not lines[0].startswith("dit-convert: "),
        f"{[part for part in named if part not in error]} not named in {error}": any(
            part not in error for part in named
        ),
        f"left over: {left}": bool(left),
        f"{IT_RAN}!": (folder / IT_RAN).exists() or (copy / IT_RAN).exists(),
        f"took {seconds} s": seconds > SECONDS,
    }
    found = [problem for problem, holds in problems.items() if holds]
    return "; ".join(found) or None


@pytest.mark.parametrize("name", BASES)
def test_the_bases_are_sound(name, bases, tmp_path):
    _, source, command = BASES[name]
    assert cli.main([command, str(bases(name) / source), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("case", SAMPLE, ids=[case.name for case in SAMPLE])
def test_a_damaged_checkpoint(case, bases, tmp_path, capsys):
    assert complaint(case, bases(case.base), tmp_path, capsys) is None


@pytest.mark.long
@pytest.mark.parametrize("name", BASES)
def test_every_damage_of(name, bases, tmp_path, capsys):
    found = {}
    for number, case in enumerate(case for case in ALL if case.base == name):
        folder = tmp_path / str(number)
        folder.mkdir()
        found[case.name] = complaint(case, bases(name), folder, capsys)
        shutil.rmtree(folder)
    wrong = {name: problem for name, problem in found.items() if problem}
    assert not wrong, "\n".join(f"{name}: {problem}" for name, problem in wrong.items())


def test_there_are_as_many_cases_as_promised():
    assert len({case.name for case in ALL}) == len(ALL) >= 500
    assert len(SAMPLE) >= 40


def read_as(name: str, settings: dict) -> None:
    """The sound tensors of a model under a config that is not theirs."""
    described, place = component_of(settings, Path("place")), Path("place")
    found = {
        key: Tensor(key, place, array.dtype, array.shape, lambda array=array: array)
        for key, array in tensors(name, "diffusers").items()
    }
    leaves_from_tensors(found, described.rows, described.shapes, "diffusers", place)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("wan", {"num_layers": 10**9}),
        ("wan", {"num_layers": 0}),
        ("wan", {"ffn_dim": 10**30}),
        ("wan", {"num_attention_heads": 0.5}),
        ("wan", {"num_attention_heads": "3"}),
        ("flux-vae", {"layers_per_block": 10**9}),
        ("wan-vae", {"num_res_blocks": 10**9}),
        ("wan-vae", {"z_dim": -1}),
        ("wan-vae", {"dim_mult": []}),
    ],
)
def test_sizes_of_no_model_are_told_at_once(name, change):
    start = time.process_time()
    with pytest.raises(UserError, match=r"^place") as caught:
        read_as(name, SETTINGS[name] | change)
    assert "\n" not in str(caught.value)
    assert time.process_time() - start < SECONDS
