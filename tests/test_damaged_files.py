"""Damage to model files and checkpoints is told as such; files that are written appear whole, under any name."""

from __future__ import annotations

import json
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import implicit_rnn as irnn
from implicit_rnn.errors import CheckpointError, ModelFileError

MUTATIONS = 5000

# --- models --------------------------------------------------------------------------------------------------


def net() -> irnn.Network:
    return irnn.Network(2, [irnn.Layer(2), irnn.Layer(2)], feedback=True, outputs=1, seed=0, engine="numpy")


def header_and_body(data: bytes) -> tuple[dict, bytes]:
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def file_of(header: dict, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """The file cut, with bits flipped, or with a field of its header removed, of another type, dtype or shape."""
    kind = rng.integers(6)
    if kind == 0:
        return data[: rng.integers(len(data))]
    if kind == 1:
        changed = bytearray(data)
        for _ in range(rng.integers(1, 9)):
            changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
        return bytes(changed)
    header, body = header_and_body(data)
    part = header if rng.integers(2) else header[str(rng.choice(list(header)))]
    name = str(rng.choice(list(part)))
    if kind == 2:
        del part[name]
    elif kind == 3:
        part[name] = [None, 5, "x", [], {}, "9" * 400, -1][rng.integers(7)]
    elif kind == 4:
        entry = header[str(rng.choice([key for key in header if key != "__metadata__"]))]
        entry["dtype"] = str(rng.choice(["BF16", "F16", "F32", "I64", "BOOL", "F8_E4M3", "nonsense"]))
    else:
        entry = header[str(rng.choice([key for key in header if key != "__metadata__"]))]
        entry["shape"] = [int(n) for n in rng.integers(-1, 2**40, rng.integers(4))]
    return file_of(header, body)


def test_damaged_model_files_raise_nothing_but_model_file_errors(tmp_path: Path):
    rng = np.random.default_rng(16)
    path = tmp_path / "net.safetensors"
    net().save(path)
    whole = path.read_bytes()
    refused: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(MUTATIONS):
            path.write_bytes(mutated(whole, rng))
            try:
                irnn.load(path, engine="numpy")
            except ModelFileError as error:
                refused.append(str(error))
    assert len(refused) > MUTATIONS / 2
    assert all(str(path) in message for message in refused)


# --- checkpoints ---------------------------------------------------------------------------------------------

DATA = np.linspace(-1, 1, 6).reshape(3, 2), np.linspace(0, 1, 3).reshape(3, 1)


def train(**settings) -> tuple[irnn.Network, irnn.Run]:
    some = net()
    return some, some.fit(*DATA, epochs=2, batch_size=2, validation=DATA, **settings)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    train(checkpoint=tmp_path / "run.safetensors")
    return tmp_path / "run.safetensors"


def test_damaged_checkpoints_raise_nothing_but_checkpoint_errors_and_none_is_taken_for_whole(checkpoint: Path):
    rng = np.random.default_rng(16)
    whole = checkpoint.read_bytes()
    expected, _ = train(resume=checkpoint)
    refused: list[str] = []
    for _ in range(MUTATIONS):
        checkpoint.write_bytes(mutated(whole, rng))
        try:
            some, _ = train(resume=checkpoint)
        except CheckpointError as error:
            refused.append(str(error))
        else:  # the mutation has changed nothing, such as a type to itself
            np.testing.assert_array_equal(some.parameters, expected.parameters)
    assert len(refused) > 0.95 * MUTATIONS
    assert all(str(checkpoint) in message for message in refused)


def test_checkpoint_without_a_field_is_told_what_it_lacks(checkpoint: Path):
    header, body = header_and_body(checkpoint.read_bytes())
    del header["__metadata__"]["random"]
    checkpoint.write_bytes(file_of(header, body))
    with pytest.raises(CheckpointError, match=r"run\.safetensors is damaged: it lacks random"):
        train(resume=checkpoint)


def test_parameters_of_a_checkpoint_that_are_not_finite_are_said(checkpoint: Path):
    arrays = load_file(checkpoint)
    arrays["parameters"][0, 3] = np.nan
    with safe_open(checkpoint, "numpy") as file:
        save_file(arrays, checkpoint, file.metadata())
    with pytest.raises(CheckpointError, match=r"is damaged.*not finite \(parameters\)"):
        train(resume=checkpoint)


def test_checkpoint_of_a_net_whose_parameters_never_were_finite_is_read_with_a_warning(tmp_path: Path):
    some = net()
    some.parameters[0] = np.nan
    settings = {"epochs": 2, "checkpoint": tmp_path / "run.safetensors", "on_failure": "ignore"}
    some.fit(*DATA, **settings)
    with pytest.warns(UserWarning, match="has parameters that are not finite"):
        some.fit(*DATA, resume=tmp_path / "run.safetensors", **settings)


# --- weights, links and names --------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_said(tmp_path: Path):
    some = net()
    some.weights["b"][...] = np.nan
    some.save(tmp_path / "net.safetensors")
    with pytest.warns(UserWarning, match="has weights that are not finite: b"):
        irnn.load(tmp_path / "net.safetensors")


@pytest.mark.skipif(os.name != "posix", reason="symbolic links of POSIX")
def test_saving_through_a_symbolic_link_writes_its_target(tmp_path: Path):
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link.safetensors", tmp_path / "there" / "net.safetensors"
    link.symlink_to(target)
    net().save(link)
    assert link.is_symlink()
    assert target.is_file()
    irnn.load(link)


def test_file_name_of_250_characters_can_be_saved(tmp_path: Path):
    path = tmp_path / ("n" * 238 + ".safetensors")
    net().save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_missing_folder_is_named_as_it_was_written(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: no/where, the folder of net\.safetensors"):
        net().save("no/where/net.safetensors")


def test_folder_in_place_of_a_file_is_refused(tmp_path: Path):
    with pytest.raises(IsADirectoryError, match="is a folder; expected the name of a file"):
        net().save(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="a device of Linux")
def test_device_is_written_and_never_replaced_by_a_file():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        net().save("/dev/full")
    net().save(os.devnull)
    assert Path("/dev/full").is_char_device()
    assert Path(os.devnull).is_char_device()


def test_file_that_cannot_be_written_is_named_as_it_was_written(tmp_path: Path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("implicit_rnn.files.Path.open", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied: 'net\.safetensors'"):
        net().save("net.safetensors")
