"""The demo models' tokenizers, made from captions, in the folder form that transformers opens."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
from transformers import CLIPTokenizer, T5Tokenizer

from dit_jax.config import UserError

SPECIAL = ("<pad>", "</s>", "<unk>")
SPACE = "▁"
END_OF_WORD = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"
TOKENS = 32  # the longest prompt, end of sequence included
SPELLING = string.ascii_lowercase + string.digits + ",.'-"
# Below any word's score by so much that a word of the vocabulary is never spelled.
SPELLING_SCORE = -100.0


def train_tokenizer(captions: Iterable[str], vocab_size: int, folder: str | Path, tokens: int = TOKENS) -> T5Tokenizer:
    """Writes a T5 tokenizer whose pieces are the captions' words, and single characters to spell any other word.

    A word's score is the logarithm of its share of the captions: the maximum likelihood of a Unigram that never cuts
    a known word. (The trainer of `tokenizers` prunes words that their parts explain, digits first, and its sums differ
    from run to run.) Ids: 0 pad, 1 end of sequence, 2 unknown, then words by falling frequency, then characters. The
    same captions give the same files, byte for byte. Texts are cut to `tokens`. Raises UserError when the words do not
    fit into `vocab_size`.
    """
    words = Counter(word for caption in captions for word in caption.split())
    characters = sorted({SPACE, *SPELLING, *"".join(words)})
    needed = len(SPECIAL) + len(words) + len(characters)
    if not words or needed > vocab_size:
        raise UserError(
            f"vocab_size: expected room for at least 1 word and {needed} pieces, found {len(words)} words and room for "
            f"{vocab_size}; pass captions, and a vocab_size of {needed} or more."
        )
    total = words.total()
    ranked = sorted(words.items(), key=lambda item: (-item[1], item[0]))
    pieces = [(token, 0.0) for token in SPECIAL]
    pieces += [(SPACE + word, math.log(count / total)) for word, count in ranked]
    pieces += [(character, SPELLING_SCORE) for character in characters]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=tokens)
    tokenizer.save_pretrained(folder)
    return tokenizer


def train_clip_tokenizer(captions: Iterable[str], vocab_size: int, folder: str | Path, tokens: int) -> CLIPTokenizer:
    """Writes a CLIP tokenizer whose byte-pair merges make every word of the captions one piece.

    Ids: characters, those that end a word, merged pieces; last of all `<|startoftext|>` and `<|endoftext|>`, which also
    pads. (The trainer of `tokenizers` breaks ties as its hash tables fall.) The same captions give the same files, byte
    for byte. Texts are cut to `tokens`. Raises UserError when the pieces do not fit into `vocab_size`.
    """
    # CLIP cuts at spaces, and round every digit.
    words = Counter(word for caption in captions for word in re.findall(r"[0-9]|[^\s0-9]+", caption))
    characters = sorted({*SPELLING, *"".join(words)})
    merges = _merges(words)
    pieces = [*characters, *(character + END_OF_WORD for character in characters), *("".join(pair) for pair in merges)]
    if len(pieces) + 2 > vocab_size:
        raise UserError(
            f"vocab_size: expected room for {len(pieces) + 2} pieces, found {vocab_size}; pass {len(pieces) + 2} or "
            "more."
        )
    vocab = {piece: index for index, piece in enumerate(pieces)} | {START: vocab_size - 2, END: vocab_size - 1}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=tokens)  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder)
    return tokenizer


def token_ids(tokenizer, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 [B, L] up to the tokenizer's limit, and validity bool [B, L]."""
    out = tokenizer(captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
    return np.asarray(out.input_ids, np.int32), np.asarray(out.attention_mask, bool)


def _merges(words: Counter[str]) -> list[tuple[str, str]]:
    """Merges of neighbouring pieces, the most frequent pair first, until every word is one (Sennrich et al., 2016)."""
    spelled = {word: [*word[:-1], word[-1] + END_OF_WORD] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in spelled.items():
            for pair in pairwise(pieces):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        spelled = {word: _merged(pieces, best) for word, pieces in spelled.items()}


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out
