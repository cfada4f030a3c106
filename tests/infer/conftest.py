import pytest


@pytest.fixture(scope="session")
def text_to_video(tmp_path_factory):
    """(folder, diffusers pipeline) of a tiny text-to-video model."""
    from tiny_wan import text_to_video

    folder, pipeline = tmp_path_factory.mktemp("t2v") / "tiny-t2v", text_to_video()
    pipeline.save_pretrained(folder)
    return folder, pipeline


@pytest.fixture(scope="session")
def image_to_video(tmp_path_factory):
    """(folder, diffusers pipeline) of a tiny image-to-video model."""
    from tiny_wan import image_to_video

    folder, pipeline = tmp_path_factory.mktemp("i2v") / "tiny-i2v", image_to_video()
    pipeline.save_pretrained(folder)
    return folder, pipeline


@pytest.fixture(scope="session")
def frames_to_video(tmp_path_factory):
    """Folder of a tiny model that draws between a first and a last image."""
    from tiny_wan import image_to_video

    folder = tmp_path_factory.mktemp("flf2v") / "tiny-flf2v"
    image_to_video(first_and_last=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Files of three small pictures that have nothing in common."""
    import numpy as np
    from PIL import Image

    files = [tmp_path_factory.mktemp("pictures") / f"{seed}.png" for seed in (3, 4, 5)]
    for seed, file in enumerate(files, 3):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (50, 70, 3), np.uint8)).save(file)
    return [str(file) for file in files]


@pytest.fixture(scope="session")
def text_experts(tmp_path_factory):
    """(folder, diffusers pipeline) of a tiny text-to-video model of two experts."""
    from tiny_wan import two_experts

    folder, pipeline = tmp_path_factory.mktemp("t2v-a14b") / "tiny-t2v-a14b", two_experts(image=False)
    pipeline.save_pretrained(folder)
    return folder, pipeline


@pytest.fixture(scope="session")
def text_or_image(tmp_path_factory):
    """(folder, diffusers pipeline) of a tiny model that takes a first frame or none."""
    from tiny_wan import text_or_image

    folder, pipeline = tmp_path_factory.mktemp("ti2v") / "tiny-ti2v", text_or_image()
    pipeline.save_pretrained(folder)
    return folder, pipeline


@pytest.fixture(scope="module")
def quick_reader():
    """A hardly trained classifier in place of the real one, where it does not matter what it thinks."""
    from infer import digit_reader, evaluate

    patch = pytest.MonkeyPatch()
    quick = digit_reader.train_reader(variants=1, epochs=1)
    patch.setattr(digit_reader, "load_reader", lambda: quick)
    evaluate._exam.cache_clear()
    yield
    patch.undo()
    evaluate._exam.cache_clear()
