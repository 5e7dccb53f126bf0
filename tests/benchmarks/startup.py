"""What a process waits for: the import, the start of the Julia engine, the first gradient; and what is compiled meanwhile.

Medians over new processes. What is compiled is counted from Julia's --trace-compile: specialisations of ImplicitRNN and of other
packages, which precompilation should have left none of.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

IMPORT = "import time; t = time.perf_counter(); import implicit_rnn; print(time.perf_counter() - t)"

FIRST_GRADIENT = """
import json, time
begin = time.perf_counter()
import numpy as np
import implicit_rnn as irnn
def seconds():
    return time.perf_counter() - begin
times = {"import": seconds()}
irnn.get_engine("julia")
times["engine started"] = seconds()
net = irnn.Network(3, [irnn.Layer(10)], outputs=1, seed=0, engine="julia")
X = np.random.default_rng(0).standard_normal((20, 3))
net.loss_and_gradient(X, X[:, :1])
times["first gradient"] = seconds()
net.loss_and_gradient(X, X[:, :1])
times["second gradient"] = seconds()
net.fit(X, X[:, :1], epochs=2, batch_size=10, progress=False)
times["first fit"] = seconds()
net.equilibrium(X)
times["first equilibrium"] = seconds()
print(json.dumps(times))
"""

IMPORT_GOAL = 0.3
"""Seconds."""


def run(repeats: int = 5) -> dict[str, Any]:
    imports = [float(python(IMPORT)) for _ in range(repeats)]
    starts = [json.loads(python(FIRST_GRADIENT)) for _ in range(repeats)]
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.jl"
        python(FIRST_GRADIENT, PYTHON_JULIACALL_TRACE_COMPILE=str(trace))
        compiled = trace.read_text().splitlines()
    ours = [line for line in compiled if "ImplicitRNN" in line]
    print(f"{'until':<18} {'seconds':>8}")
    print(f"{'import alone':<18} {median(imports):>8.3f}{'' if median(imports) < IMPORT_GOAL else '  MISSED'}")
    for name in starts[0]:
        print(f"{name:<18} {median(start[name] for start in starts):>8.3f}")
    print(f"compiled at run time: {len(ours)} specialisations of ImplicitRNN, {len(compiled) - len(ours)} of others")
    return {"imports": imports, "starts": starts, "compiled": {"ours": ours, "others": len(compiled) - len(ours)}}


def python(code: str, **environment: str) -> str:
    """The last line that a new Python process prints."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1]
