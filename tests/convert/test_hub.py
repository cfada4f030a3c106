"""What is fetched from the hub: a stand-in for it that serves a folder, and the true client without a network."""

import fnmatch
import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError

from convert.checkpoint import resolve
from convert.lora import find_lora
from dit_jax.config import UserError

INDEX = {
    "_class_name": "FluxPipeline",
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "image_encoder": [None, None],
    "vae": ["diffusers", "AutoencoderKL", {"pretrained_model_name_or_path": "demo-flux", "subfolder": "vae"}],
    "text_encoder": [
        "transformers", "CLIPTextModel",
        {"pretrained_model_name_or_path": "demo-flux", "subfolder": "text_encoder", "lora": "encoder_lora.safetensors"},
    ],
}  # fmt: skip
READ = [
    "README.md", "encoder_lora.safetensors", "generation_defaults.json", "methods/router/weights.safetensors",
    "model_index.json", "transformer/config.json", "transformer/model.safetensors",
]  # fmt: skip
UNREAD = ["ae.safetensors", "flux1-dev.safetensors", "image_encoder/model.safetensors", "vae/model.safetensors"]
LORAS = ["README.md", "style.safetensors", "more/other.safetensors"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Makes repositories of empty files; what is downloaded of them is in its folder `cache/REVISION`."""
    shelf, cache = tmp_path / "shelf", tmp_path / "cache"

    def put(names):
        for name in names:
            (shelf / name).parent.mkdir(parents=True, exist_ok=True)
            (shelf / name).write_text(json.dumps(INDEX) if name == "model_index.json" else "")
        return cache

    def names(repository, *, revision=None):
        assert repository == "org/name"
        return [file.relative_to(shelf).as_posix() for file in shelf.rglob("*") if file.is_file()]

    def download(repository, name, *, revision=None):
        if name not in names(repository):
            raise EntryNotFoundError(f"no {name}")
        copy = cache / str(revision) / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(shelf / name, copy))

    def snapshot(repository, *, revision=None, allow_patterns=None):
        for name in names(repository):
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns or ["*"]):
                download(repository, name, revision=revision)
        return str(cache / str(revision))

    for name, stand_in in {
        "snapshot_download": snapshot,
        "hf_hub_download": download,
        "list_repo_files": names,
    }.items():
        monkeypatch.setattr(f"huggingface_hub.{name}", stand_in)
    return put


def files_in(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("revision", [None, "v1.0"])
def test_of_a_pipeline_what_is_read_is_fetched(hub, revision):
    cache = hub(READ + UNREAD)
    assert resolve("org/name" + (f"@{revision}" if revision else "")) == cache / str(revision)
    assert files_in(cache / str(revision)) == READ


def test_of_another_repository_everything_is_fetched(hub):
    cache = hub(UNREAD)
    assert files_in(resolve("org/name")) == UNREAD == files_in(cache / "None")


def test_one_file_of_a_repository(hub):
    cache = hub(READ + UNREAD)
    assert resolve("org/name/vae/model.safetensors@v1.0") == cache / "v1.0/vae/model.safetensors"
    assert files_in(cache) == ["v1.0/vae/model.safetensors"]


def test_of_a_collection_of_loras_one_is_fetched(hub):
    cache = hub(LORAS)
    assert find_lora("org/name") == cache / "None/style.safetensors"
    assert find_lora("org/name/more/other.safetensors@v2") == cache / "v2/more/other.safetensors"
    assert files_in(cache) == ["None/style.safetensors", "v2/more/other.safetensors"]


def test_a_collection_of_loras_has_to_be_asked_for_one(hub):
    cache = hub([*LORAS, "b.safetensors"])
    with pytest.raises(UserError, match=r"org/name holds 2 files that may be a LoRA.*name the file itself"):
        find_lora("org/name")
    assert not cache.exists()


def test_a_lora_of_peft_comes_with_its_alphas(hub):
    cache = hub(["adapter_model.safetensors", "adapter_config.json", "optimizer.pt"])
    assert find_lora("org/name").name == "adapter_model.safetensors"
    assert files_in(cache / "None") == ["adapter_config.json", "adapter_model.safetensors"]


def cached(folder: Path, names: list[str], monkeypatch) -> Path:
    """The hub's cache with a repository of these files, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789" * 4
    repository = folder / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for name in names:
        file = repository / "snapshots" / commit / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(INDEX) if name == "model_index.json" else "")
    return repository / "snapshots" / commit


@pytest.mark.parametrize("names", [READ, UNREAD])
def test_what_is_cached_needs_no_network(tmp_path, monkeypatch, names):
    folder = cached(tmp_path, names, monkeypatch)
    assert resolve("org/name") == folder


def test_cached_loras_need_no_network(tmp_path, monkeypatch):
    folder = cached(tmp_path, LORAS, monkeypatch)
    assert find_lora("org/name") == folder / "style.safetensors"
    assert find_lora("org/name/more/other.safetensors") == folder / "more/other.safetensors"


@pytest.mark.parametrize("find", [resolve, find_lora])
def test_what_is_neither_cached_nor_to_be_had(tmp_path, monkeypatch, find):
    cached(tmp_path, [], monkeypatch)
    with pytest.raises(UserError, match=r"no folder or file org/other@v1, and the hub did not give it: ") as caught:
        find("org/other@v1")
    assert "\n" not in str(caught.value)
