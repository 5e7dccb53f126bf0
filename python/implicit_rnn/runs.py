"""Many independent runs at once: in this process, in worker processes, or on a cluster that joblib knows.

``joblib.parallel_config(backend="dask")``, or ``"ray"`` after ``ray.util.joblib.register_ray()``, around ``run_many`` sends
the runs to a cluster. Each worker process has its own single-threaded Julia. On Dask, whose tasks do not run in the
main thread of their worker, Julia must be started beforehand: ``client.run(implicit_rnn.runs.prepare_worker)``.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from pickle import PicklingError
from typing import Any

import numpy as np

from implicit_rnn import options
from implicit_rnn.errors import RunError
from implicit_rnn.files import as_path, prepare_folder, write_atomically
from implicit_rnn.fingerprints import describe_function
from implicit_rnn.options import as_python

Result = Mapping[str, Any]
"""What a run returns: plain data that JSON can hold, including NumPy scalars."""

THREADS = (
    "IMPLICIT_RNN_THREADS",
    "JULIA_NUM_THREADS",
    "PYTHON_JULIACALL_THREADS",
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
)


def run_many(
    run: Callable[..., Result],
    tasks: Mapping[str, Mapping[str, Any]],
    *,
    jobs: int = 1,
    folder: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    report: Callable[[str, bool], None] = lambda name, kept: None,
) -> dict[str, Any]:
    """Call ``run(**arguments)`` for the arguments of every task.

    Parameters
    ----------
    run
        A function at the top level of a module, so that worker processes can import it. Its result must be data that JSON
        can hold, and must depend on nothing but its arguments.
    tasks
        The arguments of each run, by its name. A name has up to 200 ASCII letters, digits, ``.``, ``_`` and ``-``, and is not
        the name of a device on Windows, such as "con". The arguments, too, are data that JSON can hold.
    jobs
        How many runs at once. 1 runs them here in series, where an exit (``SystemExit``) ends this process; more run in as many
        worker processes, where it fails only that run, or on the backend that ``joblib.parallel_config`` names.
    folder
        Where each result is stored in a file NAME.json as soon as its run has ended, or, on a backend that returns results in
        groups only, such as Ray's, as soon as the group of ``jobs`` runs has. A later call reuses results whose arguments,
        ``settings`` and function are the same; others are computed again and replaced. Functions are the same if they have
        the same name and hold the same values, as defaults, enclosed variables or arguments of a ``functools.partial``: numbers,
        strings, arrays, lists, dicts and functions are compared by value, everything else by its repr. Lambdas and nested
        functions must also have the same code, which depends on the version of Python; for changes in the code of other
        functions, or in what a function reads from its module, change ``settings``.
    settings
        Everything else that a result depends on, such as the version of the code.
    report
        Called in this process with the name of each finished task, and whether its result was reused.

    Returns
    -------
    The results by the tasks' names.

    Raises
    ------
    ValueError, TypeError
        For invalid jobs or names.
    OSError
        If nothing can be written to ``folder``.
    RunError
        If runs failed, or their results could not be kept, after all others are done, or as soon as a worker process died.
        It names them; finished results are kept in ``folder``, so that repeating the call continues from there.

    Examples
    --------
    >>> from implicit_rnn.runs import run_many
    >>> def train(seed):
    ...     net = irnn.Network(1, [irnn.Layer(2)], outputs=1, seed=seed)
    ...     run = net.fit([[0.1], [0.2]], [[0.3], [0.5]], epochs=10, progress=False)
    ...     return {"loss": run.loss[-1]}
    >>> results = run_many(train, {f"seed-{seed}": {"seed": seed} for seed in range(3)})
    >>> list(results)
    ['seed-0', 'seed-1', 'seed-2']
    """
    options.check_count("jobs", jobs)
    for what, function in (("run", run), ("report", report)):
        if not callable(function):
            raise TypeError(f"{what} is {function!r}; expected a function")
    if not isinstance(tasks, Mapping):
        raise TypeError(
            f"tasks is a {type(tasks).__name__}; expected the arguments of each run by its name, a dict of dicts"
        )
    if settings is not None and not isinstance(settings, Mapping):
        raise TypeError(f"settings is {settings!r}; expected a dict of what results depend on")
    for name, arguments in tasks.items():
        _check_name(name)
        if not isinstance(arguments, Mapping):
            raise TypeError(f"tasks[{name!r}] is {arguments!r}; expected the arguments of the run by name, a dict")
    store = None if folder is None else _Store(as_path(folder, "folder"), describe_function(run), settings or {})
    results: dict[str, Any] = {}
    for name, arguments in tasks.items():
        if store and (kept := store.find(name, arguments)) is not None:
            results[name] = kept["result"]
            report(name, True)
    missing = {name: arguments for name, arguments in tasks.items() if name not in results}
    failures: dict[str, tuple[str, str]] = {}
    in_series = (_attempt(run, name, arguments) for name, arguments in missing.items())
    attempts: Iterator[tuple[str, Any, Any]] = (
        in_series if jobs == 1 or not missing else _in_workers(run, missing, jobs)
    )
    try:
        for name, result, failure in attempts:
            if failure is not None:
                failures[name] = failure
                continue
            if store:
                try:
                    store.keep(name, missing[name], result)
                except OSError as error:  # a full disk, say, which may have room again for those still to come
                    failures[name] = f"its result could not be kept: {error}", traceback.format_exc()
                    continue
            results[name] = result
            report(name, False)
    except _WorkerDied as error:
        left = [name for name in missing if name not in results and name not in failures]
        raise RunError(
            f"a worker process died ({error}) with {len(left)} of {len(tasks)} runs to do, among them {_abbreviated(left)}; the "
            "usual cause is too little memory for that many workers: try fewer jobs. "
            + (f"Finished results are kept in {folder}" if store else "Nothing was kept, as no folder was given")
        ) from error
    if failures:
        name, (reason, _) = next(iter(failures.items()))
        raise RunError(
            f"{len(failures)} of {len(tasks)} runs failed: {_abbreviated(list(failures))}. {name}: {reason}",
            {name: text for name, (_, text) in failures.items()},
        )
    return {name: results[name] for name in tasks}


def prepare_worker(engine: str | None = None) -> str:
    """Give this process one thread for Julia and for BLAS, and start its engine.

    Call it before anything else starts Julia in the process, and from its main thread.

    Parameters
    ----------
    engine
        As for ``get_engine``.

    Returns
    -------
    The engine's name.

    Raises
    ------
    EngineError
        As ``get_engine``.

    Examples
    --------
    On Dask, before the first run: ``client.run(implicit_rnn.runs.prepare_worker)``.
    """
    from implicit_rnn.engines import get_engine

    os.environ.update(dict.fromkeys(THREADS, "1"))
    return get_engine(engine).name


def _in_workers(
    run: Callable[..., Result], tasks: Mapping[str, Mapping[str, Any]], jobs: int
) -> Iterator[tuple[str, Any, Any]]:
    from joblib.parallel import get_active_backend

    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise RunError("the working folder has been deleted, and worker processes need it; jobs=1 does not") from error
    backend, _ = get_active_backend()
    client = getattr(backend, "client", None)
    results = _on_joblib(run, tasks, jobs) if client is None else _on_dask(client, run, tasks)
    try:
        yield from results
    except PicklingError as error:
        raise TypeError(
            "run, or a value it holds, cannot be pickled and sent to worker processes; jobs=1 does not need that"
        ) from error
    except Exception as error:  # errors of a run were caught where it ran
        raise _WorkerDied(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error


def _on_joblib(
    run: Callable[..., Result], tasks: Mapping[str, Mapping[str, Any]], jobs: int
) -> Iterator[tuple[str, Any, Any]]:
    # joblib's own worker processes are started afresh, never forked: Julia does not survive a fork.
    from joblib import Parallel, delayed

    settings: dict[str, Any] = {"n_jobs": jobs, "batch_size": 1, "pre_dispatch": "all", "max_nbytes": None}
    attempts = [delayed(_attempt_in_child)(os.getpid(), run, name, task) for name, task in tasks.items()]
    try:
        parallel, bunch = Parallel(return_as="generator_unordered", **settings), len(attempts)
    except ValueError:  # joblib's answer where the backend, such as Ray's, returns lists only
        parallel, bunch = Parallel(**settings), jobs
    with parallel:  # the same workers for all bunches
        for first in range(0, len(attempts), bunch):
            yield from parallel(attempts[first : first + bunch])


def _on_dask(
    client: Any, run: Callable[..., Result], tasks: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, Any, Any]]:
    # Without joblib's backend, which waits for ever for a task whose worker has died.
    from distributed import as_completed

    futures = [client.submit(_attempt_in_worker, run, name, task, pure=False) for name, task in tasks.items()]
    try:
        for future in as_completed(futures):  # type: ignore[no-untyped-call]
            yield future.result()
    finally:
        client.cancel(futures)


def _attempt(
    run: Callable[..., Result],
    name: str,
    arguments: Mapping[str, Any],
    failures: tuple[type[BaseException], ...] = (Exception,),
) -> tuple[str, Result | None, tuple[str, str] | None]:
    try:
        own = copy.deepcopy(arguments)  # as in a separate process: changes by the run affect nothing else
        return name, json.loads(_as_json("run(...)", run(**own))), None  # the same whether stored or not
    except failures as error:
        reason = f"{type(error).__name__}: {error}".strip(": \n").splitlines()[0]
        return name, None, (reason, traceback.format_exc())


def _as_json(name: str, value: Any, **options: Any) -> str:
    """``value`` as JSON, NumPy scalars as numbers; the ``TypeError`` for what JSON cannot hold says where in it that is."""

    def convert(part: Any) -> Any:
        number = as_python(part)
        if isinstance(part, np.generic) and isinstance(number, bool | int | float | str):
            return number
        hint = "; pass an array as array.tolist()" if isinstance(part, np.ndarray) else ""
        raise TypeError(
            f"{name}{_place(part, value) or ''} is a {type(part).__name__}; expected numbers, strings, True, False, None, lists "
            f"and dicts, which JSON can hold{hint}"
        )

    return json.dumps(value, default=convert, **options)


def _place(part: Any, whole: Any) -> str | None:
    """The keys that lead from the whole to a part."""
    if part is whole:
        return ""
    inner = whole.items() if isinstance(whole, dict) else enumerate(whole) if isinstance(whole, list | tuple) else ()
    found = ((key, _place(part, value)) for key, value in inner)
    return next((f"[{key!r}]{place}" for key, place in found if place is not None), None)


def _attempt_in_worker(
    run: Callable[..., Result], name: str, arguments: Mapping[str, Any]
) -> tuple[str, Result | None, tuple[str, str] | None]:
    os.environ.update(dict.fromkeys(THREADS, "1"))
    return _attempt(run, name, arguments, (Exception, SystemExit))  # an exit ends only this run


def _attempt_in_child(parent: int, *attempt: Any) -> tuple[str, Result | None, tuple[str, str] | None]:
    if os.getppid() == parent:  # else a backend has started the worker, which looks after it
        _end_with(parent)
    return _attempt_in_worker(*attempt)


@cache
def _end_with(parent: int) -> None:
    """End this process when its parent has ended, which may not have had the time to say so."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _check_name(name: object) -> None:
    """``ValueError`` unless NAME.json is a valid file name on every system."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise ValueError(
            f"tasks has the name {name!r}; expected letters, digits, '.', '_' and '-', not beginning with '.' or '-'"
        )
    if len(name) > 200:
        raise ValueError(f"tasks has the name {name[:20]}… of {len(name)} letters; expected 200 at most")
    if re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name):
        raise ValueError(
            f"tasks has the name {name!r}, which is the name of a device on Windows; expected another, such as _{name}"
        )


def _abbreviated(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


class _WorkerDied(Exception):  # noqa: N818 (it never leaves this module)
    pass


class _Store:
    """Results in files, each with a fingerprint of all it depends on.

    Not joblib.Memory, which pickles results under hashed names in the worker: here they are readable JSON files,
    named after their runs and written by this process, so that workers of a cluster need not share its disk.
    """

    def __init__(self, folder: Path, run: Any, settings: Mapping[str, Any]) -> None:
        prepare_folder(folder)
        self.folder, self.run, self.settings = folder.absolute(), run, settings  # wherever a run may go

    def find(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
        """What is kept under that name, with its ``result``, if it is whole and of the same arguments and settings."""
        fingerprint = self._fingerprint(arguments)
        with suppress(OSError, ValueError, KeyError, TypeError):
            kept: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
            if kept["fingerprint"] == fingerprint and "result" in kept:
                return kept
        return None

    def keep(self, name: str, arguments: Mapping[str, Any], result: Result) -> None:
        """Write a result; the file appears whole or not at all."""
        text = json.dumps({"fingerprint": self._fingerprint(arguments), "result": result})
        write_atomically(self.folder / f"{name}.json", text.encode())

    def _fingerprint(self, arguments: Mapping[str, Any]) -> str:
        try:
            all_of_it = {"run": self.run, "settings": self.settings, "arguments": arguments}
            described = "".join(_as_json(what, part, sort_keys=True) for what, part in all_of_it.items())
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"settings and the arguments of tasks must be data that JSON can hold, where results are kept in a folder: "
                f"{error}"
            ) from None
        return hashlib.sha256(described.encode()).hexdigest()
