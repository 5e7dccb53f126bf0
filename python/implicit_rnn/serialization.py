"""Networks as safetensors files: the weights by name, the topology as JSON in the metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save as serialize

from implicit_rnn.engines import check_device, check_engine
from implicit_rnn.errors import ModelFileError, warn
from implicit_rnn.files import as_path, read_tensors, write_atomically
from implicit_rnn.model.topology import Topology
from implicit_rnn.options import is_of_package

if TYPE_CHECKING:
    from implicit_rnn.network import Network

FORMAT = "implicit-rnn"
FORMAT_VERSION = 1


def save(net: Network, path: str | Path, notes: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write ``net`` to ``path``, atomically: temporary file, fsync, rename. ``notes`` are texts stored with it, by name."""
    constraint = net.topology.constraint
    if not is_of_package(type(constraint)):
        raise TypeError(
            f"the constraint {constraint.name} is not one of the package, and load could not make it again from a file: pickle "
            "the network, or keep net.parameters"
        )
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "topology": json.dumps(net.topology.description()),
        "dtype": net.dtype.name,
        "device": net.device,
        **{f"note:{name}": text for name, text in notes.items()},
    }
    tensors = {name: np.ascontiguousarray(weight) for name, weight in net.weights.items()}
    write_atomically(as_path(path), serialize(tensors, metadata))


def notes(path: str | Path) -> dict[str, str]:
    """The notes that ``save`` wrote with a network; ``ModelFileError`` for a file that is not a model."""
    _, metadata = read_tensors(Path(path), ModelFileError)
    return {name[len("note:") :]: text for name, text in metadata.items() if name.startswith("note:")}


def load(path: str | Path, engine: str | None = None, device: str | None = None) -> Network:
    """The network that ``Network.save`` wrote.

    Parameters
    ----------
    path
        The file.
    engine
        As for ``Network``; it is not stored in the file.
    device
        As for ``Network``; ``None`` for the device of the saved network.

    Returns
    -------
    The network, with equal topology, dtype and parameters.

    Raises
    ------
    ValueError
        For an unknown engine or device.
    FileNotFoundError
        If there is no such file.
    ModelFileError
        For a file that is not a model, is truncated or has a later format version.

    Examples
    --------
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/net.safetensors"
    >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
    >>> net.save(path)
    >>> bool((irnn.load(path).parameters == net.parameters).all())
    True
    """
    from implicit_rnn.network import Network

    source = as_path(path)
    if not source.is_file():
        raise FileNotFoundError(f"no model file {source}{', which is a folder' * source.is_dir()}")
    tensors, metadata = read_tensors(source, ModelFileError)
    if metadata.get("format") != FORMAT:
        is_checkpoint = metadata.get("format", "").startswith(FORMAT)
        hint = ": it is a checkpoint, from which fit(X, Y, resume=path) continues" * is_checkpoint
        raise ModelFileError(f"{source} is a safetensors file, but not a model of {FORMAT}{hint}")
    version = metadata.get("format_version", "")
    if not re.fullmatch("[0-9]{1,9}", version) or int(version) > FORMAT_VERSION:
        raise ModelFileError(
            f"{source} has format version {version[:20] or 'unknown'}; this version of implicit-rnn reads up to "
            f"{FORMAT_VERSION}: pip install --upgrade implicit-rnn"
        )
    check_engine(engine)
    if device is not None:
        check_device(device)
    try:
        topology = Topology.from_description(json.loads(metadata["topology"]))
        net = Network.from_topology(topology, metadata["dtype"], engine, device or metadata.get("device", "cpu"))
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, MemoryError, RecursionError) as error:
        raise ModelFileError(f"{source} describes no network that this version can read: {error}") from error
    expected = {name: weight.shape for name, weight in net.weights.items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if expected != found:
        raise ModelFileError(f"{source} has the weights {found}, but its topology needs {expected}")
    for name, tensor in tensors.items():
        if tensor.dtype != net.dtype:
            raise ModelFileError(
                f"{source} has the weight {name} in {tensor.dtype}, but says {net.dtype}; the file is damaged"
            )
        net.weights[name][...] = tensor
    broken = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
    if broken:
        warn(
            f"{source} has weights that are not finite: {', '.join(broken)}; the network has no equilibrium",
            UserWarning,
        )
    return net
