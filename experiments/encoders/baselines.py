"""What counting words reaches: the cheap baseline beside which every trained encoder is reported."""

from collections.abc import Sequence

from experiments.data.labelled import Examples, Labelled
from experiments.encoders.scores import Scores, classification_scores, multi_label_scores, regression_scores


def bag_of_words(data: Labelled) -> dict[str, Scores]:
    """TF-IDF of words and pairs of words, and a linear SVM (numbers: ridge regression), on the same rows.

    Returns:
      the scores of every split but the first, which it is fitted to.

    Raises:
      ValueError: labels that are neither classes nor numbers.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MultiLabelBinarizer
    from sklearn.svm import LinearSVC

    models = {"classification": LinearSVC, "multi-label": lambda: OneVsRestClassifier(LinearSVC()), "regression": Ridge}
    if data.kind not in models:
        raise ValueError(f"--baseline counts words in whole texts, it knows nothing of --kind {data.kind}")
    several = MultiLabelBinarizer(classes=data.classes) if data.kind == "multi-label" else None
    fitted = make_pipeline(TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)), models[data.kind]())
    train, *others = data.splits
    labels = data.splits[train].labels
    fitted.fit(_texts(data.splits[train]), several.fit_transform(labels) if several else labels)
    scores = {}
    for name in others:
        if (labels := data.splits[name].labels) is not None:
            guessed = fitted.predict(_texts(data.splits[name]))
            if several:
                scores[name] = multi_label_scores(several.inverse_transform(guessed), labels, data.classes)
            elif data.kind == "classification":
                scores[name] = classification_scores(guessed.tolist(), labels, data.classes)
            else:
                scores[name] = regression_scores(guessed.tolist(), labels)
    return scores


def _texts(examples: Examples) -> Sequence[str]:
    if examples.seconds is None:
        return examples.texts
    return [f"{first}\n{second}" for first, second in zip(examples.texts, examples.seconds, strict=True)]
