"""The demo's tokenizer: whole words, distinct digits, and files that transformers opens and that never change."""

import pytest
from transformers import AutoTokenizer, T5Tokenizer

from dit_jax.config import UserError
from infer.digit_grammar import MOVING, all_captions_sample
from train.demo_tokenizer import train_tokenizer

CAPTION = "a red 7 moving up and left above a blue 2 on a striped background"


@pytest.fixture(scope="module")
def captions():
    return all_captions_sample(2000, 0)


@pytest.fixture(scope="module")
def folder(captions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(captions, 128, folder)
    return folder


@pytest.mark.parametrize("opener", [AutoTokenizer, T5Tokenizer])
def test_transformers_opens_it(folder, opener):
    tokenizer = opener.from_pretrained(folder)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.model_max_length == 32
    assert len(tokenizer) <= 128
    padded = tokenizer([CAPTION, "a"], padding="max_length", max_length=32, truncation=True, return_attention_mask=True)
    assert [len(ids) for ids in padded.input_ids] == [32, 32]
    assert [sum(mask) for mask in padded.attention_mask] == [len(CAPTION.split()) + 1, 2]
    assert padded.input_ids[1][1:3] == [1, 0]


def test_every_word_is_one_piece(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {word: tokenizer(f"a {word}", add_special_tokens=False).input_ids[1:] for word in MOVING.words}
    assert {len(pieces) for pieces in ids.values()} == {1}
    assert len({pieces[0] for pieces in ids.values()}) == len(MOVING.words)


def test_captions_survive_both_directions(folder, captions):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for caption in captions[:200]:
        assert tokenizer.decode(tokenizer(caption).input_ids, skip_special_tokens=True) == caption
        assert len(tokenizer(caption).input_ids) == len(caption.split()) + 1 <= 32


def test_other_words_are_spelled(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("a zebra 17").input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a zebra 17"
    assert tokenizer.unk_token_id in tokenizer("日").input_ids


def test_same_captions_same_files(folder, captions, tmp_path):
    train_tokenizer(iter(captions), 128, tmp_path)
    files = sorted(path.name for path in folder.iterdir())
    assert files == sorted(path.name for path in tmp_path.iterdir()) and "tokenizer.json" in files
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("captions", [[], [CAPTION]])
def test_refuses_what_does_not_fit(captions, tmp_path):
    with pytest.raises(UserError, match=r"pass captions, and a vocab_size of \d+ or more"):
        train_tokenizer(captions, 50, tmp_path)
    assert not list(tmp_path.iterdir())
