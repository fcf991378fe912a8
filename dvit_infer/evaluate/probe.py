"""A linear probe: logistic regression on features, by scikit-learn."""

import warnings
from collections.abc import Sequence

import numpy as np

from dvit_infer.errors import InputError
from dvit_infer.utils.packages import need
from dvit_infer.utils.text import listed, plural

STRENGTH = 1.0  # scikit-learn's C, the inverse of the regularisation
FOLDS = 5
_STEPS = 1000  # of L-BFGS, at most


def check_probe(counts: np.ndarray, names: Sequence[str], *, alone: bool, strength: float = STRENGTH) -> None:
    """Raise InputError unless a probe can be fitted.

    Args:
        counts: (K,) images of each class.
        names: of the classes.
        alone: whether the same images are classified, so that each class is fitted and held back.
        strength: as for `probe`.
    """
    need("probe: a linear probe", "sklearn", extra="dvit-infer[probe]")
    if not 0 < strength < np.inf:
        raise InputError(f"probe: {strength:g} is no strength; a positive number is expected")
    if np.count_nonzero(counts) < 2:
        only = "".join(f", {names[at]!a}" for at in np.flatnonzero(counts).tolist())
        raise InputError(f"probe: all {plural(int(counts.sum()), 'image')} are of one class{only}; two are needed")
    if alone and (few := [names[at] for at in np.flatnonzero(counts == 1).tolist()]):
        raise InputError(
            f"probe: one image alone in {plural(len(few), 'class')}: {listed(few)}; --train FOLDER gives others to "
            "learn from, or give two or more of each"
        )


def probe(
    features: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    queries: np.ndarray | None = None,
    strength: float = STRENGTH,
) -> np.ndarray:
    """Fit a logistic regression to standardised features; return its probabilities for the queries, (M, K).

    Args:
        features: (N, D), finite.
        labels: (N,) their classes, 0 to K - 1.
        names: of the classes, for messages.
        queries: (M, D); None: each row of `features`, by a model fitted to the others: `FOLDS` stratified folds, fewer
            if a class has fewer images, drawn with a fixed seed.
        strength: C of LogisticRegression.

    Raises:
        InputError: scikit-learn is not installed, there is one class, a class has too few images, or `strength` is not
            positive.
    """
    counts = np.bincount(labels, minlength=len(names))
    check_probe(counts, names, alone=queries is None, strength=strength)
    if queries is not None:
        return _probabilities(features, labels, queries, len(names), strength)
    from sklearn.model_selection import StratifiedKFold

    found = np.zeros((len(features), len(names)), np.float32)
    folds = StratifiedKFold(min(FOLDS, int(counts[counts > 0].min())), shuffle=True, random_state=0)
    for fitted, held in folds.split(features, labels):
        found[held] = _probabilities(features[fitted], labels[fitted], features[held], len(names), strength)
    return found


def _probabilities(
    features: np.ndarray, labels: np.ndarray, queries: np.ndarray, num_classes: int, strength: float
) -> np.ndarray:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=_STEPS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the classes hardly change in later steps
        model.fit(features, labels)
    found = np.zeros((len(queries), num_classes), np.float32)
    found[:, model.classes_] = model.predict_proba(queries)
    return found
