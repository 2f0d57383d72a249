"""Searches with physo, their book-keeping, and the ranking by the stars; tiny budgets, fixed seeds."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
from concurrent.futures import Executor
from dataclasses import replace

import numpy as np
import pytest
import torch
from contracts.targets import Here, made_target

import bayespot
from bayespot.df import SphericalMixture
from bayespot.distill import FAMILIES, DistillConfig, DistillError, Family, distill
from bayespot.distill.distill import plan
from bayespot.distill.formulas import distinct
from bayespot.distill.physo_search import STUCK, _Finished, _physo, _quiet, _Run, _seeded, search
from bayespot.distill.ranking import fit_formula, rank, reference, stars_of, with_potential
from bayespot.distill.rewriting import Candidate, canonical, homogeneous
from bayespot.distill.search import Search, Task, run_searches
from bayespot.distill.target import Target
from bayespot.inference import FitConfig, fit
from bayespot.inference.latent import LatentSpace
from bayespot.likelihood import SnapshotModel
from bayespot.posterior import EnsemblePosterior, Posterior
from bayespot.potential import Hernquist, Isochrone, MassSlopeNetwork
from bayespot.potential.symbolic import parse
from bayespot.progress import Progress

pytest.importorskip("physo")

TINY = DistillConfig(budget_epochs=2, searches=1, families=("kepler",), batch_size=60, max_ranked=2, seed=4)


@pytest.fixture(scope="module")
def posterior(isochrone_stars):
    """A free-form posterior from 2 000 stars (Laplace approximation, one component)."""
    model = SnapshotModel(MassSlopeNetwork.for_stars(isochrone_stars.w, n_features=5), SphericalMixture())
    config = FitConfig(seed=1, n_components=1, guide="laplace", n_draws=200, k_hat_draws=1)
    found = Posterior.from_result(fit(model, isochrone_stars, config))
    found.meta["w"] = isochrone_stars.w.numpy()
    return found


def texts(found: Search) -> list[str]:
    return [one.text for one in found.found]


def test_a_search_is_deterministic_and_leaves_no_trace(tmp_path, monkeypatch):
    """The same seed and epochs give the same formulas and constants; another seed others. Nothing is written, and the
    global generators and the start method of processes are as before."""
    monkeypatch.chdir(tmp_path)
    target = made_target(Isochrone(1e11, 3.0))
    before = (torch.random.get_rng_state(), np.random.get_state()[1].copy())  # noqa: NPY002
    method = multiprocessing.get_start_method(allow_none=True)
    first, second = (search(target, FAMILIES["kepler"], TINY, 4) for _ in range(2))
    assert first.found == second.found
    assert first.epochs == 2
    assert texts(first) != texts(search(target, FAMILIES["kepler"], TINY, 5))
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert multiprocessing.get_start_method(allow_none=True) == method
    assert os.listdir(tmp_path) == []


def test_found_constants_are_fitted():
    """The misfit that a search reports is that of its formula with its constants, in posterior sd."""
    target = made_target(Isochrone(1e11, 3.0))
    metric = target.metric("absolute")
    for one in search(target, FAMILIES["kepler"], TINY, 4).found[:5]:
        values = dict(one.constants) | {"r": target.nodes, "sqrt": np.sqrt}
        y = eval(one.text.replace("(0.5)", "0.5"), {"__builtins__": {}}, values) + 0 * target.nodes
        misfit = ((metric.rows @ y - metric.mean) ** 2).mean()
        assert one.misfit == pytest.approx(misfit, rel=1e-6)


def reward_of(y, config: DistillConfig, family: Family = FAMILIES["algebraic"]) -> float:
    run = _Run(_physo(), made_target(Isochrone(1e11, 3.0)), family, config, None)
    return run.reward(torch.ones(1), torch.as_tensor(y))


def test_physics_in_the_reward():
    """Each condition, on its own, halves or lowers the reward of a formula that violates it and no other's."""
    x = made_target(Isochrone(1e11, 3.0)).nodes
    cases = {
        "density": 2 / np.sqrt(1 + (x - 1) ** 2),
        "centre": 1 / x,
        "asymptote": 3 - np.log(1 + x**2),
    }
    off = {"density": False, "centre": False, "asymptote": False}
    good = 2 / (0.3 + np.sqrt(0.1 + x**2))
    for name, y in cases.items():
        plain = reward_of(y, replace(TINY, **off))
        punished = reward_of(y, replace(TINY, **(off | {name: True})))
        assert punished < 0.75 * plain, name
        assert reward_of(good, replace(TINY, **(off | {name: True}))) == reward_of(good, replace(TINY, **off))
    assert reward_of(3 - np.log(1 + x**2), TINY, FAMILIES["flat"]) > 0
    assert reward_of(np.full_like(x, np.nan), TINY) == 0


@pytest.fixture(scope="module")
def switched_on():
    """A target, settings with every condition on, and the search they give."""
    target, config = made_target(Isochrone(1e11, 3.0)), replace(TINY, budget_epochs=3, batch_size=150)
    return target, config, search(target, FAMILIES["kepler"], config, 2)


@pytest.mark.parametrize("name", ["units", "density", "asymptote", "centre", "complexity"])
def test_each_switch_changes_a_search(switched_on, name):
    """Off, a condition leaves another search with the same seed; without units dimensions disagree."""
    target, config, run = switched_on
    other = search(target, FAMILIES["kepler"], replace(config, **{name: False}), 2)
    assert [(f.text, f.constants) for f in run.found] != [(f.text, f.constants) for f in other.found]
    if name == "units":

        def agree(found: Search) -> float:
            return float(np.mean([homogeneous(str(parse(f.text)), tuple(sorted(f.constants))) for f in found.found]))

        assert agree(run) > 0.95
        assert agree(other) < 0.7


def test_short_formulas_are_likelier():
    """The prior on length cuts off fewer of the first 1000 formulas at the greatest length: 5 sd of their number."""
    target = made_target(Isochrone(1e11, 3.0))
    longest = []
    for complexity in (True, False):
        run = FirstBatch(
            _physo(), target, FAMILIES["kepler"], replace(TINY, batch_size=1000, complexity=complexity), None
        )
        with _seeded(2), _quiet(), contextlib.suppress(_Finished):
            run.start()
        longest.append(int((run.lengths == TINY.max_length).sum()))
    assert longest[0] < longest[1] - 5 * (longest[1] * (1 - longest[1] / 1000)) ** 0.5


class FirstBatch(_Run):
    """A search that ends with its first epoch and keeps the lengths of all its formulas."""

    lengths: np.ndarray

    def log(self, epoch, batch, model, rewards, **kwargs):
        self.lengths = batch.programs.n_lengths.copy()
        raise _Finished


def test_class_mode():
    """Constants of every draw are fitted at once: the misfit of GM/(b + r) to Hernquist draws is small in each."""
    target = made_target(Hernquist(5e10, 4.0))
    config = replace(TINY, mode="class", class_draws=4, budget_epochs=3)
    found = search(target, FAMILIES["kepler"], config, 4)
    wanted = (parse("GM/(b+r)"), parse("GM/(c+r)"))
    best = [one for one in found.found if parse(canonical(one.text, one.constants)[0]) in wanted]
    assert best, texts(found)[:10]
    # whitened draws scatter by one about their own best fit in the directions that two constants leave
    assert best[0].misfit < 3


def test_failures_are_reported_and_the_others_go_on(tmp_path):
    """One search raises: the rest is returned with one message; all fail: an error with the first message."""

    def call(seed: int) -> Search:
        if seed != 1:
            raise RuntimeError(f"seed {seed} is broken")
        return Search("kepler", seed, 1, 0.0)

    tasks = [Task(FAMILIES["kepler"], seed) for seed in (0, 1)]
    with Progress(False) as bar:
        done, failures = run_searches(tasks, call, lambda task: (task.seed,), Here(), tmp_path, bar)
        assert [one.seed for one in done] == [1]
        assert len(failures) == 1
        assert "kepler:0: RuntimeError: seed 0 is broken" in failures[0]
        assert [p.name for p in tmp_path.iterdir()] == ["kepler-1.json"]
        with pytest.raises(DistillError, match=r"every search failed.*seed 0"):
            run_searches(tasks[:1], call, lambda task: (task.seed,), Here(), None, bar)


def test_plan():
    """The budget in minutes is shared by the searches and processes; in epochs there is no limit of time."""
    tasks, seconds = plan(DistillConfig(budget_minutes=5, families=("kepler", "flat")), 2)
    assert len(tasks) == 24
    assert seconds == pytest.approx(5 * 60 * 2 / 24)
    assert {task.family.name for task in tasks[:2]} == {"kepler", "flat"}
    tasks, seconds = plan(TINY, 2)
    assert (len(tasks), seconds) == (1, None)


@pytest.fixture(scope="module")
def distilled(posterior, tmp_path_factory):
    """A distillation in a folder, ranked by 300 of the stars, with the executor that ran it."""
    folder = tmp_path_factory.mktemp("run") / "distillation"
    executor = Here()
    config = replace(TINY, searches=2, batch_size=120, max_ranked=1, max_stars=300)
    found = distill(posterior, config, executor, folder, progress=False)
    return found, folder, config, executor


def test_end_to_end(distilled, posterior):
    """Formulas with weights, constants with errors, a row of the free form, and all files inside the folder."""
    found, folder, _, executor = distilled
    assert executor.n_calls == 2
    assert not found.failures
    assert sorted(p.name for p in folder.iterdir()) == [
        "candidates.json", "formulas.pdf", "formulas.png", "formulas.tex", "searches", "settings.json", "table.ecsv",
    ]  # fmt: skip
    table = found.table()
    assert table["formula"][-1] == "free form"
    assert np.sum(table["weight"][:-1]) == pytest.approx(1)
    assert (np.diff(found.weights) <= 1e-12).all()
    assert found.ranking.n_stars == 300
    record = json.loads((folder / "candidates.json").read_text())
    assert record["verdict"] == found.verdict()
    first = record["formulas"][0]
    space: dict = {}
    exec(first["python"], space)
    r = np.array([1.0, 5.0, 20.0])
    phi = found.best.potential().phi_r(torch.as_tensor(r)).numpy()
    np.testing.assert_allclose(space["phi"](r), phi, rtol=1e-12)
    v_c = found.best.potential().circular_speed(torch.tensor(5.0).double()).item()
    assert v_c == pytest.approx(float(posterior.field("circular_speed", [5.0]).mean[0]), rel=0.1)


def test_resume(distilled, posterior):
    """Finished searches are not repeated; other settings, or none to resume, are refused; the result is the same."""
    found, folder, config, _ = distilled
    again = Here()
    (folder / "searches" / "kepler-4001.json").unlink()
    second = distill(posterior, config, again, folder, resume=True, progress=False)
    assert again.n_calls == 1
    assert [f.text for f in second.formulas] == [f.text for f in found.formulas]
    np.testing.assert_allclose(second.weights, found.weights, atol=1e-9)
    with pytest.raises(ValueError, match="exists"):
        distill(posterior, config, again, folder, progress=False)
    with pytest.raises(ValueError, match="other settings"):
        distill(posterior, replace(config, seed=9), again, folder, resume=True, progress=False)
    with pytest.raises(ValueError, match="nothing to resume"):
        distill(posterior, config, again, folder.with_name("none"), resume=True, progress=False)


def test_ranking_by_the_stars(posterior, isochrone_stars):
    """The isochrone's evidence is far above Hernquist's and Plummer's; constants from the stars agree with the refits.

    Means to 1.5 sd, sd within a factor 1.6 (2 000 stars, posteriors of two different priors).
    """
    target = Target.of(posterior, 25)
    forms = [
        ("GM/(b+sqrt(b**2+r**2))", {"GM": 1.7, "b": 0.4}),
        ("GM/(b+r)", {"GM": 1.7, "b": 0.4}),
    ]
    formulas = distinct([Candidate(t, c, "absolute", "test:0") for t, c in forms], target, 5)
    ranking = rank(formulas, posterior, target, isochrone_stars)
    assert not ranking.failures
    isochrone = next(i for i, f in enumerate(formulas) if "sqrt" in f.text)
    assert ranking.weights[isochrone] > 0.9
    fitted = ranking.fits[isochrone]
    for j, name in enumerate(formulas[isochrone].constants):
        refit = np.log(formulas[isochrone].draws[:, j])
        stars = np.log(fitted.constants[name])
        assert abs(refit.mean() - stars.mean()) < 1.5 * stars.std(), name
        assert 1 / 1.6 < refit.std() / stars.std() < 1.6, name
    # the true form with two constants predicts the stars as well as the free form
    loo = ranking.loo[isochrone]
    assert loo["elpd"] > ranking.loo["free form"]["elpd"] - 4
    assert fit_formula(formulas[isochrone], posterior, target, isochrone_stars).ln_likelihood == pytest.approx(
        fitted.ln_likelihood, abs=1e-6
    )


def test_evidence_from_the_stars(posterior, isochrone_stars):
    """The Laplace evidence of a formula with one constant is the integral over it, f(J) fixed, to 0.3 (sd 0.1)."""
    stars, target = isochrone_stars[:500], Target.of(posterior, 25)
    # b is a number in units of the target's radius: only M is free
    (formula,) = distinct([Candidate("GM/(2/5+sqrt(4/25+r**2))", {"GM": 1.7}, "absolute", "t:0")], target, 1)
    fitted = fit_formula(formula, posterior, target, stars)
    model = with_potential(posterior.model, formula, target)
    n_components = posterior.model.df.n_components
    config = FitConfig(seed=0, guide="laplace", n_components=n_components, n_draws=20, svi_steps=0, k_hat_draws=0)
    result = fit(model, stars, config, progress=False)
    space, data = LatentSpace(result.model), result.model.prepare(stars)
    u = space.vector(result.map)
    assert space.n_potential == 1
    grid = torch.linspace(-0.5, 0.5, 81, dtype=torch.float64)
    heights = torch.stack([space.log_posterior(torch.cat([u[:1] + step, u[1:]]), data) for step in grid])
    integral = float(heights.logsumexp(0) + (grid[1] - grid[0]).log())
    assert fitted.ln_evidence == pytest.approx(integral, abs=0.3)


def test_a_search_starts_afresh_when_stuck(monkeypatch):
    """STUCK epochs without a better formula, none within the posterior: physo starts again until the budget ends."""
    target, starts = made_target(Isochrone(1e11, 3.0)), []

    def start(run):
        starts.append(run.epochs)
        while True:
            run.epochs += 1
            run.least = run.here = 5.0
            run.improved = run.improved or run.epochs
            run.visualise(None, None)

    monkeypatch.setattr(_Run, "start", start)
    found = search(target, FAMILIES["kepler"], replace(TINY, budget_epochs=3 * STUCK + 2), 1)
    assert found.epochs == 3 * STUCK + 2
    assert starts[:3] == [0, STUCK + 1, 2 * STUCK + 1]


def test_stars_of(posterior, isochrone_stars):
    """The run's own stars serve; a catalogue of another size is refused; many are thinned; none: no ranking."""
    assert len(stars_of(posterior, None, 5000, 0)) == 2000
    assert len(stars_of(posterior, isochrone_stars, 300, 0)) == 300
    with pytest.raises(ValueError, match="the fit had 2000"):
        stars_of(posterior, isochrone_stars[:100], 5000, 0)
    bare = Posterior(posterior.model, posterior.draws, {"radii": posterior.meta["radii"]})
    assert stars_of(bare, None, 5000, 0) is None


def test_an_ensemble_is_pooled(posterior, isochrone_stars):
    """Draws of two members that differ by 5 % in mass: the pooled sd of M covers both, M lies between them, and the
    member of the larger weight is what formulas are ranked beside."""
    heavy = {**posterior.draws, "potential.ln_mass": posterior.draws["potential.ln_mass"] + 0.05}
    members = [posterior, Posterior(posterior.model, heavy, posterior.meta)]
    pooled = EnsemblePosterior(members, [0.4, 0.6])
    candidate = Candidate(*canonical("GM/(b+sqrt(b**2+r**2))", {"GM": 2.0, "b": 0.5}), "absolute", "test")
    mass = []
    for one in (*members, pooled):
        target = Target.of(one)
        (formula,) = distinct([candidate], target, 1)
        mass.append(formula.summary()["M"])
    assert mass[0]["mean"] < mass[2]["mean"] < mass[1]["mean"]
    assert mass[2]["sd"] > 0.4 * (mass[1]["mean"] - mass[0]["mean"])
    assert reference(pooled) is members[1]
    assert len(stars_of(pooled, isochrone_stars, 300, 0)) == 300


def test_a_worker_that_dies(posterior, monkeypatch):
    """An executor whose first call fails like a broken pool: the other search is used, the message names the first."""

    class Breaking(Here):
        def submit(self, fn, /, *args, **kwargs):
            future = super().submit(fn, *args, **kwargs)
            if self.n_calls == 1:
                future = type(future)()
                future.set_exception(RuntimeError("a process in the pool was terminated abruptly"))
            return future

    bare = Posterior(posterior.model, posterior.draws, {"radii": posterior.meta["radii"]})
    executor: Executor = Breaking()
    found = distill(bare, replace(TINY, searches=2), executor, progress=False)
    assert len(found.failures) == 1
    assert "terminated abruptly" in found.failures[0]
    assert found.ranking is None
    assert found.weights.sum() == pytest.approx(1)


def test_one_file_imports_physo():
    """No other file of the package names it in an import."""
    from pathlib import Path

    for path in Path(bayespot.__file__).parent.rglob("*.py"):
        if path.name != "physo_search.py":
            text = path.read_text()
            assert "import physo" not in text, path
            assert "from physo" not in text, path


@pytest.mark.slow
def test_search_finds_the_isochrone():
    """Three searches of 25 epochs in the Kepler family: the isochrone leads the distinct formulas (0.3 % errors)."""
    target = made_target(Isochrone(1e11, 3.0), sd=0.003)
    config = DistillConfig(budget_epochs=25, families=("kepler",))
    found = [search(target, FAMILIES["kepler"], config, seed) for seed in (1, 2, 3)]
    pooled = [Candidate(f.text, f.constants, "absolute", s.name) for s in found for f in s.found]
    best = distinct(pooled, target, 20)[0]
    assert parse(best.text) == parse("-G*M/(b + sqrt(b**2 + r**2))")


@pytest.mark.slow
def test_class_search_finds_the_isochrone():
    """Class SR on eight draws, three seeds of 20 epochs: a form whose chi-square is within the posterior."""
    target = made_target(Isochrone(1e11, 3.0), sd=0.003)
    config = DistillConfig(mode="class", class_draws=8, budget_epochs=20, families=("kepler",))
    found = [search(target, FAMILIES["kepler"], config, seed) for seed in (1, 2, 3)]
    pooled = [Candidate(f.text, f.constants, "absolute", s.name) for s in found for f in s.found]
    assert distinct(pooled, target, 20)[0].p_value > 1e-3
