"""From candidates to distinct formulas: least squares, whitening, gauges, equivalent forms, constants' posteriors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from contracts.targets import made_target

from bayespot.df import SphericalMixture
from bayespot.distill import Distillation, DistillConfig
from bayespot.distill.formulas import distinct
from bayespot.distill.least_squares import levenberg_marquardt
from bayespot.distill.rewriting import Candidate, by_mass, canonical, tidy, vanishes, without_constant
from bayespot.distill.target import Target, shape_of
from bayespot.likelihood import SnapshotModel
from bayespot.posterior import Posterior
from bayespot.potential import NFW, DirectNetwork, Hernquist, Isochrone, Logarithmic, MassSlopeNetwork
from bayespot.potential.symbolic import parse

ISOCHRONE = Isochrone(1e11, 3.0)
#: One curve in several disguises; the last has a constant too many.
DISGUISES = [
    ("(GM/(b+(((b)**(2))+((r)**(2)))**(0.5)))", {"GM": 1.7, "b": 0.4}),
    ("(GM/(b+sqrt(r**2+b**2)))", {"GM": 1.7, "b": 0.4}),
    ("GM*(sqrt(b**2+r**2)-b)/r**2", {"GM": 1.7, "b": 0.4}),
    ("GM/((c+c)+sqrt((r*r)+((c+c)**2)))", {"GM": 1.7, "c": 0.2}),
    ("GM/(sqrt(b**2+r**2)-b)", {"GM": 1.7, "b": -0.4}),
]


def candidates(forms, gauge="absolute"):
    return [Candidate(text, constants, gauge, f"test:{i}") for i, (text, constants) in enumerate(forms)]


def test_least_squares():
    """Many exponentials at once: parameters to 1e-8; one that nothing depends on stays; NaN is stepped back from."""
    t = torch.linspace(0, 4, 30, dtype=torch.float64)
    truth = torch.tensor([[1.0, 0.5], [3.0, 1.4], [0.2, 0.05]], dtype=torch.float64)
    data = truth[:, :1] * torch.exp(-truth[:, 1:] * t)

    def residual(c):
        model = c[..., :1] * torch.exp(-c[..., 1:2] * t)
        return torch.where(c[..., :1] > 0, model - data, torch.nan)

    start = torch.tensor([[1.0, 1.0, 7.0]] * 3, dtype=torch.float64)
    found = levenberg_marquardt(residual, start, 60, 1e-14)
    torch.testing.assert_close(found.parameters[:, :2], truth, rtol=1e-8, atol=1e-8)
    assert (found.parameters[:, 2] == 7).all()
    assert float(found.chi2.max()) < 1e-14


def test_whitening():
    """Whitened draws have unit covariance; the truth lies within the posterior: chi-square of its directions."""
    target = made_target(ISOCHRONE, seed=3)
    y = torch.as_tensor(target.nodes * target.r_0)
    truth = -ISOCHRONE.phi_r(y).detach().numpy() / target.v_0**2
    for gauge in ("absolute", "offset", "force"):
        metric = target.metric(gauge)
        np.testing.assert_allclose(np.cov(metric.draws.T), np.eye(metric.size), atol=1e-8)
        chi2 = float(((metric.rows @ truth - metric.mean) ** 2).sum())
        assert 4 <= metric.size <= 12
        assert chi2 < metric.size + 4 * (2 * metric.size) ** 0.5, gauge


def test_gauges():
    """A constant added to Phi changes the misfit in the absolute gauge only."""
    target = made_target(ISOCHRONE)
    y = -ISOCHRONE.phi_r(torch.as_tensor(target.nodes * target.r_0)).detach().numpy() / target.v_0**2
    moved = {gauge: np.abs(target.metric(gauge).rows @ (y + 1) - target.metric(gauge).rows @ y).max() for gauge in
             ("absolute", "offset", "force")}  # fmt: skip
    assert moved["absolute"] > 10
    # the force is a difference quotient of numbers of order one, divided by small standard deviations
    assert moved["offset"] < 1e-8
    assert moved["force"] < 1e-6


def test_radii_follow_the_stars():
    """The target's radii are quantiles of the stars' radii, so that none lies where there are no stars."""
    model = SnapshotModel(MassSlopeNetwork(1.0, -2.0, 4.0, 25.0), SphericalMixture())
    radii = np.concatenate([np.linspace(1, 2, 50), np.linspace(20, 22, 50)])
    prior = Posterior(model, model.sample_prior(40, 0), {"radii": radii})
    target = Target.of(prior, 30)
    r = target.x * target.r_0
    assert r.min() >= 1
    assert r.max() <= 22
    assert ((r > 2.01) & (r < 19.9)).sum() <= 1
    phi = prior.field("potential", r).draws
    np.testing.assert_allclose(-target.draws * target.v_0**2, phi, rtol=1e-12)
    v_c = prior.field("circular_speed", r).draws
    np.testing.assert_allclose(target.values("force") * target.v_0**2, v_c**2, rtol=1e-10)


def test_posteriors_that_cannot_be_distilled():
    """Too few draws, draws that know no stars, a flattened potential: what is wrong and what to do."""
    sphere = SnapshotModel(MassSlopeNetwork(1.0, -2.0, 4.0, 25.0), SphericalMixture())
    flat = SnapshotModel(DirectNetwork(3.0, 25.0), SphericalMixture())
    meta = {"radii": np.linspace(1, 10, 50)}
    for model, n, known, words in (
        (sphere, 5, meta, "at least 20"),
        (sphere, 30, {}, "know no stars"),
        (flat, 30, meta, "spherical"),
    ):
        with pytest.raises(ValueError, match=words):
            Target.of(Posterior(model, model.sample_prior(n, 0), known))


def test_shape():
    """Density, limit at infinity and point mass are told apart; a cusp of slope -2 is no point mass."""
    target = made_target(ISOCHRONE)
    x = target.nodes
    wanted = {
        "isochrone": (1 / (0.3 + np.sqrt(0.09 + x**2)), set()),
        "kepler": (1 / x, {"centre"}),
        "jaffe": (np.log(1 + 1 / x), set()),
        "logarithmic": (-np.log(1 + x**2), {"asymptote"}),
        "outward": (1 / (1 + x + np.sqrt(x)) - 1 / (3 + x), {"density"}),
        "shell": (1 / np.sqrt(1 + (x - 1) ** 2), {"density"}),
    }
    for name, (y, faults) in wanted.items():
        found = shape_of(y, len(target.x)).faults("absolute")
        assert faults <= {k for k, v in found.items() if v}, name
        if name != "outward":
            assert {k for k, v in found.items() if v} == faults, name


def test_canonical_and_tidy():
    """Signs go into the constants' symbols, and scales into constants; each is a form of the same curve."""
    text, constants = canonical(*DISGUISES[-1])
    assert parse(text) == parse("GM/(b + sqrt(b**2 + r**2))")
    assert constants == {"GM": 1.7, "b": 0.4}
    # the root of a product of two negative constants is real
    text, _ = canonical("GM/(r+(b*(b+c))**(0.5))", {"GM": 1.0, "b": -2.0, "c": -1.0})
    assert parse(text) == parse("GM/(r + sqrt(b*(b + c)))")
    with pytest.raises(ValueError, match="not a real"):
        canonical("GM/(r+(b)**(0.5))", {"GM": 1.0, "b": -2.0})
    assert parse(tidy("GM/sqrt(4*r**2 + b**2)", ["GM", "b"])) == parse("GM/sqrt(b**2 + r**2)")
    assert parse(tidy("GM*log(1 + r/(2*b))/r", ["GM", "b"])) in (
        parse("GM*log(1 + r/b)/r"),
        parse("GM*log((b + r)/b)/r"),
    )


def test_equivalent_forms_are_one():
    """Five disguises of the isochrone, one of them with two lengths, are one formula beside two others."""
    target = made_target(ISOCHRONE, sd=0.003, seed=1)
    two_lengths = ("GM/(b+sqrt(c**2+r**2))", {"GM": 1.7, "b": 0.3, "c": 0.4})
    others = [("GM/(b+r)", {"GM": 1.7, "b": 0.4}), ("GM/sqrt(b**2+r**2)", {"GM": 1.7, "b": 0.4})]
    found = distinct(candidates([*DISGUISES, two_lengths, *others]), target, 20)
    texts = [f.text for f in found]
    isochrone = [f for f in found if len(f.constants) == 2 and f.chi2_per_dof < 2]
    assert len(isochrone) == 1, texts
    assert parse(isochrone[0].text) == parse("-G*M/(b + sqrt(b**2 + r**2))")
    assert found[0] is isochrone[0]
    assert len(isochrone[0].sources) >= 5


def test_velocities_become_masses():
    """An NFW found as V2 b ln(1 + r/b)/r in the offset's gauge is the NFW found by GM; a logarithm keeps its V2."""
    target = made_target(NFW(8e11, 20.0))
    nfw = [
        Candidate("V2*c*log(1 + r/c)/r", {"V2": 4.0, "c": 1.0}, "offset", "flat:1"),
        Candidate("GM*log(1 + r/b)/r", {"GM": 4.0, "b": 1.0}, "absolute", "logarithm:1"),
    ]
    (one,) = distinct(nfw, target, 5)
    assert (one.gauge, set(one.constants), one.sources) == ("absolute", {"M", "b"}, ("flat:1", "logarithm:1"))
    flat = Candidate("-V2*log(b**2 + r**2)/2", {"V2": 1.0, "b": 0.3}, "offset", "flat:1")
    assert by_mass(flat, "absolute") == flat


HERNQUIST = [
    Candidate("GM/(b+r)", {"GM": 1.0, "b": 0.5}, "absolute", "kepler:1"),
    Candidate("-V2*r/(b+r)", {"V2": 1.0, "b": 0.5}, "offset", "flat:1"),
    Candidate("E0+GM/(b+r)", {"E0": 0.1, "GM": 1.0, "b": 0.5}, "absolute", "offset:1"),
    Candidate("-E0+V2*b/(c+r)", {"E0": 0.1, "V2": 1.0, "b": 0.5, "c": 0.5}, "offset", "own:1"),
]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1,), (1, 2)])
def test_equal_forces_are_one_form(order):
    """-GM/(b + r), V2 r/(b + r) and both with a constant are one potential, whichever was found: the form that vanishes
    at infinity, by its mass, with the right constants."""
    target = made_target(Hernquist(5e10, 4.0), sd=0.003)
    found = distinct([HERNQUIST[i] for i in order], target, 5)
    assert [parse(f.text) for f in found] == [parse("-G*M/(b + r)")], [f.text for f in found]
    assert found[0].gauge == "absolute"
    assert not found[0].faults
    assert set(found[0].sources) == {HERNQUIST[i].source for i in order}
    assert found[0].summary()["M"]["mean"] == pytest.approx(5e10, rel=0.02)


LOGARITHMS = [
    Candidate("-V2*log(b**2+r**2)", {"V2": 0.5, "b": 0.5}, "offset", "flat:1"),
    Candidate("-V2*log(1+r**2/b**2)", {"V2": 0.5, "b": 0.5}, "offset", "flat:2"),
    Candidate("-V2*log(sqrt(b**2+r**2)/b)", {"V2": 1.0, "b": 0.5}, "offset", "flat:3"),
    Candidate("-E0-V2*log(1+r**2/b**2)", {"E0": 1.0, "V2": 0.5, "b": 0.5}, "absolute", "own:1"),
]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0)])
def test_logarithms_with_different_constants_are_one_form(order):
    """Four logarithmic haloes that differ by constants, in two gauges: one form, its constant open, with units. A
    logarithm of r, with other forces, and the Hernquist sphere stay beside it."""
    target = made_target(Logarithmic(200.0, 3.0), sd=0.003)
    others = [Candidate("-V2*log(1+r/b)", {"V2": 1.0, "b": 0.5}, "offset", "other:1"), HERNQUIST[0]]
    found = distinct([LOGARITHMS[i] for i in order] + others, target, 9)
    halo, *rest = found
    assert (halo.gauge, halo.units) == ("offset", ("km2 / s2", "kpc")), [f.text for f in found]
    assert set(halo.sources) == {one.source for one in LOGARITHMS}
    assert {s for f in rest for s in f.sources} <= {"other:1", "kepler:1"}
    assert "other:1" in {s for f in rest for s in f.sources}


def test_different_forces_stay_apart():
    """NFW, Hernquist, isochrone and Plummer, each found with a constant and without: four formulas, none with E0."""
    forms = ["GM*log(1+r/b)/r", "GM/(b+r)", "GM/(b+sqrt(b**2+r**2))", "GM/sqrt(b**2+r**2)"]
    target = made_target(ISOCHRONE)
    constants = {"GM": 1.5, "b": 0.5}
    both = [Candidate(f, constants, "absolute", "plain:1") for f in forms] + [
        Candidate(f"E0+{f}", constants | {"E0": 0.2}, "absolute", "offset:1") for f in forms
    ]
    found = distinct(both, target, 20)
    assert len(found) == 4, [f.text for f in found]
    assert all(f.constants == ("M", "b") and set(f.sources) == {"plain:1", "offset:1"} for f in found)


@pytest.mark.parametrize(
    ("text", "constants", "expected"),
    [
        ("-V2*r/sqrt(b**2+r**2)", {"V2": 2.0, "b": 0.5}, "V2*(1 - r/sqrt(b**2+r**2))"),
        ("V2*(b*log(1+r/b)-r)/r", {"V2": 2.0, "b": 0.5}, "V2*b*log(1+r/b)/r"),
        ("-V2*(1-exp(-r/b))", {"V2": 2.0, "b": 0.5}, "V2*exp(-r/b)"),
        ("V2*log(c/b+b/r)", {"V2": 1.0, "b": 0.4, "c": 0.8}, "V2*log(1+b**2/(c*r))"),
        ("-V2*log(1+r/b)", {"V2": 1.0, "b": 0.4}, "-V2*log(1+r/b)"),
        ("GM/r", {"GM": 1.0}, "GM/r"),
    ],
)
def test_limits_at_infinity_are_taken_off(text, constants, expected):
    """The limit is subtracted where there is one that is not zero; logarithms and what vanishes stay."""
    found = without_constant(Candidate(text, constants, "offset", "flat:1"))
    r = np.array([0.1, 1.0, 7.0])
    names = {"sqrt": np.sqrt, "log": np.log, "exp": np.exp, "r": r} | constants
    values = [eval(form, {"__builtins__": {}}, names) for form in (found.text, expected)]
    np.testing.assert_allclose(*values, rtol=1e-12)
    assert vanishes(found) == (text != "-V2*log(1+r/b)")
    assert set(found.constants) == set(constants)


def test_constants_have_the_right_posterior():
    """Refits to draws: M and b within 4 sd of the truth, their covariance that of generalised least squares (25 %)."""
    target = made_target(ISOCHRONE, seed=2)
    (found,) = distinct(candidates(DISGUISES[:1]), target, 5)
    assert found.constants == ("M", "b")
    assert found.units == ("Msun", "kpc")
    summary = found.summary()
    for name, truth in (("M", 1e11), ("b", 3.0)):
        assert abs(summary[name]["mean"] - truth) < 4 * summary[name]["sd"], summary
    metric = target.metric("absolute")
    nodes = torch.as_tensor(target.nodes * target.r_0)
    columns = []
    for m, b in ((1.001, 1.0), (1.0, 1.001)):
        changed = Isochrone(found.best[0] * m, found.best[1] * b).phi_r(nodes) - found.potential().phi_r(nodes)
        columns.append(metric.rows @ (-changed.detach().numpy() / target.v_0**2) / np.log(1.001))
    expected = np.linalg.inv(np.array(columns) @ np.array(columns).T)
    relative = np.log(found.draws)
    covariance = np.cov(relative.T)
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), np.sqrt(np.diag(expected)), rtol=0.25)
    assert found.correlation[0, 1] == pytest.approx(expected[0, 1] / np.sqrt(expected[0, 0] * expected[1, 1]), abs=0.1)


@pytest.mark.parametrize(
    ("truth", "text", "constants", "gauge", "names"),
    [
        (Hernquist(5e10, 4.0), "GM/(b+r)", {"GM": 1.0, "b": 0.5}, "absolute", {"M": 5e10, "b": 4.0}),
        (NFW(5e11, 12.0), "GM*log(1+r/b)/r", {"GM": 1.0, "b": 1.0}, "absolute", {"M": 5e11, "b": 12.0}),
        (ISOCHRONE, "GM/(b+sqrt(b**2+r**2))", {"GM": 1.0, "b": 1.0}, "force", {"M": 1e11, "b": 3.0}),
        (Logarithmic(200.0, 3.0), "V2*log(1+r**2/b**2)", {"V2": -0.5, "b": 0.5}, "offset", {"V2": 2e4, "b": 3.0}),
    ],
)
def test_physical_units(truth, text, constants, gauge, names):
    """Constants come back in Msun, kpc and (km/s)^2 in every gauge: within 5 sd of the truth."""
    target = made_target(truth, sd=0.003)
    (found,) = distinct(candidates([(text, constants)], gauge), target, 5)
    summary = found.summary()
    for name, value in names.items():
        assert abs(summary[name]["mean"] - value) < 5 * summary[name]["sd"], summary
        assert summary[name]["sd"] < 0.1 * abs(value)


def test_without_units():
    """A form whose dimensions disagree holds in normalised units: its Phi in (km/s)^2 is still right."""
    target = made_target(ISOCHRONE)
    (found,) = distinct(candidates([("GM/(b+r+r**2/50)", {"GM": 1.0, "b": 0.5})]), target, 5)
    assert found.units == ("", "")
    phi = found.potential().phi_r(torch.as_tensor(target.x * target.r_0)).numpy()
    y = -phi / target.v_0**2
    gm, b = found.best
    np.testing.assert_allclose(y, gm / (b + target.x + target.x**2 / 50), rtol=1e-9)


def test_a_truth_outside_the_grammar_is_said_to_be():
    """Only Kepler and Plummer offered for an isochrone: the verdict is that no formula describes the data."""
    target = made_target(ISOCHRONE, sd=0.003)
    forms = [("GM/r", {"GM": 1.0}), ("GM/sqrt(b**2+r**2)", {"GM": 1.0, "b": 0.5})]
    found = distinct(candidates(forms), target, 5)
    result = Distillation(tuple(found), None, DistillConfig(), target, (), ())
    assert "no formula within the budget describes the data" in result.verdict()
    assert "sigma at r = " in result.verdict()
    good = distinct(candidates(DISGUISES[:1] + forms), target, 5)
    result = Distillation(tuple(good), None, DistillConfig(), target, (), ())
    assert "no formula" not in result.verdict()
    assert "agrees poorly" not in result.verdict()
    assert result.weights[0] > 0.99
    # two constants, seven degrees of freedom: p = 0.004
    poor = replace(good[0], chi2=20.9, n_directions=9)
    assert "agrees poorly" in Distillation((poor,), None, DistillConfig(), target, (), ()).verdict()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget_minutes": 0}, "budget_minutes must be positive"),
        ({"budget_epochs": 0}, "budget_epochs must be positive"),
        ({"budget_minutes": None}, "give a budget"),
        ({"families": ("keplr",)}, "unknown family 'keplr'"),
        ({"families": ()}, "families is empty"),
        ({"mode": "median"}, "mean or class"),
        ({"gauge": "none"}, "absolute, offset, force"),
        ({"max_length": 3}, "at least 5"),
    ],
)
def test_bad_settings(settings, words):
    """A ValueError names the setting and what it may be."""
    with pytest.raises(ValueError, match=words):
        DistillConfig(**settings)


def test_bad_families():
    """An unknown operator, constant or prefix is named."""
    from bayespot.distill import Family

    for arguments, words in (
        ({"operators": ("add", "gamma")}, "operator 'gamma'"),
        ({"constants": ("GM", "q")}, "constant 'q'"),
        ({"prefix": ("pow", "GM")}, "prefix 'pow'"),
    ):
        with pytest.raises(ValueError, match=words):
            Family("own", **arguments)
