"""Training: settings, the loop over chunks of epochs, and what a run leaves behind.

``fit`` holds the call, ``settings`` what decides its result, ``loop`` the run from chunk to chunk, ``schedules`` the
learning rates, ``lbfgs`` the optimiser that is no engine's, ``stopping`` what ends a run early, ``snapshot`` what a run is
resumed from, ``checkpoints`` its file, ``history`` the record of a run.
"""

from implicit_rnn.training.checkpoints import Checkpoint
from implicit_rnn.training.fit import fit_many, with_settings_of
from implicit_rnn.training.history import Run
from implicit_rnn.training.schedules import Constant, Cosine, OneCycle, Schedule, Step, WarmUp
from implicit_rnn.training.stopping import EarlyStopping, Progress, StopTraining

__all__ = [
    "Checkpoint",
    "Constant",
    "Cosine",
    "EarlyStopping",
    "OneCycle",
    "Progress",
    "Run",
    "Schedule",
    "Step",
    "StopTraining",
    "WarmUp",
    "fit_many",
    "with_settings_of",
]
