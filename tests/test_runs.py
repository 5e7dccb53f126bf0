"""run_many: the same results in series and in workers, failures reported, finished runs kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import runs
from joblib import parallel_config

import implicit_rnn as irnn
from implicit_rnn import files
from implicit_rnn.errors import RunError
from implicit_rnn.runs import prepare_worker, run_many

TASKS = {f"x{x}": {"x": x} for x in range(6)}
TWO_TASKS = {name: TASKS[name] for name in ("x1", "x2")}


def values(results: dict) -> dict:
    return {name: result["y"] for name, result in results.items()}


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_come_by_name_in_the_order_of_the_tasks(jobs):
    results = run_many(runs.square, TASKS, jobs=jobs)
    assert list(results) == list(TASKS)
    assert values(results) == {f"x{x}": x * x for x in range(6)}


def test_one_job_runs_in_this_process():
    assert {result["process"] for result in run_many(runs.square, TASKS).values()} == {os.getpid()}


def test_more_jobs_run_in_other_processes():
    assert os.getpid() not in {result["process"] for result in run_many(runs.square, TASKS, jobs=2).values()}


def fits(engine: str) -> dict:
    return {f"seed-{seed}": {"seed": seed, "engine": engine} for seed in range(3)}


def test_training_gives_the_same_parameters_in_workers_as_in_series(engine):
    assert run_many(runs.fit, fits(engine), jobs=2) == run_many(runs.fit, fits(engine), jobs=1)


@pytest.mark.julia
def test_each_worker_has_a_julia_of_its_own_with_one_thread():
    irnn.get_engine("julia")  # workers must not be forks of a process in which Julia runs
    results = run_many(runs.threads, TWO_TASKS, jobs=2)
    assert [result["threads"] for result in results.values()] == [[1, 1], [1, 1]]


# --- failures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "jobs", "reason"),
    [
        (runs.fail_for_3, 1, "ValueError: 3 is no number"),
        (runs.fail_for_3, 2, "ValueError: 3 is no number"),
        (runs.exit_for_3, 2, "SystemExit: 2"),  # of a worker; here it would end this process
    ],
)
def test_run_that_fails_is_named_with_its_reason_after_all_others_are_done(run, jobs, reason, tmp_path):
    with pytest.raises(RunError, match=rf"1 of 6 runs failed: x3\. x3: {reason}") as caught:
        run_many(run, TASKS, jobs=jobs, folder=tmp_path)
    assert run.__name__ in caught.value.tracebacks["x3"]
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["x0", "x1", "x2", "x4", "x5"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_result_that_cannot_be_kept_costs_no_other_run_its_result(jobs, tmp_path, monkeypatch):
    def write(path, data):
        if path.name == "x3.json":
            raise OSError(28, "No space left on device", str(path))
        files.write_atomically(path, data)

    monkeypatch.setattr("implicit_rnn.runs.write_atomically", write)
    with pytest.raises(RunError, match=r"1 of 6 runs failed: x3\. x3: its result could not be kept: .*x3\.json"):
        run_many(runs.square, TASKS, jobs=jobs, folder=tmp_path)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["x0", "x1", "x2", "x4", "x5"]


def test_worker_that_dies_is_reported_with_what_is_left_to_do(tmp_path):
    with pytest.raises(RunError, match=r"a worker process died .* [1-6] of 6 runs to do, among them x\d"):
        run_many(runs.die_for_3, TASKS, jobs=2, folder=tmp_path)
    assert len(run_many(runs.square, TASKS, jobs=2)) == 6  # the next call works again


@pytest.mark.skipif(sys.platform == "win32", reason="there a process does not know that its parent has ended")
def test_workers_end_with_the_process_that_has_started_them(tmp_path):
    code = f"""
        import runs
        from implicit_rnn.runs import run_many
        run_many(runs.wait, {{str(x): {{"x": x, "log": {str(tmp_path / "log")!r}}} for x in range(6)}}, jobs=2)
        """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    caller = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=environment)
    until(lambda: (tmp_path / "log").exists() and len((tmp_path / "log").read_text().split()) == 2)
    caller.kill()
    caller.wait()
    workers = [int(process) for process in (tmp_path / "log").read_text().split()]
    until(lambda: not any(map(is_running, workers)))


def until(condition, seconds=50):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def is_running(process):
    try:
        os.kill(process, 0)
        of_linux = Path(f"/proc/{process}/stat")
        return (
            not of_linux.exists() or of_linux.read_text().rpartition(") ")[2][0] != "Z"
        )  # ended, and nobody has asked
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_run_that_cannot_be_sent_to_workers_is_refused_in_words():
    lock = threading.Lock()
    with pytest.raises(TypeError, match="cannot be pickled and sent to worker processes; jobs=1 does not need that"):
        run_many(lambda x: {"y": lock.locked() + x}, TASKS, jobs=2)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (irnn.Adam(), r"run\(\.\.\.\) is a Adam; expected numbers, strings"),
        ({"a": 1, "nets": [0, {"b": irnn.Adam()}]}, r"run\(\.\.\.\)\['nets'\]\[1\]\['b'\] is a Adam"),
        ({"a": np.zeros(2)}, r"run\(\.\.\.\)\['a'\] is a ndarray; .*; pass an array as array\.tolist\(\)"),
        ({"a": np.complex128(1)}, r"\['a'\] is a complex"),
    ],
    ids=["whole", "part", "array", "scalar"],
)
def test_result_that_json_cannot_hold_is_a_failure_of_its_run(result, message):
    with pytest.raises(RunError, match=f"TypeError: .*{message}"):
        run_many(lambda: result, {"x": {}})


@pytest.mark.parametrize(
    ("given", "expected"),
    [(np.arange(3).sum(), 3), (np.float32(0.5), 0.5), (np.longdouble(0.5), 0.5), (np.True_, True), (np.str_("a"), "a")],
)
def test_scalars_of_numpy_are_numbers_of_results_arguments_and_settings(given, expected, tmp_path):
    for x in (given, expected):
        results = run_many(lambda x: {"y": [x]}, {"x": {"x": x}}, folder=tmp_path, settings={"s": x})
        assert results == {"x": {"y": [expected]}}
        assert type(results["x"]["y"][0]) is type(expected)


@pytest.mark.parametrize(
    "name", ["", "../up", "a/b", "a\\b", ".hidden", "a b", "a\n", "é", "a" * 300, "CON", "nul.1", "Com1", 3]
)
def test_name_that_is_no_file_name_is_refused(name):
    with pytest.raises(ValueError, match="tasks has the name"):
        run_many(runs.square, {name: {"x": 1}})


@pytest.mark.parametrize("name", ["a" * 200, "x.", "a..b", "console", "com10", "nullus"])
def test_name_that_every_system_takes_is_that_of_a_file(name, tmp_path):
    run_many(runs.square, {name: {"x": 1}}, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.json"]


def test_folder_without_a_name_is_refused():
    with pytest.raises(ValueError, match="folder is ''; expected a file name"):
        run_many(runs.square, TASKS, folder="")


def test_folder_that_is_a_file_is_refused_in_words(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/runs"):
        with pytest.raises(OSError, match=f"no results can be written to .*{folder}: "):
            run_many(runs.square, TASKS, folder=tmp_path / folder)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"run": None}, "run is None; expected a function"),
        ({"report": "yes"}, "report is 'yes'; expected a function"),
        ({"tasks": [{"x": 1}]}, "tasks is a list; expected the arguments of each run by its name"),
        ({"tasks": {"a": 1}}, r"tasks\['a'\] is 1; expected the arguments of the run by name"),
        ({"folder": 3}, "folder is 3; expected a file name"),
        ({"settings": "yes"}, "settings is 'yes'; expected a dict of what results depend on"),
    ],
)
def test_what_is_no_run_or_task_is_refused_by_name(given, message):
    with pytest.raises(TypeError, match=message):
        run_many(**({"run": runs.square, "tasks": TASKS} | given))


def test_arguments_that_cannot_be_kept_are_refused_before_anything_runs(tmp_path):
    ran = []
    with pytest.raises(
        TypeError,
        match=r"must be data that JSON can hold, where results are kept in a folder: arguments\['x'\] is a ndarray",
    ):
        run_many(lambda x: ran.append(x), {"a": {"x": 1}, "b": {"x": np.zeros(2)}}, folder=tmp_path)
    assert not ran


@pytest.mark.parametrize("jobs", [0, -1])
def test_number_of_jobs_below_1_is_refused(jobs):
    with pytest.raises(ValueError, match="jobs must be a whole number from 1"):
        run_many(runs.square, TASKS, jobs=jobs)


# --- what is kept --------------------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    path.write_text("")
    return path


@pytest.fixture
def logged(log: Path) -> dict:
    return {f"x{x}": {"x": x, "log": str(log)} for x in range(3)}


@pytest.mark.parametrize("jobs", [1, 2])
def test_finished_runs_are_not_run_again(jobs, tmp_path, log, logged):
    first = run_many(runs.count_and_square, logged, folder=tmp_path / "kept")
    reported: list[tuple[str, bool]] = []
    report = {"report": lambda *done: reported.append(done)}
    second = run_many(runs.count_and_square, logged, folder=tmp_path / "kept", jobs=jobs, **report)
    assert second == first
    assert log.read_text() == "0\n1\n2\n"
    assert reported == [("x0", True), ("x1", True), ("x2", True)]


def test_missing_runs_are_run(tmp_path, log, logged):
    run_many(runs.count_and_square, {"x1": logged["x1"]}, folder=tmp_path / "kept")
    run_many(runs.count_and_square, logged, folder=tmp_path / "kept")
    assert log.read_text() == "1\n0\n2\n"


def test_changed_settings_are_not_mixed_with_kept_results(tmp_path, log, logged):
    run_many(runs.count_and_square, logged, folder=tmp_path / "kept", settings={"epochs": 1})
    run_many(runs.count_and_square, logged, folder=tmp_path / "kept", settings={"epochs": 2})
    assert len(log.read_text().split()) == 6


def test_changed_arguments_are_not_mixed_with_kept_results(tmp_path, log, logged):
    run_many(runs.count_and_square, logged, folder=tmp_path / "kept")
    changed = {"x0": {**logged["x0"], "x": 7}}
    assert values(run_many(runs.count_and_square, changed, folder=tmp_path / "kept")) == {"x0": 49}


def test_another_function_is_not_mixed_with_kept_results(tmp_path, log, logged):
    run_many(runs.count_and_square, logged, folder=tmp_path / "kept")
    assert values(run_many(runs.count_and_cube, logged, folder=tmp_path / "kept")) == {"x0": 0, "x1": 1, "x2": 8}


def test_another_array_in_a_function_is_not_mixed_with_kept_results(tmp_path):
    def default(*, of=None):
        return {"y": float(of.sum())}

    for a in (np.zeros(2001), np.eye(1, 2001, 1000)[0]):  # whose repr is the same
        default.__kwdefaults__["of"] = a
        for run in (partial(default, of=a), lambda: default(of=a), default):  # noqa: B023
            folder = tmp_path / type(run).__name__ / getattr(run, "__name__", "")
            assert run_many(run, {"x": {}}, folder=folder) == {"x": {"y": a.sum()}}


def holding(held):
    return lambda x: {"y": x + len(str(held() if callable(held) else held))}


def in_itself(k):
    held = [k]
    held.append(held)
    return held


def calling_itself(k):
    def run(x):
        return {"y": k if x else run(1)}

    return run


@pytest.mark.parametrize(
    ("run", "other"),
    [
        (lambda x: {"y": x}, lambda x: {"y": 10 * x}),
        (lambda x, z=2: {"y": x - z}, lambda z=2, x=2: {"y": x - z}),
        (lambda x: {"y": (lambda: x)()}, lambda x: {"y": (lambda: x + 1)()}),
        (holding([1]), holding([10])),
        (holding((1, [2])), holding((1, [20]))),
        (holding({"a": 1}), holding({"a": 10})),
        (holding({1: 1}), holding({"1": 1})),
        (holding({1}), holding({10})),
        (holding(np.array(["a", "b"])), holding(np.array(["a", "bc"]))),
        (holding(np.array([[1], None], object)), holding(np.array([[10], None], object))),
        (holding(None), holding("")),
        (holding(Path("a")), holding(Path("bc"))),
        (holding(lambda: 1), holding(lambda: 10)),
        (holding(partial(str, [1])), holding(partial(str, [10]))),
        (holding(in_itself(1)), holding(in_itself(10))),
        (calling_itself(1), calling_itself(2)),
        (partial(runs.apply, partial(min, 1)), partial(runs.apply, partial(max, 1))),
        (partial(runs.apply, partial(min, 1)), partial(runs.apply, partial(min, 2))),
    ],
)
def test_another_lambda_or_another_held_value_is_not_mixed_with_kept_results(run, other, tmp_path):
    tasks = {"x": {"x": 3}}
    for each in (run, other):
        assert run_many(each, tasks, folder=tmp_path) == run_many(each, tasks)
    assert kept(other, tasks, tmp_path) == [True]
    assert kept(run, tasks, tmp_path) == [False]


def kept(run, tasks, folder) -> list[bool]:
    found: list[bool] = []
    run_many(run, tasks, folder=folder, report=lambda _, kept: found.append(kept))
    return found


def test_a_lambda_is_known_again_in_another_process_and_elsewhere_in_its_file(tmp_path):
    code = """
    from implicit_rnn.runs import run_many
    def make(k, words):
        return lambda x: {"y": [k, x in {"a", "b", "c"}, words and sorted(words), str(other)]}
    def other(): pass
    found = []
    run_many(make(2, {"p", "q", "r"}), {"x": {"x": 3}}, folder=r"FOLDER", report=lambda *done: found.append(done))
    print(found)
    """
    found = []
    for seed, lines in (("1", 0), ("2", 5)):
        text = "\n" * lines + textwrap.dedent(code).replace("FOLDER", str(tmp_path))
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, check=True)
        found.append(done.stdout.strip())
    assert found == ["[('x', False)]", "[('x', True)]"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_a_run_does_to_its_arguments_is_nobody_elses(jobs, tmp_path):
    shared = [8]
    tasks = {name: {"layers": shared} for name in ("one", "two")}
    expected = {name: {"y": [8, 1]} for name in tasks}
    assert run_many(runs.append_to, tasks, jobs=jobs, folder=tmp_path) == expected
    assert shared == [8]
    again = {"one": {"layers": [8, 1]}}  # what the first run had made of its arguments
    assert run_many(runs.append_to, again, jobs=jobs, folder=tmp_path) == {"one": {"y": [8, 1, 1]}}


def test_results_are_kept_where_the_call_began_wherever_runs_go(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    run_many(runs.go_to, {"a": {"folder": str(tmp_path / "elsewhere")}}, folder="kept")
    assert (tmp_path / "kept" / "a.json").is_file()


def test_a_result_of_none_is_kept_like_any_other(tmp_path, log):
    for _ in range(2):
        assert run_many(runs.count_only, {"x1": {"x": 1, "log": str(log)}}, folder=tmp_path / "kept") == {"x1": None}
    assert log.read_text() == "1\n"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"fingerprint": "other", "result": {"y": 5}}', '{"result": {"y": 5}}']
)
def test_damaged_file_of_a_run_is_computed_again_and_replaced(tmp_path, content):
    path = tmp_path / "x1.json"
    path.write_text(content)
    assert values(run_many(runs.square, {"x1": {"x": 1}}, folder=tmp_path)) == {"x1": 1}
    assert json.loads(path.read_text())["result"]["y"] == 1


# --- a cluster -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dask_client():
    dask = pytest.importorskip("dask", reason="needs dask[distributed]")
    distributed = pytest.importorskip("distributed", reason="needs dask[distributed]")
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.upload_file(runs.__file__)
        yield client


@pytest.fixture
def on_dask(dask_client):
    with parallel_config(backend="dask"):
        yield dask_client


@pytest.fixture(scope="module")
def ray():
    """A local Ray of two processes, known to joblib as "ray"; it returns lists only, so that results come in bunches."""
    ray = pytest.importorskip("ray", reason="needs ray")
    from ray.util.joblib import register_ray

    paths = os.pathsep.join([str(Path(runs.__file__).parent), os.environ.get("PYTHONPATH", "")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            logging_level="error",
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": paths}},
        )
    register_ray()
    yield
    ray.shutdown()


@pytest.fixture
def on_ray(ray):
    with parallel_config(backend="ray"):
        yield


@pytest.mark.parametrize("cluster", ["on_dask", "on_ray"])
def test_cluster_gives_the_same_results_as_series(cluster, request, tmp_path):
    request.getfixturevalue(cluster)
    tasks = fits("numpy")
    assert run_many(runs.fit, tasks, jobs=2, folder=tmp_path) == run_many(runs.fit, tasks)
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(tasks)


@pytest.mark.parametrize("cluster", ["on_dask", "on_ray"])
def test_run_that_fails_on_a_cluster_is_named_after_all_others_are_done(cluster, request, tmp_path):
    request.getfixturevalue(cluster)
    with pytest.raises(RunError, match="x3: ValueError: 3 is no number"):
        run_many(runs.fail_for_3, TASKS, jobs=2, folder=tmp_path)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["x0", "x1", "x2", "x4", "x5"]


@pytest.mark.julia
def test_dask_workers_that_are_prepared_train_in_julia(on_dask):
    assert set(on_dask.run(prepare_worker, "julia").values()) == {"julia"}
    tasks = fits("julia")
    assert run_many(runs.fit, tasks, jobs=2) == run_many(runs.fit, tasks)


def test_worker_that_dies_on_a_dask_cluster_is_reported(on_dask, tmp_path):
    with pytest.raises(RunError, match="a worker process died"):
        run_many(runs.die_for_3, TASKS, jobs=2, folder=tmp_path)
    assert "x3" not in {path.stem for path in tmp_path.iterdir()}


def test_bunches_that_ended_on_ray_before_a_worker_died_are_kept(on_ray, tmp_path):
    with pytest.raises(RunError, match=r"a worker process died .* 4 of 6 runs to do, among them x2, x3, x4"):
        run_many(runs.die_for_3, TASKS, jobs=2, folder=tmp_path)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["x0", "x1"]
    assert len(run_many(runs.square, TASKS, jobs=2)) == 6


def test_ray_keeps_its_workers_from_bunch_to_bunch(on_ray):
    results = run_many(runs.square, TASKS, jobs=2)
    assert len({result["process"] for result in results.values()}) == 2


@pytest.mark.julia
def test_ray_workers_train_in_julia_with_one_thread_each(on_ray):
    tasks = fits("julia")
    assert run_many(runs.fit, tasks, jobs=2) == run_many(runs.fit, tasks)
    used = run_many(runs.threads, TWO_TASKS, jobs=2)
    assert [result["threads"] for result in used.values()] == [[1, 1], [1, 1]]
