"""The JSON that SQuAD comes in: articles of paragraphs of questions, as rows of question, context and answers.

Source: Rajpurkar et al. 2016, arXiv:1606.05250, and 2018, arXiv:1806.03822, whose questions may have no answer.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Row = dict[str, Any]


def is_squad(articles: Sequence[Row]) -> bool:
    """Whether these are articles of paragraphs."""
    return bool(articles) and all(isinstance(article.get("paragraphs"), list) for article in articles)


def questions(articles: Iterable[Row]) -> Iterator[Row]:
    """A row for each question: id, title, question, context, answers.

    Raises:
      ValueError: a paragraph without a context, or a question without its text.
    """
    for article in articles:
        title = article.get("title")
        for number, paragraph in enumerate(article["paragraphs"], start=1):
            try:
                for asked in paragraph["qas"]:
                    yield {
                        "id": asked.get("id"),
                        "title": title,
                        "question": asked["question"],
                        "context": paragraph["context"],
                        # What is impossible has "plausible_answers", which are wrong ones.
                        "answers": lists_of(asked.get("answers") or []),
                    }
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"paragraph {number} of {title!r} lacks {error}") from error


def lists_of(answers: Iterable[Row]) -> dict[str, list]:
    """Answers as the hub has them, a list of texts and one of where they start, from a list of both."""
    answers = list(answers)
    return {name: [answer[name] for answer in answers] for name in ("text", "answer_start")}
