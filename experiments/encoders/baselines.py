"""What counting words reaches: the cheap baseline beside which every trained encoder is reported."""

from collections.abc import Sequence

from experiments.data.labelled import Examples, Labelled
from experiments.encoders.scores import Scores, classification_scores, regression_scores


def bag_of_words(data: Labelled) -> dict[str, Scores]:
    """TF-IDF of words and pairs of words, and a linear SVM (numbers: ridge regression), on the same rows.

    Returns:
      the scores of every split but the first, which it is fitted to.

    Raises:
      ValueError: labels that are neither classes nor numbers.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    if data.kind not in ("classification", "regression"):
        raise ValueError(f"--baseline counts words in whole texts, it knows nothing of --kind {data.kind}")
    model = LinearSVC() if data.kind == "classification" else Ridge()
    fitted = make_pipeline(TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)), model)
    train, *others = data.splits
    fitted.fit(_texts(data.splits[train]), data.splits[train].labels)
    scores = {}
    for name in others:
        if (labels := data.splits[name].labels) is not None:
            guessed = fitted.predict(_texts(data.splits[name])).tolist()
            if data.kind == "classification":
                scores[name] = classification_scores(guessed, labels, data.classes)
            else:
                scores[name] = regression_scores(guessed, labels)
    return scores


def _texts(examples: Examples) -> Sequence[str]:
    if examples.seconds is None:
        return examples.texts
    return [f"{first}\n{second}" for first, second in zip(examples.texts, examples.seconds, strict=True)]
