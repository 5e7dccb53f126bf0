"""What julia/src/cpu/tuning.jl has as numbers, measured on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import implicit_rnn as irnn


def run() -> dict[str, Any]:
    """The numbers by name, as they are and as measured."""
    irnn.get_engine("julia")
    import juliacall

    module = juliacall.newmodule("Tune")
    module.seval("include(path) = Base.include(@__MODULE__, path)")
    module.include(str(Path(__file__).with_suffix(".jl")))
    result: dict[str, Any] = {}
    print(f"{'':24}{'tuning.jl':>28}{'here':>36}")
    for name, now, measured in module.tune():
        result[name] = {"tuning.jl": now, "here": measured}
        print(f"{name:24}{now:>28}{measured:>36}")
    return result
