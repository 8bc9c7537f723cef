"""CLIP's byte-pair vocabulary, whole or compacted to the rows that a small embedding table keeps."""

from collections.abc import Sequence

from open_clip.tokenizer import SimpleTokenizer

from fedrt.errors import FailureReason, WorkError


class Vocabulary:
    """Maps text to rows of the token embedding.

    A compact vocabulary keeps some of the 49,408 byte-pair ids, sorted: the id of a row is its position, so order is
    preserved and the end token stays the largest id. Padding (id 0) is never read, because attention is causal.
    """

    def __init__(self, kept_ids: Sequence[int] | None = None) -> None:
        self._tokenizer = SimpleTokenizer()
        everything = range(self._tokenizer.vocab_size)
        kept = everything if kept_ids is None else kept_ids
        if list(kept) != sorted(set(kept)) or not set(kept) <= set(everything):
            raise ValueError("kept_ids must be distinct byte-pair ids in ascending order")
        self._row = {original: row for row, original in enumerate(kept)}
        self.size = len(self._row)
        missing = {self._tokenizer.sot_token_id, self._tokenizer.eot_token_id} - self._row.keys()
        if missing:
            raise ValueError(f"kept_ids lacks the start or end token: {sorted(missing)}")
        self.start = self._row[self._tokenizer.sot_token_id]
        self.end = self._row[self._tokenizer.eot_token_id]

    def encode(self, text: str) -> list[int]:
        """The rows of a text, without start and end token.

        Raises `WorkError` if the text holds a control token, or words that a compact vocabulary does not keep.
        """
        ids: list[int] = self._tokenizer.encode(text)
        if not {self._tokenizer.sot_token_id, self._tokenizer.eot_token_id}.isdisjoint(ids):
            raise WorkError(
                FailureReason.DATA_UNAVAILABLE,
                f"{text!r} holds one of CLIP's control tokens; remove <start_of_text> and <end_of_text> from it",
            )
        if any(original not in self._row for original in ids):
            raise unknown_words_error(self.unknown_words(text) or [text])
        return [self._row[original] for original in ids]

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text that this vocabulary cannot spell, in order."""
        return [word for word in text.split() if any(i not in self._row for i in self._tokenizer.encode(word))]


def unknown_words_error(words: Sequence[str]) -> WorkError:
    """What the coordinator is told about words that a compact vocabulary does not hold."""
    listed = ", ".join(repr(word) for word in dict.fromkeys(words))
    return WorkError(
        FailureReason.DATA_UNAVAILABLE,
        f"the vocabulary of this model is small and does not hold {listed}; "
        "use other words, or a CLIP with the full vocabulary (for example ViT-B-16)",
    )
