"""Foreign stars do not decide the potential, and a clean catalogue does not notice the outlier component.

Parametric isochrone (M = 1e11 Msun, b = 3 kpc), N = 500, closed-form actions, Laplace approximation, unless stated.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from bayespot.models import isochrone, spherical

from bayespot import Catalog, FitConfig, Isochrone, Posterior, fit
from bayespot.actions import IsochroneActions
from bayespot.inference import FitResult
from bayespot.inference.membership import named, outlier_probability, unremarkable
from bayespot.inference.verdict import verdict
from bayespot.mock import Equilibrium, mock
from bayespot.posterior.posterior import EnsemblePosterior
from bayespot.report.runs import load_run, save_run
from bayespot.report.text import describe

TRUTH = np.log([1e11, 3.0])
ROW = 17


def stars(n: int = 500, seed: int = 11, kind: str = "clean") -> Catalog:
    w = Equilibrium(Isochrone(1e11, 3.0)).sample(n, seed)
    if kind == "sentinel":
        w[ROW, 5] = -999.0
    if kind == "fast":
        w[ROW, 3:] *= 600 / w[ROW, 3:].norm()
    if kind == "contaminated":
        # 2 % at 1.05 to 3 times the escape speed
        rows, factor = torch.arange(10), torch.linspace(1.05, 3, 10, dtype=torch.float64)
        escape = (-2 * Isochrone(1e11, 3.0).phi(w[rows, :3])).sqrt()
        w[rows, 3:] *= (factor * escape / w[rows, 3:].norm(dim=-1))[:, None]
    return Catalog(w)


def fitted(catalog: Catalog, **options) -> FitResult:
    model = isochrone.build(catalog)
    model.finder = IsochroneActions()
    config = {"seed": 1, "n_components": 1, "guide": "laplace", "k_hat_draws": 0, "n_draws": 2000, "outliers": True}
    return fit(model, catalog, FitConfig(**(config | options)), progress=False)


def moments(result: FitResult) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sd of (ln M, ln b)."""
    u = torch.stack([result.draws["potential.m_tot"], result.draws["potential.r_s"]], -1).log().numpy()
    return u.mean(0), u.std(0)


@pytest.mark.parametrize("kind", ["sentinel", "fast"])
def test_one_foreign_star(kind):
    """Within 2 sd of the truth and 0.1 sd of the fit without that star, which is named."""
    catalog = stars(kind=kind)
    result = fitted(catalog)
    mean, sd = moments(result)
    others, _ = moments(fitted(catalog[[i for i in range(len(catalog)) if i != ROW]]))
    assert (abs(mean - TRUTH) < 2 * sd).all()
    assert (abs(mean - others) < 0.1 * sd).all()
    assert result.outliers is not None
    assert float(result.outliers[ROW]) > 0.95
    found = result.diagnostics
    assert [one["row"] for one in found.outliers] == [ROW]
    assert (found.n_outliers, found.n_unbound) == (1, 0)
    assert f"row {ROW} p = 1.000" in "\n".join(describe(dataclasses.asdict(found)))


def test_without_the_component_one_foreign_star_decides():
    """What the component is for: ten posterior sd from the truth, so that the test above can fail."""
    mean, sd = moments(fitted(stars(kind="fast"), outliers=False))
    assert (abs(mean - TRUTH) > 10 * sd).any()


def test_a_clean_catalogue_does_not_notice():
    """Means move by less than 0.05 sd and widths by less than 5 %, two seeds; the fraction stays below one star."""
    for seed in (11, 12):
        catalog = stars(seed=seed)
        on, off = fitted(catalog), fitted(catalog, outliers=False)
        (mean, sd), (mean_off, sd_off) = moments(on), moments(off)
        assert (abs(mean - mean_off) < 0.05 * sd_off).all()
        np.testing.assert_allclose(sd, sd_off, rtol=0.05)
        assert on.diagnostics.outlier_fraction < 1 / len(catalog)
        assert on.diagnostics.n_outliers == 0
        assert off.outliers is None


def test_contaminants_beyond_escape_are_found_and_members_are_not():
    """2 % beyond escape, four seeds: those at 1.3 times its speed and more have p > 0.95; of the stars with p > 1/2 as
    many are members as these probabilities say, within 3 sd of the Poisson distribution."""
    called, expected = 0, 0.0
    for seed in (11, 12, 13, 14):
        result = fitted(stars(kind="contaminated", seed=seed))
        mean, sd = moments(result)
        assert (abs(mean - TRUTH) < 3 * sd).all()
        p = result.outliers
        assert p is not None
        assert bool((p[2:10] > 0.95).all())
        called += int((p[10:] > 0.5).sum())
        expected += float((1 - p)[p > 0.5].sum())
    assert called <= expected + 3 * max(expected, 1.0) ** 0.5


def test_a_start_in_which_no_star_is_bound_recovers():
    """A start with a hundredth of the mass, where all stars are unbound: the same maximum, none of them an outlier."""
    catalog = stars()
    model = isochrone.build(catalog)
    model.finder = IsochroneActions()
    far = {"potential.m_tot": torch.tensor(1e9).double(), "potential.r_s": torch.tensor(3.0).double()}
    model.initial_values = lambda: far
    config = FitConfig(seed=1, n_components=1, guide="laplace", k_hat_draws=0, outliers=True)
    result = fit(model, catalog, config, progress=False)
    assert result.map["potential.m_tot"].item() == pytest.approx(
        fitted(catalog).map["potential.m_tot"].item(), rel=0.01
    )
    assert result.diagnostics.n_outliers == 0


def test_start_leaves_out_the_fastest_for_their_radius():
    catalog = stars(kind="contaminated")
    kept = unremarkable(catalog.w)
    assert int((~kept).sum()) == 25
    assert not bool(kept[1:10].any())
    assert bool(unremarkable(catalog.w[:3]).all())


def test_start_leaves_out_a_fast_star_far_outside():
    """At 2 000 kpc, five times as far as any other and 1.5 times faster than escape, yet slower than stars inside: to
    bind it the mass would have to be twice what it is."""
    w = stars().w.clone()
    radius = float(w[:, :3].norm(dim=-1).max())
    w[ROW, :3] *= 5 * max(radius, 400.0) / w[ROW, :3].norm()
    escape = float((-2 * Isochrone(1e11, 3.0).phi(w[ROW, :3])).sqrt())
    w[ROW, 3:] *= 1.5 * escape / w[ROW, 3:].norm()
    assert not bool(unremarkable(w)[ROW])


def test_memberships_of_posteriors_runs_and_reports(tmp_path):
    """Per star, mean over draws: from the result, the posterior, an ensemble and a run, with names; off: a reason."""
    w = stars(kind="fast").w
    catalog = Catalog(w, names=tuple(f"star{i}" for i in range(len(w))))
    result = fitted(catalog, n_draws=50)
    posterior = Posterior.from_result(result)
    found = posterior.outliers(catalog)
    assert found.shape == (len(catalog),)
    assert found[ROW] > 0.95
    assert np.delete(found, ROW).max() < 0.5
    assert result.outliers is not None
    np.testing.assert_allclose(found, result.outliers.numpy(), atol=1e-3)
    by_hand = outlier_probability([result.model.at(posterior.source(i)[1]) for i in range(50)], catalog.w)
    np.testing.assert_allclose(found, by_hand.numpy())
    mixture = EnsemblePosterior([posterior, posterior], [1, 1])
    each = [mixture.source(i) for i in range(mixture.n_draws)]
    by_hand = outlier_probability([model.at(values) for model, values in each], catalog.w)
    np.testing.assert_allclose(mixture.outliers(catalog, n_draws=mixture.n_draws), by_hand.numpy())
    summary = posterior.summary()
    assert "outliers.fraction" in list(summary["parameter"])
    assert summary.meta["outliers"][0]["name"] == f"star{ROW}"
    save_run(tmp_path / "run", result, catalog)
    again, _, diagnosis = load_run(tmp_path / "run")
    np.testing.assert_allclose(again.meta["outlier_probability"], result.outliers.numpy(), atol=1e-6)
    np.testing.assert_allclose(again.outliers(catalog), found, atol=1e-9)
    assert f"row {ROW} (star{ROW}) p = 1.000" in "\n".join(describe(diagnosis))
    off = Posterior.from_result(fitted(stars(), outliers=False, n_draws=2))
    with pytest.raises(ValueError, match="--outliers"):
        off.outliers(catalog)


def test_names_and_verdict():
    probability = torch.tensor([0.0, 0.9, 0.05, 0.3], dtype=torch.float64)
    assert named(probability, ["a", "b", "c", "d"]) == [
        {"row": 1, "name": "b", "probability": 0.9},
        {"row": 3, "name": "d", "probability": pytest.approx(0.3)},
    ]
    assert named(None, None) == []
    good = {"gradient_norm": 0.01, "n_unbound": 0, "n_stars": 1000, "k_hat": 0.3, "elbo": [], "notes": []}
    for n, level in ((10, "trusted"), (100, "to be taken with care"), (300, "not to be trusted")):
        judged = verdict(good | {"n_outliers": n})
        assert judged.level == level
        assert all("probably no members" in reason for reason in judged.reasons)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sentinel", "fast"])
def test_one_foreign_star_in_free_form(kind):
    """800 stars, free-form potential: v_c(2 kpc) within 2 sd of the truth, the star named."""
    w = mock("isochrone", n_stars=800, seed=1).w.clone()
    if kind == "sentinel":
        w[ROW, 5] = -999.0
    else:
        w[ROW, 3:] *= 600 / w[ROW, 3:].norm()
    catalog = Catalog(w)
    result = fit(spherical.build(catalog), catalog, FitConfig(seed=1, outliers=True), progress=False)
    field = Posterior.from_result(result).thinned(300).field("circular_speed", [2.0])
    truth = float(Isochrone(1e11, 3.0).circular_speed(torch.tensor([2.0], dtype=torch.float64)))
    assert abs(field.mean[0] - truth) < 2 * field.sd[0]
    assert [one["row"] for one in result.diagnostics.outliers if one["probability"] > 0.95] == [ROW]
