"""The compact vocabulary: open_clip's BPE token ids, reduced to those that captions and class names contain."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from open_clip import SimpleTokenizer

from silo.embedded.captions import caption_words, words_of

IntArray = NDArray[np.int64]

CONTEXT_LENGTH = 40


@dataclass(frozen=True)
class CompactVocabulary:
    """Compact ids of words; a compact id is the position of the original BPE id in the sorted list `kept`."""

    kept: tuple[int, ...]
    ids_of_word: dict[str, tuple[int, ...]]

    @property
    def start(self) -> int:
        """The compact id of the start-of-text token, the second largest."""
        return len(self.kept) - 2

    @property
    def end(self) -> int:
        """The compact id of the end-of-text token, the largest, which is where open_clip pools."""
        return len(self.kept) - 1

    def encode(self, texts: Sequence[str]) -> IntArray:
        """Token ids [B, 40], padded with 0.

        Raises:
            KeyError: a text has a word outside the vocabulary.
            ValueError: a text is longer than the 40 positions.
        """
        table = np.zeros((len(texts), CONTEXT_LENGTH), dtype=np.int64)
        for row, text in enumerate(texts):
            ids = [self.start, *(i for word in words_of(text) for i in self.ids_of_word[word]), self.end]
            if len(ids) > CONTEXT_LENGTH:
                raise ValueError(f'caption "{text}" has {len(ids)} tokens; shorten it to {CONTEXT_LENGTH}')
            table[row, : len(ids)] = ids
        return table


def compact_vocabulary() -> CompactVocabulary:
    """The vocabulary of all captions and class names; id 0 is kept for padding."""
    tokenizer = SimpleTokenizer()
    original = {word: tuple(int(i) for i in tokenizer.encode(word)) for word in caption_words()}
    special = {0, int(tokenizer.sot_token_id), int(tokenizer.eot_token_id)}
    kept = tuple(sorted(special | {i for ids in original.values() for i in ids}))
    position = {token_id: index for index, token_id in enumerate(kept)}
    return CompactVocabulary(kept, {word: tuple(position[i] for i in ids) for word, ids in original.items()})
