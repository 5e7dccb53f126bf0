"""The pendulum experiment: its physics, its statistics, and its study at small size."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import RunPython

from implicit_rnn.cli import main
from implicit_rnn.experiments import pendulum
from implicit_rnn.experiments.pendulum import report, study
from implicit_rnn.experiments.pendulum.data import Data, Normalisation, Sizes
from implicit_rnn.experiments.pendulum.models import MODELS
from implicit_rnn.experiments.pendulum.simulation import (
    GRAVITY,
    NOISE,
    STEP,
    TIMES,
    Pendulums,
    cramer_rao_floor,
    cramer_rao_variances,
    trajectories,
)
from implicit_rnn.experiments.statistics import holm, paired_ratio, signed_rank_less

# --- simulation ----------------------------------------------------------------------------------------------

CORNERS = np.array([(le, g, a) for le in (0.5, 2.0) for g in (0.05, 1.0) for a in (0.2, 1.4)]).T


def test_small_swings_follow_the_damped_harmonic_oscillation():
    length, damping, release = 0.8, 0.3, 1e-4
    angles = trajectories(np.array([length]), np.array([damping]), np.array([release]))[0]
    omega = np.sqrt(GRAVITY / length - damping**2 / 4)
    envelope = release * np.exp(-damping * TIMES / 2)
    exact = envelope * (np.cos(omega * TIMES) + damping / (2 * omega) * np.sin(omega * TIMES))
    np.testing.assert_allclose(angles, exact, atol=1e-6 * release)


def test_undamped_period_of_a_large_swing_is_that_of_the_elliptic_integral():
    from scipy.interpolate import CubicSpline
    from scipy.special import ellipk

    length, release = 0.6, 1.4
    angles = trajectories(np.array([length]), np.zeros(1), np.array([release]))[0]
    period = 4 * np.sqrt(length / GRAVITY) * ellipk(np.sin(release / 2) ** 2)
    zeros = CubicSpline(TIMES, angles).roots(extrapolate=False)
    assert np.diff(zeros).mean() * 2 == pytest.approx(period, rel=1e-3)


def test_step_of_the_integration_is_fine_enough():
    coarse, fine = trajectories(*CORNERS), trajectories(*CORNERS, step=STEP / 8)
    assert np.abs(coarse - fine).max() < 1e-4 * NOISE


def test_integration_is_of_fourth_order():
    exact = trajectories(*CORNERS, step=STEP / 16)
    errors = [np.abs(trajectories(*CORNERS, step=step) - exact).max() for step in (4 * STEP / 2, 2 * STEP / 2)]
    assert 13 < errors[0] / errors[1] < 19


@pytest.mark.parametrize("step", [0.1, 0.2, 0.0])
def test_step_that_does_not_divide_the_sampling_interval_is_refused(step):
    with pytest.raises(ValueError, match="expected a whole fraction of the sampling interval"):
        trajectories(*CORNERS, step=step or 1e3)


# --- data ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data() -> Data:
    return Data.of_seed(3)


def test_data_sets_have_the_sizes_of_the_protocol(data):
    assert [len(part.measured) for part in (data.train, data.validation, data.test)] == [1000, 500, 2000]


def test_parameters_are_drawn_from_their_ranges(data):
    low, high = data.test.parameters.min(axis=0), data.test.parameters.max(axis=0)
    np.testing.assert_allclose([low, high], [(0.5, 0.05), (2.0, 1.0)], atol=0.01)
    assert 0.2 <= data.test.release.min() <= data.test.release.max() <= 1.4


def test_measurements_have_the_stated_noise(data):
    noise = data.test.measured - trajectories(*data.test.parameters.T, data.test.release)
    assert noise.std() == pytest.approx(NOISE, rel=0.01)
    assert abs(noise.mean()) < 4 * NOISE / np.sqrt(noise.size)


def test_held_out_data_are_the_same_for_every_seed_and_training_data_are_not(data):
    other = Data.of_seed(4)
    np.testing.assert_array_equal(other.test.measured, data.test.measured)
    np.testing.assert_array_equal(other.validation.measured, data.validation.measured)
    assert np.abs(other.train.measured - data.train.measured).max() > 0.1


def test_scaling_subtracts_a_mean_per_time_and_divides_by_one_number(data):
    scaling = Normalisation.of(data.train)
    scaled = scaling.inputs(data.train.measured)
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-12)
    assert scaled.std() == pytest.approx(1)
    np.testing.assert_allclose(scaled.std(axis=0) * scaling.input_scale, data.train.measured.std(axis=0))


def test_scaling_of_targets_can_be_undone(data):
    scaling = Normalisation.of(data.train)
    targets = scaling.targets(data.train.parameters)
    np.testing.assert_allclose([targets.mean(axis=0), targets.std(axis=0)], [(0, 0), (1, 1)], atol=1e-12)
    np.testing.assert_allclose(scaling.parameters(targets), data.train.parameters)


# --- the Cramér-Rao floor ------------------------------------------------------------------------------------


def test_cramer_rao_floor_of_the_test_set_has_its_known_value(data):
    floor = cramer_rao_floor(data.test)
    assert floor == pytest.approx((0.0255, 0.0947), abs=5e-5)
    assert np.sqrt(np.mean(floor**2)) == pytest.approx(0.0693, abs=5e-5)


def test_cramer_rao_floor_is_proportional_to_the_noise(data):
    np.testing.assert_allclose(cramer_rao_floor(data.test[:50], 0.01), 0.5 * cramer_rao_floor(data.test[:50]))


def test_least_squares_fits_reach_the_cramer_rao_bound():
    truth = np.array([1.0, 0.4, 1.0])
    clean = trajectories(*truth[:, None])
    noisy = clean + NOISE * np.random.default_rng(0).standard_normal((1000, len(TIMES)))
    found = np.repeat(truth[:, None], len(noisy), axis=1)
    for _ in range(4):  # Gauss and Newton's method
        slopes = np.stack([trajectories(*(found + 1e-30j * axis[:, None])).imag / 1e-30 for axis in np.eye(3)], axis=-1)
        residuals = noisy - trajectories(*found)
        found += np.linalg.solve(slopes.swapaxes(1, 2) @ slopes, slopes.swapaxes(1, 2) @ residuals[..., None])[..., 0].T
    (bound,) = cramer_rao_variances(Pendulums(truth[None, :2], truth[2:], clean))
    np.testing.assert_allclose(found[:2].var(axis=1), bound, rtol=0.15)


# --- statistics ----------------------------------------------------------------------------------------------


def test_ratio_of_a_constant_factor_has_no_spread():
    b = np.array([1.0, 2.0, 3.0])
    r = paired_ratio(0.8 * b, b)
    assert (r.mean, r.low, r.high) == pytest.approx((0.8, 0.8, 0.8))
    assert (r.below, r.pairs) == (3, 3)


def test_bootstrap_interval_of_a_ratio_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        r = paired_ratio(np.exp(0.1 * rng.standard_normal(30)) * 0.9, np.ones(30))
        covered += r.low <= 0.9 <= r.high
    assert 0.90 <= covered / 300 <= 0.98


def test_signed_rank_test_has_its_smallest_value_if_all_pairs_agree():
    assert signed_rank_less([0.9] * 4 + [0.8], [1.0] * 5) == pytest.approx(2**-5)


def test_signed_rank_test_sees_the_direction():
    b = np.linspace(1, 2, 12)
    a = b * np.linspace(0.7, 0.95, 12)
    assert signed_rank_less(a, b) < 0.001
    assert signed_rank_less(b, a) > 0.999


def test_signed_rank_test_of_equal_values_finds_nothing():
    assert signed_rank_less([1.0, 2.0], [1.0, 2.0]) == 1.0


def test_holm_adjusts_as_in_a_worked_example():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_holm_never_exceeds_1():
    assert holm([0.6, 0.9]) == [1.0, 1.0]


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0, 2.0]), ([], []), ([1.0], [0.0]), ([-1.0], [1.0])])
def test_ratios_of_no_pairs_of_positive_numbers_are_refused(a, b):
    with pytest.raises(ValueError, match="expected pairs of positive numbers"):
        paired_ratio(a, b)


# --- models --------------------------------------------------------------------------------------------------


def test_models_have_about_the_same_number_of_parameters():
    counts = {name: model.network().topology.parameters for name, model in MODELS.items()}
    assert 1400 <= min(counts.values()) <= max(counts.values()) <= 1500, counts


def test_initial_weights_have_the_spread_of_the_protocol():
    nets = [MODELS["feedback"].network(seed) for seed in range(40)]
    spread = {name: np.std([net.weights[name] for net in nets]) for name in nets[0].weights}
    expected = {
        "W[0]": 1 / np.sqrt(32),
        "R[0,0]": 0.3 / np.sqrt(24),
        "R[0,1]": 0.3 / np.sqrt(2),
        "R[1,0]": 1 / np.sqrt(24),
        "R[1,1]": 0.3 / np.sqrt(2),
    }
    for name, value in expected.items():
        assert spread[name] == pytest.approx(value, rel=0.15), name


def test_initial_weights_are_not_the_numbers_the_data_were_drawn_from():
    first = MODELS["ff2"].network(5).weights["W[0]"].ravel(order="F")[:32] * np.sqrt(32)
    assert not np.isclose(first[0], np.random.default_rng(5).standard_normal())


# --- the study, at small size --------------------------------------------------------------------------------

SMALL = study.Protocol(Sizes(train=60, validation=40, test=50), epochs=4, batch_size=20, validation_every=2)
NAMES = tuple(MODELS)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> study.Study:
    return study.run(NAMES, range(3), SMALL, engine="numpy", folder=tmp_path_factory.mktemp("runs"))


def test_engines_train_to_the_same_errors(engine, small):
    _, outcome = study.train(MODELS["lateral-perron"], 1, MODELS["lateral-perron"].learning_rate, SMALL, engine)
    assert outcome.nrmse == pytest.approx(small.outcomes["lateral-perron"][1].nrmse, rel=1e-6)


def test_runs_in_workers_have_the_same_results(small):
    parallel = study.run(("ff2", "feedback"), range(3), SMALL, engine="numpy", jobs=2)
    for name in parallel.outcomes:
        for a, b in zip(parallel.outcomes[name], small.outcomes[name], strict=True):
            if np.__version__ < "2":  # whose BLAS sums otherwise with one thread, as there, than with more
                for name in ("nrmse", "parameters", "curve"):
                    assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-9)
                    a = replace(a, **{name: getattr(b, name)})
            assert replace(a, seconds=0) == replace(b, seconds=0)


def test_interrupted_study_goes_on_where_it_stopped(tmp_path):
    study.run(("ff2",), range(2), SMALL, engine="numpy", folder=tmp_path)
    again = study.run(("ff2", "lateral"), range(2), SMALL, engine="numpy", folder=tmp_path)
    assert again.kept == 2  # but not by another protocol
    assert study.run(("ff2",), range(2), replace(SMALL, epochs=2), engine="numpy", folder=tmp_path).kept == 0


def test_parameters_kept_are_those_of_the_best_epoch_on_the_validation_set(small):
    reader = small.reader("lateral", 0)
    held_out = Data.of_seed(0, SMALL.sizes).validation
    errors = (reader.predict(held_out.measured) - held_out.parameters) / reader.scaling.target_scale
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(small.outcomes["lateral"][0].validation, rel=1e-6)


def test_measure_is_that_of_the_test_set(small):
    predicted = small.reader("ff2", 2).predict(small.test_set().measured)
    errors = predicted - small.test_set().parameters
    nrmse = np.sqrt((errors**2).mean(axis=0)) / small.test_set().parameters.std(axis=0)
    assert small.outcomes["ff2"][2].nrmse == pytest.approx(nrmse, rel=1e-8)
    assert small.totals("ff2")[2] == pytest.approx(np.sqrt((nrmse**2).mean()))


def test_unknown_model_is_refused_with_the_names():
    with pytest.raises(ValueError, match="models among ff2, ff3, lateral"):
        study.run(("ff7",), range(2), SMALL, engine="numpy")


def test_tuning_takes_the_rate_with_the_lowest_validation_error(tmp_path):
    tuning = study.tune(("ff2",), (1e-6, 1e-2), (100, 101), SMALL, engine="numpy", folder=tmp_path)
    assert tuning.best("ff2") == 1e-2
    assert tuning.errors["ff2"][1e-2] < tuning.errors["ff2"][1e-6]
    assert report.tuning_as_dict(tuning)["models"]["ff2"]["best"] == 1e-2
    assert "*" in report.tuning_table(tuning).splitlines()[1]


def test_tuning_seeds_are_none_of_the_study():
    assert not set(study.TUNING_SEEDS) & set(range(100))


# --- the report ----------------------------------------------------------------------------------------------


def with_errors(small: study.Study, **errors: list[float]) -> study.Study:
    """The study with other errors, the same for length and damping."""
    template = small.outcomes["ff2"][0]
    outcomes = {
        name.replace("_", "-"): [replace(template, nrmse=(value, value)) for value in values]
        for name, values in errors.items()
    }
    return replace(small, outcomes=outcomes, seeds=tuple(range(len(errors["ff2"]))))


BASE = list(np.linspace(0.11, 0.13, 20))


def verdicts(made: study.Study) -> dict[str, bool]:
    return {finding.claim: finding.holds for finding in report.findings(made)}


def test_claims_hold_where_the_numbers_say_so(small):
    better = [0.8 * value for value in BASE]
    found = verdicts(with_errors(small, ff2=BASE, lateral=better, lateral_perron=[1.01 * v for v in better]))
    assert found["lateral has a smaller error than feed-forward, 42, by more than 5% (preregistered)"]
    assert found["lateral is at least 15% better than feed-forward, 42, surely 10%"]
    assert found["lateral, Perron costs at most 3% against lateral and always converges"]


def test_claims_do_not_hold_where_the_numbers_say_the_opposite(small):
    worse = [1.2 * value for value in BASE]
    found = verdicts(with_errors(small, ff2=BASE, lateral=worse, lateral_perron=[1.1 * v for v in worse]))
    assert not any(holds for claim, holds in found.items() if "without a guarantee" not in claim)


def test_guarantee_is_not_confirmed_if_a_sample_did_not_converge(small):
    made = with_errors(small, ff2=BASE, lateral=BASE, lateral_perron=BASE)
    made.outcomes["lateral-perron"][0] = replace(made.outcomes["lateral-perron"][0], unconverged=1)
    found = verdicts(made)
    assert not found["lateral, Perron costs at most 3% against lateral and always converges"]


def test_few_seeds_prove_nothing(small):
    better = [0.5 * value for value in BASE[:3]]
    found = verdicts(with_errors(small, ff2=BASE[:3], lateral=better))
    assert not found["lateral has a smaller error than feed-forward, 42, by more than 5% (preregistered)"]


def test_table_has_a_line_per_model_the_floor_and_the_findings(small):
    text = report.table(small)
    for name in NAMES:
        assert MODELS[name].title in text
    assert "Cramér-Rao floor" in text
    assert text.count("(preregistered)") == 3


def test_result_as_json_holds_what_is_needed_to_repeat_it(small):
    result = json.loads(json.dumps(report.as_dict(small)))
    assert result["protocol"]["seeds"] == [0, 1, 2]
    assert set(result["models"]) == set(NAMES)
    assert {"learning_rate", "parameters", "constraint", "runs"} <= set(result["models"]["lateral"])
    assert {"implicit-rnn", "numpy", "python"} <= set(result["versions"])


def test_files_of_a_study_are_written(small, tmp_path):
    from matplotlib.image import imread

    files = pendulum.save(small, tmp_path / "new")
    assert sorted(path.name for path in files) == [
        "learning_curves.png",
        "model.safetensors",
        "pendulum.json",
        "predictions.png",
        "ratios.png",
        "trajectories.png",
    ]
    for path in files:
        if path.suffix == ".png":
            assert min(imread(path).shape[:2]) > 400


def test_model_saved_has_a_guarantee_and_reads_as_before(small, tmp_path):
    pendulum.save(small, tmp_path)
    name, index = pendulum.best_net(small)
    assert MODELS[name].guaranteed
    angles = small.test_set().measured[:7]
    loaded = pendulum.Reader.load(tmp_path / pendulum.MODEL_FILE, "numpy")
    np.testing.assert_array_equal(loaded.predict(angles), small.reader(name, index).predict(angles))


# --- the command ---------------------------------------------------------------------------------------------


def test_command_with_an_unknown_model_name_lists_the_names(capsys, tmp_path):
    assert main(["pendulum", "--models", "ff7", "--engine", "numpy", "--out", str(tmp_path)]) == 1
    assert "feedback-perron" in capsys.readouterr().err


@pytest.mark.timeout(400)
def test_quick_run_trains_every_model_and_reports(run_cli: RunPython, engine, tmp_path):
    done = run_cli("pendulum", "--quick", "--engine", engine, "--out", "results", timeout=300)
    assert done.returncode == 0, str(done)
    assert "Cramér-Rao floor" in done.stdout
    assert "DOES NOT HOLD" in done.stdout
    assert len(list((tmp_path / "results" / "runs").iterdir())) == 3 * len(MODELS)
    assert json.loads((tmp_path / "results" / "pendulum.json").read_text())["engine"] == engine


def test_repeated_command_goes_on_from_what_is_kept(tmp_path, capsys):
    arguments = ["pendulum", "--quick", "--models", "ff2", "--engine", "numpy", "--out", str(tmp_path)]
    assert main(arguments) == 0
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["runs_kept_from_an_earlier_call"] == 3
    assert "3 of 3 runs kept from an earlier call" in err
