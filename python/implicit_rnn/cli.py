"""The command implicit-rnn."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from implicit_rnn import __version__
from implicit_rnn.console import abandon_unwritten_output, prepare_streams, progress_bar, say, warnings_in_one_line
from implicit_rnn.engines import ENGINES
from implicit_rnn.errors import ConvergenceError, EngineError, RunError
from implicit_rnn.files import prepared_folder

if TYPE_CHECKING:
    from tqdm import tqdm


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 for a failure, 2 for wrong usage, 130 for Ctrl-C."""
    prepare_streams()
    try:
        with warnings_in_one_line():
            options = _parser().parse_args(arguments)
            status = int(options.run(options))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has closed the pipe
        return 1
    except (EngineError, ConvergenceError, RunError, ValueError, OSError, MemoryError) as error:
        say(_reason(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    finally:
        abandon_unwritten_output()


def _reason(error: Exception) -> str:
    """The message of an error, without the error number of the operating system."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    return str(error) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="implicit-rnn", description="Implicit recurrent networks.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    xor = commands.add_parser("xor", help="one layer learns XOR: table, figure and JSON")
    xor.add_argument("--neurons", type=_positive, nargs="+", action=_Once, default=[1, 2, 3, 4], metavar="N")
    xor.add_argument(
        "--constraint",
        choices=("none", "free", "perron"),
        nargs="+",
        action=_Once,
        default=["none", "free", "perron"],
        help="of the lateral connections; none: no lateral connections",
    )
    xor.add_argument("--seeds", type=_positive, help="nets per entry (200 on the Julia engine, 10 on the NumPy engine)")
    _common(xor, _xor, Path("xor"), "xor.json and xor.png")

    cost = commands.add_parser("cost", help="implicit gradient against BPTT: time, memory and error")
    cost.add_argument(
        "--steps",
        type=_positive,
        nargs="+",
        action=_Once,
        metavar="K",
        help="lengths of the unrolled chain (5 to 1000)",
    )
    _common(cost, _cost, Path("cost"), "cost.json and cost.png")

    pendulum = commands.add_parser("pendulum", help="length and damping of a pendulum from its measured trajectory")
    _add_pendulum_options(pendulum)
    kept = "data, figures, the best model and the runs from which an interrupted call continues"
    _common(pendulum, _pendulum, Path("pendulum"), kept)

    doctor = commands.add_parser("doctor", help="show which engine can be used, and what is wrong with the other")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument("--install", action="store_true", help="install Julia and its packages if they are missing")
    doctor.add_argument(
        "--gpu", action="store_true", help="compute on the GPU and on the CPU, compare, and print a table of times"
    )
    doctor.set_defaults(run=_doctor)

    setup = commands.add_parser("setup", help="prepare and precompile a Julia environment, once")
    setup.add_argument("--julia", metavar="EXE", help="a Julia executable to use as it is (with --project)")
    setup.add_argument("--project", metavar="DIR", help="a Julia project that has the packages (with --julia)")
    setup.add_argument("--cuda", action="store_true", help="add CUDA.jl, for networks on NVIDIA cards")
    setup.add_argument(
        "--remove", action="store_true", help="delete what setup installed, and forget the Julia it was given"
    )
    setup.set_defaults(run=_setup)
    return parser


_SEEDS, _QUICK_SEEDS = 30, 3


def _add_pendulum_options(pendulum: argparse.ArgumentParser) -> None:
    number = f"training sets and nets per model (default: {_SEEDS}, with --quick {_QUICK_SEEDS})"
    pendulum.add_argument("--seeds", type=_positive, help=number)
    pendulum.add_argument(
        "--models",
        nargs="+",
        action=_Once,
        metavar="NAME",
        help="some of the models only; an unknown name lists them all",
    )
    pendulum.add_argument("--jobs", type=_positive, help="worker processes (default: 1)")
    mode = pendulum.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="a one-minute trial: few seeds, little data, few epochs")
    mode.add_argument(
        "--tune", action="store_true", help="compare learning rates, on seeds that the study does not use"
    )
    mode.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="length and damping of your own pendulum, from a table of times and angles (or angular velocities) as "
        "written by phyphox, Tracker, an encoder or a spreadsheet: any separator, decimal commas, with or without a "
        "header",
    )
    own = pendulum.add_argument_group("with --data")
    own.add_argument("--model", type=Path, metavar="FILE", help="a model file; without it, one is trained")
    own.add_argument(
        "--columns",
        type=_list,
        metavar="TIME,ANGLE",
        help="names or numbers (from 1) of the columns, where the file is ambiguous; ANGLE alone with --fps; TIME,X,Y for "
        "positions of the bob",
    )
    own.add_argument(
        "--units",
        type=_list,
        metavar="TIME,ANGLE",
        help="s, ms, µs, ns or min for the time; rad, mrad, deg, turns or N/rev (an encoder of N counts per "
        "revolution) for the angle, rad/s or deg/s for an angular velocity; they overrule the file, and one alone may "
        "be given",
    )
    own.add_argument(
        "--fps", type=float, metavar="N", help="frames per second, where the file has frame numbers or no times"
    )


def _common(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int], out: Path, kept: str) -> None:
    """The options that all experiments share, including the folder ``out`` for the ``kept`` files."""
    parser.add_argument("--out", type=_folder, default=out, help=f"folder for {kept} (default: %(default)s)")
    parser.add_argument("--engine", choices=ENGINES, help="default: IMPLICIT_RNN_ENGINE, else auto")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.set_defaults(run=run)


class _Once(argparse.Action):
    """A list without duplicates, which would be computed twice."""

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: Any, option_string: object = None
    ) -> None:
        setattr(namespace, self.dest, list(dict.fromkeys(values)))


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 to 999999999")
    return int(text)


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("expected the name of a folder, got an empty one")
    return Path(text)


def _list(text: str) -> list[str]:
    return next(csv.reader([text], skipinitialspace=True))


def _xor(options: argparse.Namespace) -> int:
    from implicit_rnn.engines import get_engine
    from implicit_rnn.experiments import xor

    with prepared_folder(options.out, xor.FILES):
        engine = get_engine(options.engine)
        seeds = options.seeds or xor.DEFAULT_SEEDS[engine.name]
        fewer = (
            " (fewer than the 200 of the Julia engine; --seeds sets them)" if not options.seeds and seeds < 200 else ""
        )
        say(f"{engine.name} engine, {seeds} seeds per entry{fewer}")
        with progress_bar(total=len(options.neurons) * len(options.constraint), unit="entry") as bar:
            result = xor.run(options.neurons, options.constraint, seeds, engine.name, report=lambda cell: _advance(bar))
        _publish(options, result.as_dict(), xor.table(result), lambda: xor.save(result, options.out))
    return 0


def _cost(options: argparse.Namespace) -> int:
    from implicit_rnn.experiments import cost

    steps = options.steps or cost.STEPS
    with prepared_folder(options.out, cost.FILES):
        with progress_bar(total=len(cost.settings(steps)), unit="point") as bar:
            result = cost.run(steps, options.engine, report=lambda point: _advance(bar))
        _publish(options, result.as_dict(), cost.table(result), lambda: cost.save(result, options.out))
    return 0


def _pendulum(options: argparse.Namespace) -> int:
    from implicit_rnn.engines import get_engine

    for name in ("model", "columns", "units", "fps"):
        if getattr(options, name) is not None and not options.data:
            raise ValueError(f"--{name} is used with --data only")
    for mode, names in (("data", ("models", "seeds", "jobs")), ("tune", ("seeds",))):
        for name in names:
            if getattr(options, mode) and getattr(options, name) is not None:
                raise ValueError(f"--{name} cannot be combined with --{mode}, which ignores it; leave one of them out")
    with prepared_folder(options.out):
        engine = get_engine(options.engine).name
        say(f"{engine} engine")
        return _own_pendulum(options, engine) if options.data else _pendulum_study(options, engine)


def _pendulum_study(options: argparse.Namespace, engine: str) -> int:
    from implicit_rnn.experiments import pendulum

    protocol, seeds = (pendulum.QUICK, _QUICK_SEEDS) if options.quick else (pendulum.FULL, _SEEDS)
    seeds, jobs = options.seeds or seeds, options.jobs or 1
    models = options.models or list(pendulum.MODELS)
    work = {"engine": engine, "jobs": jobs, "folder": options.out / "runs"}
    runs = len(models) * (len(pendulum.TUNING_SEEDS) * len(pendulum.RATES) if options.tune else seeds)
    with progress_bar(total=runs, unit="run") as bar:
        if options.tune:
            tuning = pendulum.tune(models, report=lambda name, kept: _advance(bar), **work)
        else:
            study = pendulum.run(models, range(seeds), protocol, report=lambda name, kept: _advance(bar), **work)
    if options.tune:
        data, text = pendulum.tuning_as_dict(tuning), pendulum.tuning_table(tuning)
        _publish(options, data, text, lambda: [pendulum.save_tuning(tuning, options.out)])
    else:
        _publish(options, pendulum.as_dict(study), pendulum.table(study), lambda: pendulum.save(study, options.out))
        kept = f", {study.kept} of {runs} runs kept from an earlier call" if study.kept else ""
        say(f"{study.seconds:.0f} s with {jobs} jobs{kept}")
    return 0


def _own_pendulum(options: argparse.Namespace, engine: str) -> int:
    from implicit_rnn.experiments import pendulum

    record = pendulum.read(options.data, options.columns, options.units, options.fps)
    if options.model:
        reader = pendulum.Reader.load(options.model, engine)
    else:
        shipped = pendulum.MODELS[pendulum.SHIPPED]
        say(f"training a model ({shipped.title})")
        reader, _ = pendulum.train(shipped, 0, shipped.learning_rate, engine=engine)
        options.out.mkdir(parents=True, exist_ok=True)
        reader.save(options.out / pendulum.MODEL_FILE)
        say(f"wrote {options.out / pendulum.MODEL_FILE}, for --model")
    found = pendulum.estimate(reader, record)
    _publish(options, found.as_dict(), str(found), lambda: [pendulum.save_figure(found, options.out)])
    return 0


def _publish(options: argparse.Namespace, data: dict[str, Any], text: str, save: Callable[[], list[Path]]) -> None:
    """Save a result and print it, so that it is not lost if the disk is full."""
    try:
        files = save()
    finally:
        print(json.dumps(data) if options.json else text)
    say(f"wrote {', '.join(map(str, files))}")


def _advance(bar: tqdm[Any] | None) -> None:
    if bar is not None:
        bar.update()


def _doctor(options: argparse.Namespace) -> int:
    from implicit_rnn.runtime import doctor

    report = doctor.diagnose(install=options.install, gpu=options.gpu)
    print(json.dumps(report, indent=2) if options.json else doctor.describe(report))
    return 0 if report["ok"] else 1


def _setup(options: argparse.Namespace) -> int:
    from implicit_rnn.runtime.setup import remove, setup

    if options.remove:
        if options.julia is not None or options.project is not None or options.cuda:
            raise ValueError(
                "--remove deletes everything that setup has installed; it cannot be combined with other options"
            )
        for path in remove():
            say(f"deleted {path}")
        return 0
    prepared = setup(options.julia, options.project, cuda=options.cuda)
    say(f"ready, {prepared.exe} with the project {prepared.project}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
