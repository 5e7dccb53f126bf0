"""The length and damping of a pendulum from its measured trajectory (claim ii of arXiv 2010.10564).

The paper's own settings are not published in full; the protocol here is ours and is described in docs/experiments.md.
``study`` trains, ``report`` and ``figures`` present the results, ``results`` saves them, ``measured`` analyses your own pendulum.
"""

from __future__ import annotations

from implicit_rnn.experiments.pendulum.measured import Estimate, estimate
from implicit_rnn.experiments.pendulum.models import MODELS, SHIPPED
from implicit_rnn.experiments.pendulum.reader import Reader
from implicit_rnn.experiments.pendulum.record import Record, read
from implicit_rnn.experiments.pendulum.report import as_dict, findings, table, tuning_as_dict, tuning_table
from implicit_rnn.experiments.pendulum.results import MODEL_FILE, best_net, save, save_figure, save_tuning
from implicit_rnn.experiments.pendulum.study import (
    FULL,
    QUICK,
    RATES,
    TUNING_SEEDS,
    Protocol,
    Study,
    Tuning,
    run,
    train,
    tune,
)

__all__ = [
    "FULL",
    "MODELS",
    "MODEL_FILE",
    "QUICK",
    "RATES",
    "SHIPPED",
    "TUNING_SEEDS",
    "Estimate",
    "Protocol",
    "Reader",
    "Record",
    "Study",
    "Tuning",
    "as_dict",
    "best_net",
    "estimate",
    "findings",
    "read",
    "run",
    "save",
    "save_figure",
    "save_tuning",
    "table",
    "train",
    "tune",
    "tuning_as_dict",
    "tuning_table",
]
