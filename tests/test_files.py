"""Networks as files: what is saved comes back bit by bit, and what is no model is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import make_net
from matplotlib.figure import Figure
from safetensors.numpy import save_file
from test_damaged_files import file_of, header_and_body

import implicit_rnn as irnn
from implicit_rnn import files


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.safetensors"


@pytest.fixture
def saved(path: Path) -> Path:
    make_net("numpy").save(path)
    return path


def with_metadata(path: Path, **changes: str | None) -> None:
    """Change the metadata of a safetensors file, leaving its tensors as they are."""
    header, body = header_and_body(path.read_bytes())
    header["__metadata__"] = {k: v for k, v in (header["__metadata__"] | changes).items() if v is not None}
    path.write_bytes(file_of(header, body))


# --- what is saved comes back --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    "settings", [{}, {"constraint": irnn.Free()}, {"outputs": [4, 0]}, {"activation": "silu", "neurons": 1}], ids=str
)
def test_loaded_net_is_the_saved_one_bit_by_bit(engine, path, dtype, settings, X):
    net = make_net(engine, dtype=dtype, **settings)
    net.save(path)
    loaded = irnn.load(path, engine=engine)
    assert loaded.topology == net.topology
    assert loaded.parameters.dtype == net.parameters.dtype
    assert loaded.parameters.tobytes() == net.parameters.tobytes()
    np.testing.assert_array_equal(loaded.predict(X), net.predict(X))


@pytest.mark.filterwarnings("ignore:.* has weights that are not finite")
@pytest.mark.parametrize("value", [np.nan, np.inf, -0.0, 5e-324])
def test_unusual_numbers_come_back_bit_by_bit(path, value):
    net = make_net("numpy")
    net.parameters[3] = value
    net.save(path)
    assert irnn.load(path).parameters.tobytes() == net.parameters.tobytes()


def test_a_constraint_that_no_file_could_make_again_is_refused_when_it_is_saved(path):
    class Mine(irnn.Perron):
        pass

    net = irnn.Network(2, [irnn.Layer(3)], outputs=1, constraint=Mine(), engine="numpy")
    with pytest.raises(TypeError, match="the constraint Mine is not one of the package"):
        net.save(path)
    assert not path.exists()


def test_net_trained_and_saved_on_one_engine_can_be_trained_on_after_loading(engine, path, X, Y):
    net = make_net(engine)
    net.fit(X, Y, epochs=5)
    net.save(path)
    loaded = irnn.load(path, engine="numpy")
    loss = loaded.fit(X, Y, epochs=1).loss[0]
    assert loss == pytest.approx(net.loss_and_gradient(X, Y)[0], rel=1e-9)  # each solved to 1e-10


def test_unknown_engine_is_refused(saved):
    with pytest.raises(ValueError, match="engine is 'torch'"):
        irnn.load(saved, engine="torch")


# --- what is no model ----------------------------------------------------------------------------------------


def test_missing_file_is_reported_as_such(path):
    with pytest.raises(FileNotFoundError, match=r"net\.safetensors"):
        irnn.load(path)


@pytest.mark.parametrize("content", [b"", b"no model", b"\x00" * 100, b"\xff" * 100, b"PK\x03\x04" + b"\x00" * 64])
def test_file_that_is_no_model_is_refused(path, content):
    path.write_bytes(content)
    assert issubclass(irnn.ModelFileError, ValueError)
    with pytest.raises(irnn.ModelFileError, match=r"net\.safetensors is not a valid safetensors file \(truncated\?\)"):
        irnn.load(path)


def test_safetensors_file_of_somebody_else_is_refused(path):
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(
        irnn.ModelFileError, match=r"net\.safetensors is a safetensors file, but not a model of implicit-rnn$"
    ):
        irnn.load(path)


def test_checkpoint_is_no_model_and_told_what_reads_it(path):
    make_net("numpy").fit(np.zeros((1, 3)), np.zeros((1, 2)), epochs=1, checkpoint=path, progress=False)
    with pytest.raises(irnn.ModelFileError, match=r"not a model .*: it is a checkpoint, from which fit\(.*resume=path"):
        irnn.load(path)


def test_newer_format_version_is_refused_with_the_remedy(saved):
    with_metadata(saved, format_version="2")
    with pytest.raises(irnn.ModelFileError, match=r"has format version 2; .* reads up to 1: pip install --upgrade"):
        irnn.load(saved)


@pytest.mark.parametrize("version", [None, "", "one", "1.5", "-1", "²", "9" * 5000])
def test_format_version_that_is_none_is_refused(saved, version):
    with_metadata(saved, format_version=version)
    with pytest.raises(irnn.ModelFileError, match="format version"):
        irnn.load(saved)


@pytest.mark.parametrize(
    "damage",
    [{"topology": text} for text in (None, "", "[]", "null", "{}", '{"inputs": 3}', "not json")]
    + [{"dtype": text} for text in (None, "float16", "")],
    ids=str,
)
def test_damaged_description_is_refused(saved, damage):
    with_metadata(saved, **damage)
    with pytest.raises(irnn.ModelFileError, match="describes no network that this version can read"):
        irnn.load(saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("inputs", 0),
        ("inputs", "3"),
        ("layers", []),
        ("layers", [{"neurons": 5, "activation": "swoosh", "lateral": True}]),
        ("layers", [{"neurons": 5, "activation": "tanh", "lateral": True, "depth": 2}]),
        ("layers", 5),
        ("outputs", None),
        ("constraint", {"name": "Unknown", "options": {}}),
        ("constraint", {"name": "Perron", "options": {"kappa": 2}}),
        ("constraint", {"name": "Perron", "options": {"kapa": 0.5}}),
        ("constraint", None),
    ],
)
def test_topology_this_version_does_not_know_is_refused(saved, key, value):
    with_metadata(saved, topology=json.dumps(make_net("numpy").topology.description() | {key: value}))
    with pytest.raises(irnn.ModelFileError, match="describes no network that this version can read"):
        irnn.load(saved)


def test_weights_that_do_not_fit_the_topology_are_refused(saved):
    with_metadata(saved, topology=json.dumps(make_net("numpy", neurons=4).topology.description()))
    with pytest.raises(irnn.ModelFileError, match=r"has the weights .* but its topology needs"):
        irnn.load(saved)


def test_folder_is_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model file .*, which is a folder"):
        irnn.load(tmp_path)


# --- writing -------------------------------------------------------------------------------------------------


def test_saving_replaces_an_older_file(saved):
    net = make_net("numpy", seed=99)
    net.save(saved)
    np.testing.assert_array_equal(irnn.load(saved).parameters, net.parameters)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_failing_or_interrupted_write_leaves_the_old_file_and_nothing_else(saved, monkeypatch, error):
    before = saved.read_bytes()
    monkeypatch.setattr(files.os, "fsync", mock.Mock(side_effect=error))
    with pytest.raises(type(error)) as caught:
        make_net("numpy", seed=99).save(saved)
    assert error in (caught.value, caught.value.__cause__)  # the second with the name of the file
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize(("write", "content"), [(files.write_json, 1), (files.write_figure, Figure())])
def test_failing_write_of_a_result_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch, write, content):
    path = tmp_path / "result"
    path.write_text("of yesterday")
    monkeypatch.setattr(files.os, "fsync", mock.Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"No space left on device: '.*result'"):
        write(path, content)
    assert path.read_text() == "of yesterday"


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_saved_file_has_the_permissions_of_any_new_file(saved):
    other = saved.parent / "other"
    other.write_text("")
    assert oct(saved.stat().st_mode) == oct(other.stat().st_mode)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_saved_file_keeps_its_permissions_and_those_of_other_threads_are_left_alone(saved, monkeypatch):
    monkeypatch.setattr(files.os, "umask", None)  # it is that of the whole process
    saved.chmod(0o600)
    make_net("numpy", seed=99).save(saved)
    assert saved.stat().st_mode & 0o777 == 0o600
