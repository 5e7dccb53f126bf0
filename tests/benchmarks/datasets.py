"""A first fit without tuning: the estimators with their defaults against scikit-learn's MLP with its own, on ten data sets.

Five times fivefold cross-validation, the same splits for both. The score is the accuracy, or R² (the mean over the targets);
the MLP is behind a StandardScaler, which the estimators have inside. The t test is that of Nadeau and Bengio (Machine Learning
52, 2003), corrected for training sets that overlap.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats
from sklearn import datasets
from sklearn.base import is_classifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import RepeatedKFold, RepeatedStratifiedKFold, cross_validate
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import implicit_rnn as irnn
from implicit_rnn.sklearn import ImplicitRNNClassifier, ImplicitRNNRegressor

FOLDS, REPEATS = 5, 5
LEVEL = 0.05
"""Of the test, on both sides."""
MOST_WORSE = 2
"""Data sets on which the defaults may be worse."""

CLASSIFICATION: dict[str, Callable[[], Any]] = {
    "digits": lambda: datasets.load_digits(return_X_y=True),
    "breast cancer": lambda: datasets.load_breast_cancer(return_X_y=True),
    "wine": lambda: datasets.load_wine(return_X_y=True),
    "iris": lambda: datasets.load_iris(return_X_y=True),
    "moons": lambda: datasets.make_moons(500, noise=0.3, random_state=0),
}
REGRESSION: dict[str, Callable[[], Any]] = {
    "diabetes": lambda: datasets.load_diabetes(return_X_y=True),
    "linnerud": lambda: datasets.load_linnerud(return_X_y=True),
    "friedman1": lambda: datasets.make_friedman1(500, noise=1.0, random_state=0),
    "friedman2": lambda: datasets.make_friedman2(500, noise=1.0, random_state=0),
    "friedman3": lambda: datasets.make_friedman3(500, noise=0.1, random_state=0),
}


def run() -> dict[str, Any]:
    rows = []
    print(
        f"{'data':<14} {'samples':>8} {'ours':>9} {'MLP':>9} {'difference':>11} {'p':>7}  {'fit / s':>8} {'MLP / s':>8}"
    )
    for name, load in (CLASSIFICATION | REGRESSION).items():
        row = compare(name, *load(), classes=name in CLASSIFICATION)
        rows.append(row)
        print(
            f"{name:<14} {row['samples']:>8} {row['ours']:>9.4f} {row['MLP']:>9.4f} {row['difference']:>+11.4f} "
            f"{row['p']:>7.4f}  {row['seconds']:>8.3f} {row['MLP seconds']:>8.3f}",
            flush=True,
        )
    worse = [row["data"] for row in rows if row["verdict"] == "worse"]
    print(f"worse: {', '.join(worse) or 'none'}{' MISSED' if len(worse) > MOST_WORSE else ''}")
    return {"engine": irnn.get_engine().name, "rows": rows}


def compare(name: str, X: np.ndarray, y: np.ndarray, classes: bool) -> dict[str, Any]:
    """One row: the scores of both on the same splits, and whether they differ."""
    ours = ImplicitRNNClassifier(random_state=0) if classes else ImplicitRNNRegressor(random_state=0)
    theirs = make_pipeline(StandardScaler(), (MLPClassifier if classes else MLPRegressor)(random_state=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", irnn.ConvergenceWarning)  # so that a fit that fails is told
        warnings.simplefilter("ignore", ConvergenceWarning)  # the MLP's 200 epochs are not enough for some
        mine, peer = evaluate(ours, X, y), evaluate(theirs, X, y)
    difference = mine["test_score"] - peer["test_score"]
    p = corrected_t_test(difference)
    return {
        "data": name,
        "score": "accuracy" if classes else "R²",
        "samples": len(X),
        "ours": mine["test_score"].mean(),
        "MLP": peer["test_score"].mean(),
        "difference": difference.mean(),
        "p": p,
        "verdict": "same" if p > LEVEL else "better" if difference.mean() > 0 else "worse",
        "seconds": float(np.median(mine["fit_time"])),
        "MLP seconds": float(np.median(peer["fit_time"])),
    }


def evaluate(estimator: Any, X: np.ndarray, y: np.ndarray) -> Any:
    splitter = RepeatedStratifiedKFold if is_classifier(estimator) else RepeatedKFold
    folds = splitter(n_splits=FOLDS, n_repeats=REPEATS, random_state=0)
    return cross_validate(estimator, X, y, cv=folds, error_score="raise")


def corrected_t_test(differences: np.ndarray) -> float:
    """The two-sided p value of no difference, with the variance of the mean ``(1/J + 1/(folds - 1)) var`` over J splits."""
    J = len(differences)
    spread = differences.std(ddof=1) * np.sqrt(1 / J + 1 / (FOLDS - 1))
    if spread == 0:
        return float(differences.mean() == 0)
    return float(2 * stats.t.sf(abs(differences.mean()) / spread, J - 1))
