"""The demo's tokenizer: a Unigram of whole words, made from captions, in the folder form that transformers opens."""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from transformers import T5Tokenizer

from dit_jax.config import UserError

SPECIAL = ("<pad>", "</s>", "<unk>")
SPACE = "▁"
TOKENS = 32  # the longest prompt, end of sequence included
SPELLING = string.ascii_lowercase + string.digits + ",.'-"
# Below any word's score by so much that a word of the vocabulary is never spelled.
SPELLING_SCORE = -100.0


def train_tokenizer(captions: Iterable[str], vocab_size: int, folder: str | Path) -> T5Tokenizer:
    """Writes a T5 tokenizer whose pieces are the captions' words, and single characters to spell any other word.

    A word's score is the logarithm of its share of the captions: the maximum likelihood of a Unigram that never cuts
    a known word. (The trainer of `tokenizers` prunes words that their parts explain, digits first, and its sums differ
    from run to run.) Ids: 0 pad, 1 end of sequence, 2 unknown, then words by falling frequency, then characters. The
    same captions give the same files, byte for byte. Raises UserError when the words do not fit into `vocab_size`.
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
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer
