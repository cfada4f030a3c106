"""`dit-generate`: a video or an image from a prompt."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert.sizes import parse_bytes
from convert.stopping import cleaned_up_when_stopped
from convert.warning_lines import warnings_in_lines
from dit_jax.config import UserError
from dit_jax.methods.plan import DENSE, JOINT
from infer.digit_grammar import GRAMMARS, MOVING, PICTURES, Grammar, unknown_words
from infer.given_images import given_images, image_options
from infer.given_scales import given_scales, scale_options
from infer.prompts_file import read_prompts
from infer.video_names import NAMES, prompts_by_name, video_paths

EPILOG = f"""\
The shipped models know only a few words. demo-wan makes videos of moving handwritten digits:

{MOVING.text}

demo-flux makes pictures of such digits:

{PICTURES.text}

examples:
  dit-generate --model demo-wan --prompt "a red 7 moving left above a blue 2 on a striped background" --out
  out/seven.mp4
  dit-generate --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "a cat surfing at dusk" --mesh context=8 --out cat.mp4
  dit-generate --model black-forest-labs/FLUX.1-schnell --prompt "a cat" --steps 4 --out cat.png
  dit-generate --model black-forest-labs/FLUX.1-dev --lora style.safetensors:0.8 --prompt "a cat" --out cat.png
  dit-generate --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts prompts.txt --seeds 5 --names vbench --out vids
"""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        prog="dit-generate", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add(
        "--model",
        default="demo-wan",
        help="a checkpoint folder, a hub id org/name[@revision], demo-flux or demo-wan (default)",
    )
    add("--prompt", help="what the picture shows")
    add("--prompts", metavar="FILE", help="a file with one prompt a line, in place of --prompt; outputs are numbered")
    add("--negative-prompt", metavar="T", default="", help="what it should not show")
    add("--out", required=True, metavar="FILE", help="output: .mp4 .mov .webm .gif .webp, or .png for one frame")
    add(
        "--names", choices=list(NAMES),
        help="--out is a folder of videos named as VBench or VBench-2.0 reads them; those that are there are skipped",
    )  # fmt: skip
    add("--names-from", metavar="FILE", help="with --names: prompts to name the videos after, a line for each prompt")
    add(
        "--lora",
        action="append",
        default=[],
        metavar="PATH[:STRENGTH]",
        help="merge a LoRA (strength 1); repeatable; transformer_2=PATH is for the low-noise expert",
    )
    add(
        "--allow-unmatched",
        action="store_true",
        help="leave out what of a LoRA matches no layer or fits none, with a warning",
    )
    image_options(options)
    add("--size", metavar="WxH", help="pixels, such as 832x480 (default: the model's)")
    add("--frames", type=int, metavar="N", help="4k + 1 frames (default: the model's)")
    add("--steps", type=int, metavar="N", help="denoising steps (default: the model's)")
    scale_options(options)
    add("--images-per-prompt", type=int, default=1, metavar="N", help="samples of each prompt; outputs are numbered")
    add("--seeds", type=int, metavar="N", help="samples of each prompt; sample i of every prompt has seed --seed + i")
    add("--solver", metavar="S", help="unipc, euler or renoise (default: the model's)")
    add(
        "--plan", "--method", action="append", default=[], metavar="PLAN",
        help="methods that make it cheaper, joined by +, such as hsa:50; repeated plans are joined (docs/methods.md)",
    )  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="seed of the starting noise; output i has seed N + i")
    add("--mesh", metavar="AXES", help="devices by axis, such as data=2,context=4 (axes: data fsdp context tensor)")
    add("--offload-expert", action="store_true", help="Wan 2.2: keep one of the two experts on the devices at a time")
    add("--cache-dir", metavar="DIR", help="keep converted weights there, so that they are converted once")
    add("--cache-limit", type=parse_bytes, default="100GB", metavar="SIZE", help="of --cache-dir (default 100GB)")
    add("--sheet", metavar="FILE", help="also write a contact sheet of the frames: .png; numbered as outputs are")
    add("--from-latents", metavar="FILE", help="decode latents that an earlier run left behind; no prompt needed")
    add("--json", action="store_true", help="print one JSON object as the last line")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Entry point; exit code 2 and one sentence for bad input."""
    options = parser().parse_args(arguments)
    try:
        with cleaned_up_when_stopped():
            report = generate(options)
    except UserError as error:
        print(f"dit-generate: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"dit-generate: {error.filename or options.out}: {error.strerror or error}.", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(report))
    else:
        for path in report["out"]:
            print(f"{path}: {report['steps']} steps of {report['tokens']} tokens")
        if "made" in report:
            print(f"{report['made']} videos made, {report['there']} were there")
        print(f"compiled in {report['compile_seconds']:.1f} s, ran in {report['run_seconds']:.1f} s")
    return 0


def generate(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the parsed command; returns what `--json` prints."""
    from infer import media

    prompts = _prompts(options)
    _check_together(options)
    paths: list[Path] = []
    if options.names:
        titles = read_prompts(options.names_from) if options.names_from else prompts
        named = prompts_by_name(options.names, titles, prompts, options.seeds or 1)
        prompts, paths = list(named.values()), video_paths(Path(options.out), list(named), options.seeds or 1)
    else:
        media.check_output(options.out)
    request = _request(options, prompts)
    for path in filter(None, (paths[0] if paths else options.out, options.sheet)):
        media.make_room(path)
    pipe = _load(options)
    if options.from_latents:
        return _from_latents(pipe, options)
    if options.names and not pipe.defaults.video:
        raise UserError(f"--names {options.names} is for videos, {options.model} makes pictures: choose another model")
    if pipe.defaults.grammar:
        _warn_of_unknown_words(options.model, prompts, GRAMMARS[pipe.defaults.grammar])
    with warnings_in_lines():
        job = pipe.prepare(request)
    began, samples = time.perf_counter(), _samples(job, options)
    if paths:
        from infer.video_series import make_series

        made, there = make_series(pipe, paths, samples)
        return _report(pipe, job, began, [Path(options.out)]) | {"made": made, "there": there}
    media.check_output(options.out, job.frames)
    outputs: list[Path] = []
    count = len(samples)
    sheets = _numbered(options.sheet, count) if options.sheet else [None] * count
    for sample, out, sheet in zip(samples, _numbered(options.out, count), sheets, strict=True):
        outputs += _denoise_and_decode(pipe, sample, out, sheet)
    return _report(pipe, job, began, outputs)


def _request(options: argparse.Namespace, prompts: list[str]):
    from infer.request import Request, parse_size

    return Request(
        prompt=prompts,
        negative_prompt=options.negative_prompt,
        **given_images(options),
        size=parse_size(options.size) if options.size else None,
        frames=options.frames,
        steps=options.steps,
        **given_scales(options),
        images_per_prompt=options.seeds or options.images_per_prompt,
        solver=options.solver,
        seed=options.seed,
        plan=JOINT.join(options.plan) if options.plan else DENSE,
    )


def _samples(job, options: argparse.Namespace) -> list:
    """The job of every sample: seeds go on from prompt to prompt or, with --seeds or --names, begin anew with each."""
    samples = [job.single(index) for index in range(len(job.prompts))]
    if options.seeds is None and not options.names:
        return samples
    again = options.seeds or 1
    return [replace(one, seeds=[options.seed + index % again]) for index, one in enumerate(samples)]


def _check_together(options: argparse.Namespace) -> None:
    """UserError for options that do not go together, and for a sheet that is no PNG."""
    if options.seeds is not None and options.seeds < 1:
        raise UserError(f"--seeds is {options.seeds}: expected a whole number from 1; leave it out for one sample")
    if (options.seeds is not None or options.names) and options.images_per_prompt != 1:
        raise UserError("--images-per-prompt has no place beside --seeds or --names: say --seeds N for N samples each")
    if options.names_from and not options.names:
        raise UserError("--names-from is for --names vbench: expected both; leave it out or add --names")
    for name in ("from_latents", "sheet", "image", "last_image"):
        if options.names and getattr(options, name):
            raise UserError(f"--names {options.names} makes videos of text alone: leave out --{name.replace('_', '-')}")
    if options.names and Path(options.out).suffix.lower() in (".mp4", ".mov", ".webm"):
        raise UserError(
            f"--names {options.names} writes many files, found --out {options.out!r}: expected a folder; name one"
        )
    if options.sheet and Path(options.sheet).suffix.lower() != ".png":
        raise UserError(f"cannot write the sheet {options.sheet!r}: expected a PNG; name a file that ends in .png")


def _numbered(name: str, count: int) -> list[Path]:
    path = Path(name)
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{index:03d}") for index in range(count)]


def _warn_of_unknown_words(model: str, prompts: list[str], grammar: Grammar) -> None:
    for word in dict.fromkeys(word for prompt in prompts for word in unknown_words(prompt, grammar)):
        print(f"warning: {model} does not know the word {word!r}; --help lists its words", file=sys.stderr)


def _report(pipe, job, began: float, outputs: list[Path]) -> dict[str, Any]:
    return {
        "compile_seconds": round(pipe.programs.seconds, 3),
        "run_seconds": round(time.perf_counter() - began - pipe.programs.seconds, 3),
        "tokens": pipe.tokens(job.size, job.frames),
        "steps": job.steps,
        "plan": str(job.plan),
        "out": [str(path) for path in outputs],
    }


def _prompts(options: argparse.Namespace) -> list[str]:
    if options.from_latents:
        return []
    if (options.prompt is None) == (options.prompts is None):
        raise UserError("expected either --prompt or --prompts: give one of them")
    if options.prompt is not None:
        return [options.prompt]
    return read_prompts(options.prompts)


def _load(options: argparse.Namespace):
    from convert.progress import progress_bar
    from dit_jax.sharding import make_mesh, parse_mesh
    from infer.caches import keep_compiled_programs
    from infer.loading import load_pipeline
    from infer.loras import parse_choice

    keep_compiled_programs()
    mesh = make_mesh(parse_mesh(options.mesh)) if options.mesh else None
    with warnings_in_lines(), progress_bar(unit="B", unit_scale=True, delay=3, leave=False) as bar:
        return load_pipeline(
            options.model,
            mesh=mesh,
            lora=[parse_choice(text) for text in options.lora],
            allow_unmatched=options.allow_unmatched,
            offload_expert=options.offload_expert,
            cache_dir=options.cache_dir,
            cache_limit=options.cache_limit,
            progress=bar,
        )


def _denoise_and_decode(pipe, job, out: Path, sheet: Path | None) -> list[Path]:
    """Keeps the latents beside the output until the video is there."""
    from infer import latents_file

    with Bar(out.name) as bar:
        latents = pipe.denoise(job, bar)
        kept = latents_file.write(out, latents, job, pipe.hash, pipe.loras)
        paths = _decode(pipe, job, latents, out, sheet, bar)
    kept.unlink()
    return paths


def _from_latents(pipe, options: argparse.Namespace) -> dict[str, Any]:
    from infer import latents_file

    latents, job = latents_file.read(Path(options.from_latents), pipe.hash, pipe.loras)
    began, out = time.perf_counter(), Path(options.out)
    with Bar(out.name) as bar:
        paths = _decode(pipe, job, latents, out, Path(options.sheet) if options.sheet else None, bar)
    return _report(pipe, job, began, paths)


def _decode(pipe, job, latents, out: Path, sheet: Path | None, bar: Bar) -> list[Path]:
    from infer.contact_sheet import contact_sheet

    result = pipe.decode(job, latents, bar)
    paths = result.save(out)
    if sheet:
        contact_sheet(result.frames[0] if pipe.defaults.video else result.frames, job.prompts[0], sheet)
    return paths


class Bar:
    """A progress bar over the stages of one video, on standard error."""

    def __init__(self, name: str):
        from convert.progress import progress_bar

        self.bar = progress_bar(total=None, desc=name, unit="step", leave=True)
        self.stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self.stage:
            self.stage = stage
            self.bar.reset(total)
            self.bar.set_postfix_str(stage)
        self.bar.n = done
        self.bar.refresh()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()


if __name__ == "__main__":
    sys.exit(main())
