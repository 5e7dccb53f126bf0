"""What studies, tunings and estimates leave in a folder."""

from __future__ import annotations

from pathlib import Path

from implicit_rnn.experiments.pendulum.measured import Estimate
from implicit_rnn.experiments.pendulum.models import MODELS
from implicit_rnn.experiments.pendulum.report import as_dict, tuning_as_dict
from implicit_rnn.experiments.pendulum.study import Study, Tuning
from implicit_rnn.files import write_json

MODEL_FILE = "model.safetensors"


def best_net(study: Study) -> tuple[str, int]:
    """The model and the index of the seed with the lowest validation error, among models with a guarantee if there are any."""
    names = [name for name in study.outcomes if MODELS[name].guaranteed] or list(study.outcomes)
    return min(
        ((name, index) for name in names for index in range(len(study.seeds))),
        key=lambda entry: study.outcomes[entry[0]][entry[1]].validation,
    )


def save(study: Study, folder: Path) -> list[Path]:
    """Write the data, the figures and the best net of a study; returns what was written."""
    from implicit_rnn.experiments.pendulum import figures

    folder.mkdir(parents=True, exist_ok=True)
    data, model = folder / "pendulum.json", folder / MODEL_FILE
    write_json(data, as_dict(study))
    name, index = best_net(study)
    study.reader(name, index).save(model)
    return [data, model, *figures.draw(study, name, index, folder)]


def save_figure(found: Estimate, folder: Path) -> Path:
    """Draw a record and the pendulum found in it to RECORD-pendulum.png; returns its path."""
    from implicit_rnn.experiments.pendulum import figures

    folder.mkdir(parents=True, exist_ok=True)
    return figures.draw_record(found, folder / f"{Path(found.record.name).stem}-pendulum.png")


def save_tuning(tuning: Tuning, folder: Path) -> Path:
    """Write tuning.json; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tuning.json"
    write_json(path, tuning_as_dict(tuning))
    return path
