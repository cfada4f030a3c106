"""Text embeddings by prompt."""

import numpy as np

from infer.text_cache import TextCache


def test_what_was_seen_lately_is_not_encoded_again():
    encoded = []

    def encode(prompt):
        encoded.append(prompt)
        return {"text": np.full(1000, len(prompt), np.uint8)}

    cache = TextCache(limit=2500)
    for prompt in ("a", "bb", "a", "ccc", "a", "bb"):
        assert cache.get(prompt, encode)["text"][0] == len(prompt)
    assert encoded == ["a", "bb", "ccc", "bb"]  # bb was the longest unused when ccc came
    assert cache.hits == 2 and cache.held == 2000
    cache.clear()
    cache.get("a", encode)
    assert encoded[-1] == "a" and cache.held == 1000


def test_one_that_is_larger_than_all_is_kept_alone():
    cache = TextCache(limit=10)
    cache.get("a", lambda _: np.zeros(100, np.uint8))
    assert cache.get("a", lambda _: None) is not None
    cache.get("b", lambda _: np.zeros(100, np.uint8))
    assert cache.held == 100
