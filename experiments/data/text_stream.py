"""Text out of tokens as they come: what each adds to what was said, which is never taken back.

A token has no text of its own. Decoders drop the space before the first word, put one between words, join the bytes of
a character. So tokens are decoded behind those before them, and what the text has more is what they say.
"""

from collections.abc import Iterable, Iterator, Sequence

from experiments.data.tokenizers import Tokenizer

# Tokens that new ones are decoded behind: more than a character or a word has, few enough for a text of any length.
_BEHIND = 32
_UNFINISHED = "\ufffd"


class TextStream:
    """Decodes tokens one by one.

    All pieces together are what the tokens decode to behind those before them. The two differ only where tokens of
    single bytes spell no UTF-8: some decoders then give up characters beside it that were complete, and said already.

    Args:
      tokenizer: of the tokens.
      before: ids that the text goes on from, and that are not part of it; none where it is a text by itself.
      ends: ids that end the text, and say nothing.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = (), ends: Sequence[int] = ()):
        self.ends = frozenset(ends)
        self._tokenizer = tokenizer
        self._ids = list(before)
        self._said, self._n_said = tokenizer.decode(self._ids), len(self._ids)  # decoded of the first n_said ids
        self._forget()

    def add(self, token: int) -> str:
        """What a token adds to the text. A character that is not complete waits for the next token."""
        self._ids.append(token)
        return self._say(unfinished=False)

    def rest(self) -> str:
        """What waits yet."""
        return self._say(unfinished=True)

    def _say(self, *, unfinished: bool) -> str:
        text = self._tokenizer.decode(self._ids)
        if text.startswith(self._said):
            more, ids = text[len(self._said) :], self._ids
        else:
            ids = self._ids[self._n_said :]
            text = more = self._tokenizer.decode(ids)
        if not more or (more.endswith(_UNFINISHED) and not unfinished):
            return ""
        self._ids, self._said, self._n_said = ids, text, len(ids)
        if len(ids) > 2 * _BEHIND and len(ids) % 8 == 0:
            self._forget()
        return more

    def _forget(self) -> None:
        """Drops tokens from the front, where the others decode to the same without them."""
        for start in range(len(self._ids) - _BEHIND, max(0, len(self._ids) - 2 * _BEHIND), -1):
            text = self._tokenizer.decode(self._ids[start:])
            if text and self._said.endswith(text) and not text.startswith(_UNFINISHED):
                self._ids = self._ids[start:]
                self._said, self._n_said = text, len(self._ids)
                return


def stream_text(stream: TextStream, tokens: Iterable[int]) -> Iterator[str]:
    """The pieces of a text as its tokens come, up to one that ends it."""
    for token in tokens:
        if token in stream.ends:
            break
        yield stream.add(token)
    yield stream.rest()
