"""Training: settings, the loop over chunks of epochs, and the records of a run.

``fit`` holds the call, ``settings`` the settings that affect its result, ``loop`` the run from chunk to chunk, ``schedules``
the learning rates, ``lbfgs`` the optimiser that is not part of an engine, ``stopping`` the conditions that end a run early,
``snapshot`` the state from which a run is resumed, ``checkpoints`` its file, ``history`` the record of a run.
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
