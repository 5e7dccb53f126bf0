"""Progress bars, warnings and results reach a person wherever the program runs, and never stop it."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from conftest import ENVIRONMENT, RunPython, make_net, run_process
from tqdm import tqdm

from implicit_rnn import cli, console, engines
from implicit_rnn.errors import RunError
from implicit_rnn.experiments import cost, xor
from implicit_rnn.files import prepare_folder
from implicit_rnn.runs import run_many

posix = pytest.mark.skipif(os.name != "posix", reason="descriptors and devices of POSIX")

# --- progress bars -------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch, stderr: io.StringIO | None, progress: bool | None) -> bool:
    monkeypatch.setattr(sys, "stderr", stderr)
    with console.progress_bar(progress, total=3) as bar:
        if bar is not None:
            bar.update()
        return bar is not None


def test_bar_is_shown_on_a_terminal_or_when_asked_for(monkeypatch):
    assert shown(monkeypatch, Terminal(), None)
    assert not shown(monkeypatch, io.StringIO(), None)
    assert shown(monkeypatch, io.StringIO(), True)
    assert not shown(monkeypatch, Terminal(), False)
    assert not shown(monkeypatch, SimpleNamespace(write=print), None)


@pytest.mark.parametrize("progress", [None, True, False])
@pytest.mark.parametrize("stream", [None, SimpleNamespace(closed=True)], ids=["none", "closed"])
def test_fit_does_without_standard_streams(progress, stream, monkeypatch, X, Y):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    assert len(make_net("numpy").fit(X, Y, epochs=2, progress=progress).loss) == 2


@pytest.fixture
def notebook(monkeypatch) -> None:
    """A kernel of Jupyter, as far as tqdm and we look."""
    kernel = ModuleType("IPython")
    kernel.get_ipython = lambda: SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    for name in [name for name in sys.modules if name in ("tqdm.auto", "tqdm.autonotebook", "tqdm.notebook")]:
        monkeypatch.delitem(sys.modules, name)


def test_bar_is_shown_in_a_notebook_without_ipywidgets_as_text_and_without_a_warning(notebook, monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    stream = io.StringIO()
    assert shown(monkeypatch, stream, None)
    assert "1/3" in stream.getvalue()
    assert not recwarn.list


def test_bar_of_a_notebook_is_hidden_when_asked_for(notebook, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert not shown(monkeypatch, io.StringIO(), False)


@posix
def test_bar_on_a_full_disk_stops_no_training(tmp_path):
    code = (
        "import numpy as np, implicit_rnn as irnn; net = irnn.Network(1, [2], outputs=1); X = np.ones((3, 1)); "
        "print(len(net.fit(X, X, epochs=3, progress=True).loss))"
    )
    done = run_shell(f"{sys.executable} -c '{code}' 2>/dev/full", tmp_path)
    assert done.stdout == "3\n", str(done)


def test_what_a_callback_writes_stands_above_the_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    with console.progress_bar(total=3) as bar:
        bar.update()
        tqdm.write("here", file=sys.stderr)
    assert "\nhere" not in stream.getvalue()
    assert "here\n" in stream.getvalue()


def test_training_without_a_bar_does_without_tqdm_and_its_thread(run_python: RunPython):
    code = """
        import sys, threading
        import implicit_rnn as irnn

        irnn.Network(1, [2], outputs=1, engine="numpy").fit([[1.0]], [[1.0]], epochs=2)
        print("tqdm" in sys.modules, threading.active_count())
    """
    assert run_python(code).stdout == "False 1\n"


def test_bars_outside_of_notebooks_are_those_of_tqdm_itself(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with console.progress_bar(total=3) as bar:
        assert type(bar) is tqdm


# --- streams -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("ascii", "1.10 +/- 0.02 m, x10^3, Cramer-Rao, s^-^1, ?"),
        ("latin-1", "1.10 ± 0.02 m, ×10³, Cramér-Rao, s^-¹, ?"),
        ("utf-8", "1.10 ± 0.02 m, ×10³, Cramér-Rao, s⁻¹, 網"),
    ],
)
def test_text_is_written_in_the_characters_a_stream_has(encoding, text, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    monkeypatch.setattr(sys, "stderr", None)
    console.prepare_streams()
    print("1.10 ± 0.02 m, ×10³, Cramér-Rao, s⁻¹, 網", end="", flush=True)
    print("lost", file=sys.stderr)
    assert raw.getvalue().decode(encoding) == text


def test_command_prints_a_result_on_an_ascii_stream(run_python: RunPython):
    code = """
        from implicit_rnn import cli
        from implicit_rnn.runtime import doctor

        doctor.diagnose = lambda **options: {"ok": True, "length": "1.10 ± 0.02", "project": "/home/Łukasz"}
        raise SystemExit(cli.main(["doctor"]))
    """
    done = run_python(code, ENVIRONMENT | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, str(done)
    assert "1.10 +/- 0.02" in done.stdout


# --- warnings and errors -------------------------------------------------------------------------------------


def test_command_prints_warnings_in_one_line_without_code(run_cli: RunPython, fresh_machine):
    done = run_cli("xor", "--neurons", "1", "--constraint", "none", "--seeds", "1", env=fresh_machine)
    assert done.returncode == 0, str(done)
    first, second, *_ = done.stderr.splitlines()
    assert first.startswith("implicit-rnn: warning: using the NumPy engine")
    assert second.startswith("implicit-rnn: numpy engine")


XOR = ("xor", "--neurons", "1", "--constraint", "none", "--seeds", "1", "--engine", "numpy", "--out")


def run_shell(line: str, folder: Path):
    command = " ".join([f"'{sys.executable}' -m implicit_rnn", *XOR])
    return run_process(["sh", "-c", line.format(xor=command)], ENVIRONMENT, cwd=folder)


@posix
@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("{xor} out >&-", 0),
        ("{xor} out 2>&-", 0),
        ("{xor} out >&- 2>&-", 0),
        ("{xor} out 2>/dev/full", 0),
        ("{xor} out >/dev/full", 1),
        ("{xor} out >/dev/full 2>&1", 1),
        ("{xor} out | true", 0),
    ],
)
def test_result_is_kept_where_streams_are_closed_or_full(line, status, tmp_path):
    done = run_shell(line, tmp_path)
    assert done.returncode == status, str(done)
    assert (tmp_path / "out" / "xor.json").stat().st_size > 0
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_results_are_written_without_the_metadata_of_the_package(run_python: RunPython, tmp_path):
    code = f"""
        from importlib import metadata

        def without(name, known=metadata.distribution):
            if "implicit" in name:
                raise metadata.PackageNotFoundError(name)
            return known(name)

        metadata.distribution = without
        from implicit_rnn import cli
        raise SystemExit(cli.main({[*XOR, "out"]}))
    """
    done = run_python(code)
    assert done.returncode == 0, str(done)
    assert json.loads((tmp_path / "out" / "xor.json").read_text())["versions"]["implicit-rnn"] == "unknown"


# --- folders for results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["xor", "cost", "pendulum"])
@pytest.mark.parametrize("out", ["file", "file/results"])
def test_folder_that_cannot_be_made_is_refused_before_the_work_begins(command, out, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engines, "get_engine", lambda *name: pytest.fail("the work has begun"))
    monkeypatch.setattr(cost, "run", lambda *arguments, **settings: pytest.fail("the work has begun"))
    assert cli.main([command, "--out", out]) == 1
    assert capsys.readouterr().err.startswith(f"implicit-rnn: no results can be written to {out}: ")


@pytest.mark.parametrize("command", ["xor", "cost", "pendulum"])
def test_command_that_fails_takes_away_the_folders_that_it_made_and_no_others(command, tmp_path, monkeypatch):
    def fail(*arguments, **settings):
        raise RunError("no luck")

    monkeypatch.setattr(engines, "get_engine", fail)
    monkeypatch.setattr(cost, "run", fail)
    (tmp_path / "mine").mkdir()
    assert cli.main([command, "--out", str(tmp_path / "mine" / "new" / "results")]) == 1
    assert cli.main([command, "--out", str(tmp_path / "mine")]) == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_empty_name_of_a_folder_is_wrong_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([*XOR, ""])
    assert "expected the name of a folder, got an empty one" in capsys.readouterr().err


def test_folder_without_permission_is_refused_as_it_was_written(tmp_path, monkeypatch):
    def refuse(*arguments, **settings):
        raise PermissionError(13, "Permission denied")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("implicit_rnn.files.tempfile.TemporaryFile", refuse)
    with pytest.raises(PermissionError, match="no results can be written to some/where: Permission denied"):
        prepare_folder(Path("some/where"))


def test_folder_in_the_place_of_a_result_is_refused(tmp_path):
    (tmp_path / "xor.json").mkdir()
    with pytest.raises(IsADirectoryError, match=r"no results can be written to .*: its xor\.json is a folder"):
        prepare_folder(tmp_path, ["xor.json"])


def test_table_is_printed_where_the_disk_fills_during_the_work(tmp_path, monkeypatch, capsys):
    def fill(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(xor, "save", fill)
    assert cli.main([*XOR, str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("recurrence")
    assert err.splitlines()[-1] == "implicit-rnn: No space left on device"


@posix
@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        ("{xor} out", 1, "no results can be written to out: the working folder has been deleted"),
        ("{xor} ../out", 1, "no results can be written to ../out: the working folder has been deleted"),
        ("{xor} $OLDPWD/out", 0, "wrote "),
    ],
)
def test_in_a_deleted_working_folder_only_relative_paths_are_refused(line, status, message, tmp_path):
    done = run_shell(f"mkdir gone && cd gone && rmdir ../gone && {line}", tmp_path)
    assert done.returncode == status, str(done)
    assert done.stderr.splitlines()[-1].startswith(f"implicit-rnn: {message}"), str(done)


def test_worker_processes_without_a_working_folder_are_refused_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(RunError, match="the working folder has been deleted"):
        run_many(pow, {"one": {"base": 2, "exp": 3}}, jobs=2)
    assert run_many(pow, {"one": {"base": 2, "exp": 3}}) == {"one": 8}


def test_network_and_training_do_without_a_working_folder(tmp_path, monkeypatch, X, Y):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    net = make_net("numpy")
    net.fit(X, Y, epochs=2, checkpoint=tmp_path / "run")
    net.save(tmp_path / "net")
    assert np.isfinite(net.predict(X)).all()
    with pytest.raises(FileNotFoundError, match="the working folder has been deleted"):
        net.save("net")
    with pytest.raises(
        FileNotFoundError, match="epoch 0 could not be written to run: the working folder has been deleted"
    ):
        net.fit(X, Y, checkpoint="run")


# --- a real notebook -----------------------------------------------------------------------------------------


def test_notebook_shows_the_bar_and_the_tables_without_a_warning(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("IMPLICIT_RNN_ENGINE", "numpy")
    cells = [
        "import numpy as np, implicit_rnn as irnn\n"
        "net = irnn.Network(1, [2], outputs=1, seed=0)\n"
        "X = np.linspace(-1, 1, 9)[:, None]\n"
        "run = net.fit(X, X, epochs=3)",
        "net",
        "run",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    resources = {"metadata": {"path": tmp_path}}
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    bar, *tables = [cell.outputs for cell in notebook.cells]
    shown = str(bar)
    assert "3/3" in shown
    assert "Warning" not in shown
    for (table,), title in zip(tables, ("Network", "Run"), strict=True):
        assert f"<caption>{title}</caption>" in table["data"]["text/html"]
        assert table["data"]["text/plain"].startswith(f"{title}(")
