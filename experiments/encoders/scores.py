"""How good predictions are, in the numbers that papers report, 0 to 1 (correlations: -1 to 1).

scikit-learn, scipy and seqeval compute what they know; SQuAD's two are its official script's.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from experiments.loop.summary import Scores as Scores


def classification_scores(predicted: Sequence[str], labels: Sequence[str], classes: Sequence[str]) -> Scores:
    """accuracy; matthews; f1 of the second of two classes (GLUE's), or macro_f1, the mean over classes that occur.

    Args:
      predicted, labels: names of classes.
      classes: all of them, in their order.
    """
    from sklearn import metrics  # a second, which `--help` should not wait for

    scores = {
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "matthews": float(metrics.matthews_corrcoef(labels, predicted)),
    }
    if len(classes) == 2:
        f1 = metrics.f1_score(labels, predicted, labels=list(classes), pos_label=classes[1], zero_division=0)
        return scores | {"f1": float(f1)}
    return scores | {"macro_f1": float(metrics.f1_score(labels, predicted, average="macro", zero_division=0))}


def multi_label_scores(
    predicted: Sequence[Sequence[str]], labels: Sequence[Sequence[str]], classes: Sequence[str]
) -> Scores:
    """accuracy, of whole sets; micro_f1, over all decisions together; macro_f1, the mean over classes that occur.

    Args:
      predicted, labels: names of classes, any number for each example.
      classes: all of them, in their order.
    """
    from sklearn import metrics

    guessed, true = (np.array([[name in names for name in classes] for names in rows]) for rows in (predicted, labels))
    occur = np.flatnonzero(true.any(axis=0) | guessed.any(axis=0))
    if not len(occur):
        return {"accuracy": 1.0, "micro_f1": 0.0, "macro_f1": 0.0}
    f1 = {
        f"{average}_f1": float(metrics.f1_score(true, guessed, labels=occur, average=average, zero_division=0))
        for average in ("micro", "macro")
    }
    return {"accuracy": float((guessed == true).all(axis=1).mean())} | f1


def confusion(predicted: Sequence[str], labels: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """(c, c) counts: a row for each true class, a column for each predicted one."""
    from sklearn import metrics

    return metrics.confusion_matrix(labels, predicted, labels=list(classes))


def regression_scores(predicted: Sequence[float], labels: Sequence[float]) -> Scores:
    """pearson and spearman, 0 where one side is constant; rmse in the labels' unit."""
    from scipy import stats

    a, b = np.asarray(predicted, float), np.asarray(labels, float)
    constant = np.ptp(a) == 0 or np.ptp(b) == 0
    return {
        "pearson": 0.0 if constant else float(stats.pearsonr(a, b).statistic),
        "spearman": 0.0 if constant else float(stats.spearmanr(a, b).statistic),
        "rmse": float(np.sqrt(np.mean((a - b) ** 2))),
    }


def is_bio(tags: Sequence[str]) -> bool:
    """Whether tags mark spans: B-X opens one, I-X goes on with it, O is outside."""
    return any(tag.startswith("B-") for tag in tags) and all(re.fullmatch(r"O|[BI]-.+", tag) for tag in tags)


def tagging_scores(predicted: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]) -> Scores:
    """accuracy of words; f1, precision and recall of whole spans for BIO tags (CoNLL's), else macro_f1 of words."""
    flat = [tag for tags in labels for tag in tags]
    guessed = [tag for tags in predicted for tag in tags]
    accuracy = {"accuracy": float(np.mean([a == b for a, b in zip(guessed, flat, strict=True)]))}
    if not is_bio(sorted({*flat})):
        from sklearn import metrics

        return accuracy | {"macro_f1": float(metrics.f1_score(flat, guessed, average="macro", zero_division=0))}
    from seqeval import metrics as spans

    measures = {"f1": spans.f1_score, "precision": spans.precision_score, "recall": spans.recall_score}
    given = [list(tags) for tags in labels], [list(tags) for tags in predicted]
    return accuracy | {name: float(measure(*given, zero_division=0)) for name, measure in measures.items()}


def squad_scores(predicted: Sequence[str], golds: Sequence[Sequence[str]]) -> Scores:
    """exact_match and f1, each the best over a question's answers; none stands for the answer "".

    Source: Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1, and evaluate-v2.0.py.
    """

    def best(score: Callable[[str, str], float]) -> float:
        pairs = zip(predicted, golds, strict=True)
        return float(np.mean([max(score(guess, gold) for gold in answers or [""]) for guess, answers in pairs]))

    return {"exact_match": best(lambda a, b: float(normalise(a) == normalise(b))), "f1": best(word_f1)}


def normalise(answer: str) -> str:
    """Lower case, without punctuation, articles and more than single spaces."""
    bare = "".join(character for character in answer.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def word_f1(predicted: str, gold: str) -> float:
    """F1 of the words of two answers, counted; two without any are equal."""
    a, b = normalise(predicted).split(), normalise(gold).split()
    if not a or not b:
        return float(a == b)
    shared = sum((Counter(a) & Counter(b)).values())
    return 2 * shared / (len(a) + len(b))
