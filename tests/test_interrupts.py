"""Every Ctrl-C counts on the NumPy engine: interrupts from another process, none of which may be lost."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import ENVIRONMENT

PRELUDE = """
    import os, sys, warnings
    import numpy as np
    import implicit_rnn as irnn

    warnings.simplefilter("ignore")
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((20, 3)), rng.standard_normal((20, 2))

    def make(constraint="perron", engine="numpy"):
        return irnn.Network(3, [irnn.Layer(5)], outputs=2, constraint=constraint, seed=0, engine=engine)

    net, free = make(), make(irnn.Free())
    nets = [make(), make()]
    free.weights["R"][...] *= 20
    settings = dict(batch_size=7, progress=False, on_failure="ignore")
"""
WORK = {
    "solves": """
        for solver in (irnn.Auto(max_iterations=40), irnn.Newton(max_iterations=20), irnn.Anderson(max_iterations=20), "picard"):
            free.predict(X, solver=solver, on_failure="ignore")
            net.loss_and_gradient(X, Y, solver=solver, on_failure="ignore")
    """,
    "fits": """
        net.fit(X, Y, epochs=5, validation=(X, Y), early_stopping=irnn.EarlyStopping(), **settings)
        free.fit(X, Y, epochs=2, **settings)
        irnn.fit_many(nets, X, Y, epochs=2, callbacks=[lambda progress: None], **settings)
        net.fit(X, Y, epochs=2, optimizer="lbfgs", progress=False, on_failure="ignore")
    """,
    "the command": """
        from implicit_rnn import cli
        if cli.main(["xor", "--engine", "numpy", "--neurons", "1", "--seeds", "2", "--out", sys.argv[1]]) == 130:
            raise KeyboardInterrupt
    """,
}
# The first call imports what is needed: Python itself ignores an interrupt in the callbacks of its imports.
# The dot tells the parent that the next interrupt may come: it is caught wherever it arrives.
LOOP = """
work()
while True:
    try:
        os.write(int(sys.argv[2]), b".")
        while True:
            work()
    except KeyboardInterrupt:
        pass
"""


@pytest.mark.parametrize(("work", "interrupts"), [("solves", 800), ("fits", 800), ("the command", 400)])
def test_no_interrupt_is_lost(work, interrupts, tmp_path):
    code = textwrap.dedent(PRELUDE) + "def work():" + textwrap.indent(textwrap.dedent(WORK[work]), "    ") + LOOP
    with Child(code, tmp_path, terminal=work == "the command") as child:
        lost = child.interrupt(interrupts)
    assert lost == 0


class Child:
    """A process that writes a dot whenever it is ready for an interrupt; if asked, on a terminal of its own."""

    def __init__(self, code: str, folder: Path, terminal: bool) -> None:
        self.ready, ready = os.pipe()
        self.terminal, keyboard = os.openpty() if terminal else (None, subprocess.DEVNULL)
        command = [sys.executable, "-c", code, str(folder / "out"), str(ready)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", CONTROLLED, *command] if terminal else command,
            stdin=keyboard,
            stdout=keyboard,
            stderr=keyboard,
            env=ENVIRONMENT | {"MPLBACKEND": "agg", "OPENBLAS_NUM_THREADS": "1"},
            cwd=folder,
            start_new_session=True,
            pass_fds=[ready],
        )
        os.close(ready)
        if terminal:
            os.close(keyboard)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        for descriptor in filter(None, (self.ready, self.terminal)):
            os.close(descriptor)

    def interrupt(self, times: int) -> int:
        """Send interrupts at random moments; how many of them did nothing within ten seconds."""
        moments = random.Random(0)
        assert self._is_ready(60), "the process did not start"
        lost = 0
        for _ in range(times):
            time.sleep(moments.expovariate(1 / 0.004))
            if self.terminal is None:
                self.process.send_signal(signal.SIGINT)
            else:
                os.write(self.terminal, b"\x03")
            lost += not self._is_ready(10)
        return lost

    def _is_ready(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            come, _, _ = select.select([d for d in (self.ready, self.terminal) if d is not None], [], [], left)
            if self.ready in come:
                return os.read(self.ready, 1) == b"."
            if come:
                os.read(self.terminal, 1 << 16)
        return False


CONTROLLED = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
