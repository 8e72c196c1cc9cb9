"""Examples as rows of a vision-language model: the image's places, the question, the answer, and the end of text."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.data.augment import Preprocess
from experiments.data.image_texts import Example, Found, ImageTexts
from experiments.data.tokenizers import Tokenizer


def learned_from(data: Found, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a run learns from, see `fingerprints.check_inputs`."""
    return {
        "data train": data.train.content(),
        "data held out": data.held_out.content(),
        "tokenizer": tokenizer.to_json(),
    }


class Rows:
    """The examples of a split as arrays.

    A batch is a dict of (b, l) arrays: tokens; mask, False at padding; prompt, True where text is given; targets, the
    token that follows, and weights, 1 where it is part of an answer or ends one; and images, (b, 1, x, y, c).

    Args:
      data: examples and images.
      tokenizer: of the texts.
      places: places of an image.
      image_token: the token that stands in them.
      preprocess: from an image to an array.
      text_len: most tokens of question, answer and end; longer examples are left out. None: the longest.
    """

    def __init__(
        self,
        data: ImageTexts,
        tokenizer: Tokenizer,
        *,
        places: int,
        image_token: int,
        preprocess: Preprocess,
        text_len: int | None = None,
    ):
        self.data, self.preprocess, self.places, self.image_token = data, preprocess, places, image_token
        texts = [(example.question, " " + example.answer) for example in data.examples]
        questions, answers = (tokenizer.encode_batch(list(part)) for part in zip(*texts, strict=True))
        ended = [np.append(answer, tokenizer.eot).astype(np.int32) for answer in answers]
        sizes = np.array([len(q) + len(a) for q, a in zip(questions, ended, strict=True)])
        self.kept = np.flatnonzero(sizes <= (text_len or sizes.max()))
        """Numbers of the examples that are rows."""
        self.pad = tokenizer.eot
        self.questions, self.answers = [questions[i] for i in self.kept], [ended[i] for i in self.kept]
        self.text_len = text_len or -(-int(sizes.max()) // 8) * 8
        self.length = places + self.text_len

    def __len__(self) -> int:
        return len(self.kept)

    def example(self, row: int) -> Example:
        """The example that a row is of."""
        return self.data.examples[self.kept[row]]

    def prompt(self, row: int) -> list[int]:
        """The tokens of a row up to its answer."""
        return [*[self.image_token] * self.places, *map(int, self.questions[row])]

    def image(self, row: int) -> np.ndarray:
        """The array (x, y, c) of a row's image."""
        return self.preprocess(self.data.read(self.example(row).image))

    def __call__(self, rows: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """The batch of some rows; row -1 counts for nothing."""
        shape = len(rows), self.length
        tokens, targets = np.full(shape, self.pad, np.int32), np.zeros(shape, np.int32)
        mask, prompt, weights = np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape, np.float32)
        images = []
        for i, row in enumerate(rows):
            there = max(int(row), 0)
            given, answer = self.prompt(there), self.answers[there]
            end, size = len(given), len(given) + len(answer)
            tokens[i, :end], tokens[i, end:size] = given, answer
            mask[i, :size], prompt[i, self.places : end] = True, True
            targets[i, end - 1 : size - 1] = answer
            weights[i, end - 1 : size - 1] = row >= 0
            images.append(self.image(there))
        arrays = {"tokens": tokens, "targets": targets, "mask": mask, "prompt": prompt, "weights": weights}
        return arrays | {"images": np.stack(images)[:, None].astype(np.float32)}
