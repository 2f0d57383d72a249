"""Every public argument that may carry a unit: quantities are converted by it, or refused in one sentence.

The walk covers the names that the package and its rooms export and those that docs/api documents, their constructors
and public methods. Each argument that holds numbers, by its annotation, is declared (`bayespot.units.takes`), handled
by hand or exempt with a reason; a new one without a decision fails. What is declared is proved twice: for each argument
that its function sees 8 where 8 kpc were given as 8000 pc, and that a wrong unit is refused by name; and for the
functions of EXAMPLES that the result is the same in other units, to 1e-12.
"""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from astropy import units as u
from astropy.coordinates import CartesianRepresentation, Longitude
from astropy.table import Column, MaskedColumn, QTable, Table
from astropy.time import TimeDelta
from astropy.utils.masked import Masked

import bayespot
from bayespot import actions, potential
from bayespot.actions import orbit
from bayespot.catalog import Catalog
from bayespot.df import ActionChart, SphericalActionDistribution, SphericalMixture
from bayespot.distill import DistillConfig
from bayespot.likelihood import (
    GalacticLatitude,
    HeliocentricDistance,
    MagnitudeLimit,
    MeasurementErrors,
    SkyCone,
    SnapshotModel,
    SphericalShell,
)
from bayespot.mock import Equilibrium, MockSystem, mock, observe
from bayespot.posterior import Posterior
from bayespot.potential import Isochrone, SymbolicPotential, TabulatedSphere, truth_field
from bayespot.report import plots
from bayespot.units import MIXED, TAKEN, G, plain, takes, tensor

ROOMS = (
    "actions", "catalog", "df", "distill", "inference", "likelihood", "mock", "posterior", "potential", "report",
)  # fmt: skip
#: Annotations of arguments that may hold a number with a unit.
NUMERICAL = re.compile(r"\b(float|Tensor|ArrayLike|NDArray|Array|Value|ndarray|Any)\b")
#: Converted or refused inside the function, each with a test below.
BY_HAND = (
    "SymbolicPotential.__init__.constants", "SymbolicPotential.__init__.start", "SnapshotModel.at.values",
    "SnapshotModel.chain.values", "SnapshotModel.log_prior.values", "SnapshotModel.log_factors.values",
    "SnapshotModel.select_at.values", "mock.parameters",
    "from_description.description", "band.reference", "two_panel.truth", "bands_figure.truths", "formulas.curves",
    "formulas_figure.curves",
)  # fmt: skip
#: Why an argument that holds numbers needs no decision about units.
EXEMPT = {
    "Potential.radial_draws.values": "draws of a posterior, tensors in the internal system",
    "MassSlopeNetwork.radial_draws.values": "draws of a posterior, tensors in the internal system",
    "*.phi_draws_on_grid.values": "draws of a posterior, tensors in the internal system",
    "*.functionals_on_grid.*": "draws of a posterior, in the internal system; weights and numbers",
    "Diagnostics.__init__.*": "what a fit measured of itself",
    "FinderBias.__init__.*": "what a fit measured of itself",
    "FitResult.__init__.*": "a fit's own result",
    "AngleTest.__init__.*": "a test's result: chi-square and probability",
    "ComponentChoice.__init__.table": "the result of a choice",
    "Predictive.__init__.*": "the result of a check",
    "Forecast.__init__.*": "the result of a forecast",
    "Posterior.__init__.*": "draws and weights that a fit made; sites in other units are refused by SnapshotModel.at",
    "Posterior.taken.index": "rows",
    "EnsemblePosterior.__init__.weights": "probabilities",
    "FitConfig.__init__.*": "settings of optimisers and samplers",
    "TrainingConfig.__init__.*": "settings of optimisers",
    "Forecast.*.n_stars": "a count",
    "star_map.n_stars": "a count",
    "uncertainty_maps.n_stars": "a count",
    "forecast_figure.factor": "a ratio of counts",
    "Field.quantile.q": "a probability",
    "Catalog.*.meta": "metadata, kept as they are",
    "ProjectedCatalog.*.meta": "metadata, kept as they are",
    "ProjectedCatalog.of.photometric": "yes or no, for each star",
    "ProjectedCatalog.read.options": "those of of_table, declared there",
    "equilibrium.catalog": "a catalogue or its metadata",
    "truth_potential.catalog": "a catalogue or its metadata",
    "*.sample.sample_shape": "a shape",
    "StarDensity.expand.*": "a shape",
    "SnapshotModel.forward.subsample": "rows",
    "from_gala.potential": "an object of another package, with its own units",
    "from_galpy.potential": "an object of another package; ro and vo are its units",
    "elbo_trace.elbo": "a fit's own result",
    "draw_figures.elbo": "a fit's own result",
    "*.diagnosis": "what a run folder says of itself",
    "write_page.config": "what a run folder says of itself",
    "*.figure": "a figure",
    "save.path": "a file",
    "chain_ranks.data": "draws",
    "parameters.*": "draws, and true values in the sites' own units",
    "LogPolynomialDistribution.__init__.amplitude": "amplitudes of polynomials",
    "Catalog.*.frame": "a frame, whose own numbers are declared",
    "Frame.of.given": "a frame, whose own numbers are declared",
    "Catalog.read_snapshot.options": "those of read_snapshot, declared there",
    "SymmetryTest.from_dict.tests": "a test's result: chi-square and probability",
    "Healpix.*.table": "probabilities",
    "Healpix.tabulate.empty": "a probability",
    "Healpix.tabulate.outside": "a probability",
    "Healpix.__init__.empty": "a probability",
    "Healpix.__init__.outside": "a probability",
    "MeasurementErrors.where_needed.settings": "those of MeasurementErrors, declared there",
    "from_gaiaunlimited.selection": "an object of another package",
    "from_gaiaunlimited.at": "numbers of that object's own columns",
    "from_gaiaunlimited.empty": "a probability",
    "from_gaiaunlimited.outside": "a probability",
    "read_snapshot.hubble_param": "H0 in 100 km/s/Mpc, a pure number by its definition",
}
#: What arguments of these names are, wherever they occur: a second statement beside the declarations.
KIND_OF = {
    "r": "length", "x": "length", "radii": "length", "points": "length", "positions": "length", "stars_r": "length",
    "observer": "length", "extent": "length", "anisotropy_radius": "length", "r_s": "length", "r_c": "length",
    "r_0": "length", "R": "length", "z_max": "length", "a": "length", "b": "length", "r_d": "length", "h_z": "length",
    "r_hole": "length", "r_cut": "length", "rho_0": "density", "sigma_0": "surface_density",
    "r_min": "length", "r_max": "length", "d_min": "length", "d_max": "length", "ro": "length",
    "m_tot": "mass", "m_s": "mass", "m_0": "mass", "mass": "mass", "v_0": "speed", "vo": "speed", "v_error": "speed",
    "times": "time", "at": "time", "w": "phase_space", "J": "action", "theta": "phase", "scale_r": "action",
    "scale_L": "action", "scale_z": "action", "beta": "number", "gamma": "number",
}  # fmt: skip
#: The other meanings of such names.
OTHERWISE = {
    "ActionChart.smooth_of_uniform.x": "number",
    "shrinking_sphere.at": "length",
    "Factors.__init__.J": "internal",
}
#: Units that are not the internal ones.
OTHER = {
    "length": "pc", "mass": "1e9 Msun", "speed": "m / s", "time": "Gyr", "action": "pc km / s", "potential": "m2 / s2",
    "density": "Msun / pc3", "surface_density": "Msun / pc2",
    "angle": "rad", "phase": "deg", "proper_motion": "arcsec / yr", "parallax": "arcsec", "magnitude": "mmag",
    "minutes": "s", "number": "%",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ the walk


def _public():
    """Return every exported or documented class and function by its qualified name."""
    names = [(f"bayespot.{room}", n) for room in ROOMS for n in importlib.import_module(f"bayespot.{room}").__all__]
    names += [("bayespot", n) for n in bayespot.__all__]
    for page in (Path(__file__).parents[1] / "docs" / "api").glob("*.md"):
        blocks = re.findall(r"^::: (\S+)(?:\n    options:\n      members: \[(.*)\])?", page.read_text(), re.M)
        for target, members in blocks:
            if members:
                names += [(target, name) for name in members.split(", ")]
                continue
            try:
                module = importlib.import_module(target)
            except ModuleNotFoundError:
                names.append(tuple(target.rsplit(".", 1)))
            else:
                own = (n for n, o in vars(module).items() if getattr(o, "__module__", "").startswith(target))
                names += [(target, n) for n in own if not n.startswith("_")]
    found = (getattr(importlib.import_module(module), name) for module, name in names)
    return {o.__qualname__: o for o in found if inspect.isclass(o) or inspect.isfunction(o)}


def _functions():
    """Return public functions, constructors and public methods, also inherited ones, by name."""
    found = {}
    for name, thing in _public().items():
        if not inspect.isclass(thing):
            found[name] = thing
        elif not issubclass(thing, tuple | Exception):
            for base in thing.__mro__:
                if not base.__module__.startswith("bayespot"):
                    continue
                for key, method in vars(base).items():
                    method = getattr(method, "__func__", method)
                    if inspect.isfunction(method) and (not key.startswith("_") or key in ("__init__", "__call__")):
                        found[f"{base.__qualname__}.{key}"] = method
    return found


FUNCTIONS = _functions()
DECLARED = [(n, p, k) for n, f in FUNCTIONS.items() for p, k in getattr(f, "__takes__", {}).items()]
UNDECLARED = [
    f"{name}.{p.name}"
    for name, function in FUNCTIONS.items()
    for p in inspect.signature(function).parameters.values()
    if p.name not in getattr(function, "__takes__", {})
    and NUMERICAL.search(str(p.annotation))
    and not str(p.annotation).startswith("Callable")
]


def test_the_walk_is_long():
    """It finds what it should: some hundred functions, and arguments of every kind."""
    assert len(FUNCTIONS) > 250
    assert len(DECLARED) > 180
    assert {kind for _, _, kind in DECLARED} == {*TAKEN, *MIXED}
    for name in ("Isochrone.phi", "_FiniteSphere.__init__", "mock", "PotentialDraws.field", "integrate", "star_map"):
        assert name in FUNCTIONS


def test_every_argument_is_decided():
    """No argument that holds numbers is left without a declaration, a test by hand or a reason; no reason is stale."""
    known = [*EXEMPT, *BY_HAND]
    open_ = [name for name in UNDECLARED if not any(fnmatch.fnmatchcase(name, pattern) for pattern in known)]
    assert not open_, f"declare their kind with bayespot.units.takes, or exempt them here with a reason: {open_}"
    stale = [pattern for pattern in known if not fnmatch.filter(UNDECLARED, pattern)]
    assert not stale, stale


def test_kinds_agree_with_names():
    """What an argument is declared to be is what its name means elsewhere."""
    wrong = [
        (name, argument, kind)
        for name, argument, kind in DECLARED
        if kind != OTHERWISE.get(f"{name}.{argument}", KIND_OF.get(argument, kind))
    ]
    assert not wrong


@pytest.mark.parametrize(("name", "argument", "kind"), DECLARED)
def test_a_wrong_unit_is_refused(name, argument, kind):
    """A luminous intensity (for what one unit cannot describe: a length) is refused with argument and unit."""
    value = 3 * u.kpc if kind in MIXED else 3 * u.cd
    with pytest.raises(ValueError, match=rf"(?s)^{argument} .*{value.unit}") as caught:
        FUNCTIONS[name](**{argument: value})
    wanted = "alone" if kind == "number" else "kpc" if kind in MIXED else str(u.Unit(TAKEN[kind])).split()[0]
    assert wanted.replace("solMass", "Msun") in str(caught.value)


@pytest.mark.parametrize(("name", "argument", "kind"), [row for row in DECLARED if row[2] not in MIXED])
def test_other_units_arrive_converted(name, argument, kind):
    """Behind its declaration every function sees the internal number, given by keyword or by place."""
    function = FUNCTIONS[name]
    innermost = function
    while hasattr(innermost.__wrapped__, "__takes__"):
        innermost = innermost.__wrapped__
    cell = dict(zip(innermost.__code__.co_freevars, innermost.__closure__, strict=True))["function"]
    original, seen = cell.cell_contents, []
    cell.cell_contents = lambda *args, **keywords: seen.append((args, keywords))
    places = list(inspect.signature(function).parameters)
    try:
        function(**{argument: elsewhere(8.0, kind)})
        function(**{argument: elsewhere([8.0, 9.0], kind)})
        if inspect.signature(function).parameters[argument].kind is not inspect.Parameter.KEYWORD_ONLY:
            function(*[None] * places.index(argument), elsewhere(8.0, kind))
    finally:
        cell.cell_contents = original
    found = [keywords[argument] if keywords else args[-1] for args, keywords in seen]
    for value, expected in zip(found, (8.0, [8.0, 9.0], 8.0), strict=False):
        assert not hasattr(value, "unit")
        np.testing.assert_allclose(np.asarray(value), expected, rtol=1e-13)


def elsewhere(value, kind):
    """Return internal numbers as a Quantity in another unit."""
    return (np.asarray(value) * u.Unit(TAKEN[kind])).to(OTHER[kind])


# ------------------------------------------------------------------------------------------------ whole calls

R = torch.tensor([1.0, 4.0, 20.0], dtype=torch.float64)
W = torch.tensor([[8.0, 0.0, 1.0, 20.0, 150.0, 30.0], [3.0, -2.0, 4.0, -50.0, 90.0, 60.0]], dtype=torch.float64)
GRID = np.geomspace(0.1, 100, 40)
SPHERE = Isochrone(1e11, 3.0)
ONE = torch.ones(2, dtype=torch.float64)
J3 = torch.tensor([[50.0, 300.0, 80.0]], dtype=torch.float64)


def prior_draws():
    """Two draws of an isochrone, without a fit."""
    mass = dist.LogNormal(torch.tensor(25.0).double(), torch.tensor(0.1).double())
    return Posterior.prior(SnapshotModel(Isochrone(mass, 3.0), SphericalMixture()), 2, 0)


def settings(thing):
    """Return the numbers that an object keeps of its arguments."""
    return np.hstack([v for k, v in sorted(vars(thing).items()) if isinstance(v, float | tuple)])


def speeds(thing):
    return thing.circular_speed(R)


def written(tmp_path, radii):
    SPHERE.to_agama(tmp_path / "potential.ini", radii=radii, overwrite=True)
    rows = re.findall(r"^[\d.e+-]+\t[\d.e+-]+$", (tmp_path / "potential.ini").read_text(), re.M)
    return np.array([row.split() for row in rows], dtype=float)


#: Function, its arguments in internal units, and the numbers that follow from what it returns.
EXAMPLES = {
    "isochrone": (Isochrone, {"m_tot": 1e11, "r_s": 3.0}, speeds),
    "nfw": (potential.NFW, {"m_s": 8e11, "r_s": 20.0}, speeds),
    "power law": (potential.PowerLaw, {"m_0": 1e10, "r_0": 2.0, "gamma": 1.5}, speeds),
    "core": (potential.CoredPowerLaw, {"m_0": 1e10, "r_c": 2.0, "gamma": 2.5}, speeds),
    "Miyamoto-Nagai": (potential.MiyamotoNagai, {"m_tot": 7e10, "a": 3.0, "b": 0.3}, speeds),
    "cut-off": (potential.PowerLawCutoff, {"m_tot": 7e10, "r_c": 2.0, "gamma": 1.8}, speeds),
    "spheroid": (
        potential.DoublePowerLaw,
        {"rho_0": 1e7, "r_s": 20.0, "gamma": 1.0, "beta": 3.0, "q": 0.8, "r_cut": 100.0},
        speeds,
    ),
    "disc": (potential.ExponentialDisc, {"sigma_0": 9e8, "r_d": 2.5, "h_z": 0.3, "r_hole": 0.1}, speeds),
    "column": (SPHERE.surface_density, {"R": 8.0, "z_max": 1.1}, np.asarray),
    "logarithmic": (potential.Logarithmic, {"v_0": 220.0, "r_c": 1.0, "q": 0.9}, speeds),
    "table": (TabulatedSphere, {"r": GRID, "phi": -G * 1e10 / np.sqrt(1 + GRID**2)}, speeds),
    "masses": (TabulatedSphere.from_mass, {"r": GRID, "mass": 1e10 * GRID**3 * (1 + GRID**2) ** -1.5}, speeds),
    "direct": (
        lambda r_s: potential.DirectNetwork(r_s, 25.0, "spherical", prior="none"),
        {"r_s": 3.0},
        lambda p: speeds(p).detach(),
    ),
    "phi": (SPHERE.phi, {"x": W[:, :3]}, np.asarray),
    "called": (SPHERE, {"x": W[:, :3]}, np.asarray),
    "density": (SPHERE.density, {"x": W[:, :3]}, np.asarray),
    "acceleration": ((SPHERE + SPHERE).acceleration, {"x": W[:, :3]}, np.asarray),
    "profile": (SPHERE.enclosed_mass, {"r": R}, np.asarray),
    "density_r": (SPHERE.density_r, {"r": R}, np.asarray),
    "radius": (potential.radius, {"x": W[:, :3]}, np.asarray),
    "truth": (lambda points: truth_field(SPHERE, "density", points), {"points": [1.0, 8.0]}, np.asarray),
    "shell": (SphericalShell, {"r_min": 2.0, "r_max": 9.0}, settings),
    "distance": (HeliocentricDistance, {"d_max": 9.0, "d_min": 1.0, "observer": (-8.0, 0.0, 0.02)}, settings),
    "magnitude": (
        MagnitudeLimit,
        {"limit": 20.0, "absolute_magnitude": 0.5, "width": 0.2, "observer": (-8.0, 0.0, 0.02)},
        settings,
    ),
    "latitude": (GalacticLatitude, {"b_min": 15.0, "b_max": 80.0, "observer": (-8.0, 0.0, 0.02)}, settings),
    "cone": (SkyCone, {"longitude": 120.0, "latitude": -30.0, "radius": 20.0, "observer": (-8.0, 0.0, 0.0)}, settings),
    "errors": (MeasurementErrors, {"v_r_range": (-500.0, 400.0), "distance_range": (0.2, 90.0)}, settings),
    "system": (lambda **k: MockSystem(SPHERE, **k), {"anisotropy_radius": 6.0, "beta": 0.2}, settings),
    "equilibrium": (lambda **k: Equilibrium(SPHERE, **k), {"anisotropy_radius": 6.0}, lambda e: e.anisotropy_radius),
    "mock": (
        lambda **k: mock("isochrone", n_stars=3, seed=0, **k),
        {"anisotropy_radius": 9.0, "r_s": 2.0, "m_tot": 1e10},
        lambda c: [*c.w.flatten(), c.meta["truth"]["anisotropy_radius"], c.meta["truth"]["potential"]["r_s"]],
    ),
    "observe": (
        lambda **k: observe(Catalog(W), 0, **k),
        {"distance_error": 0.1, "pm_error": 0.05, "v_error": 2.0},
        lambda c: [c.w, *c.covariance.unbind(-1)],
    ),
    "integrate": (lambda times: orbit.integrate(SPHERE, W, times), {"times": np.linspace(0, 0.1, 5)}, np.asarray),
    "two times": (lambda times: orbit.integrate(SPHERE, W, times), {"times": [0.0, 0.1]}, np.asarray),
    "transformed": (
        lambda **k: orbit.integrate_transformed(SPHERE, W, n_steps=3, **k).w,
        {"scale": 8 * ONE, "softening": 0.1 * ONE, "step": 0.01 * ONE},
        np.asarray,
    ),
    "dense": (
        lambda **k: orbit.dense(SPHERE, orbit=orbit.integrate(SPHERE, W, (0.1, 4)), **k),
        {"times": torch.linspace(0, 0.1, 5).double(), "at": [0.01, 0.07]},
        np.asarray,
    ),
    "torus map": (
        lambda **k: actions.IsochroneActions().phase_space(SPHERE, **k),
        {"J": J3, "theta": [[1.0, 2.0, 3.0]]},
        np.asarray,
    ),
    "energy": (lambda J: actions.IsochroneActions().energy(SPHERE, J), {"J": J3}, np.asarray),
    "chart": (ActionChart, {"scale_r": 90.0, "scale_L": 200.0, "size": 1.0, "tail": 3.0}, lambda c: c.smooth(J3)),
    "f(J)": (
        lambda **k: SphericalActionDistribution(
            **k, logits=0 * ONE, shape_r=ONE, shape_L=2 * ONE, tail=3 * ONE
        ).log_prob(J3),
        {"scale_r": 90 * ONE, "scale_L": 200 * ONE},
        np.asarray,
    ),
    "field": (lambda points: prior_draws().field("density", points).draws, {"points": [1.0, 8.0]}, np.asarray),
    "predict": (
        lambda radii: prior_draws().predict(radii),
        {"radii": [1.0, 8.0]},
        lambda table: [table["r"].value, table["enclosed_mass_mean"].value],
    ),
    "inference data": (
        lambda radii: prior_draws().to_inference_data(radii)["posterior"],
        {"radii": [1.0, 8.0]},
        lambda group: [group["r"], group["circular_speed"].mean(("chain", "draw"))],
    ),
    "plane": (
        lambda extent: prior_draws().plane("density", extent=extent, n=4),
        {"extent": 10.0},
        lambda p: [p.mean.ravel(), p.points[..., 0].ravel()],
    ),
    "budget": (DistillConfig, {"budget_minutes": 2.0}, lambda config: config.budget_minutes),
}


#: Kinds of the examples' arguments whose names say less.
ALSO = {
    "phi": "potential", "q": "number", "distance_error": "number", "pm_error": "proper_motion", "scale": "length",
    "softening": "length", "step": "time",
}  # fmt: skip


def _kind(function, argument):
    declared = getattr(function.__init__ if inspect.isclass(function) else function, "__takes__", {})
    return declared.get(argument) or KIND_OF.get(argument) or ALSO[argument]


def _flat(numbers):
    parts = numbers if isinstance(numbers, list) else [numbers]
    return np.concatenate([np.ravel(np.asarray(part, dtype=float)) for part in parts])


@pytest.mark.parametrize("name", EXAMPLES)
def test_results_are_the_same_in_other_units(name):
    """Each argument in turn, in pc for kpc and so on: the same numbers to 1e-12 of the largest."""
    function, arguments, numbers = EXAMPLES[name]
    expected = _flat(numbers(function(**arguments)))
    for argument, value in arguments.items():
        given = elsewhere(value, _kind(function, argument))
        found = _flat(numbers(function(**(arguments | {argument: given}))))
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max(), err_msg=argument)


def test_pair_of_end_and_steps():
    """Of (t_end, n_steps) the first is a time; three numbers in a tuple, half a step or a list like it are refused."""
    expected = orbit.integrate(SPHERE, W, (0.1, 4))
    found = orbit.integrate(SPHERE, W, (elsewhere(0.1, "time"), 4))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for times in ((0.0, 0.1, 0.2), (0.1, 1.5)):
        with pytest.raises(ValueError, match=r"pair times is \(t_end, n_steps\)"):
            orbit.integrate(SPHERE, W, times)
    with pytest.raises(ValueError, match=r"\[1.0, 100\] may be two times or \(t_end, n_steps\)"):
        orbit.integrate(SPHERE, W, [1.0, 100])


def test_agama_radii(tmp_path):
    """The file has the same nodes and values."""
    np.testing.assert_allclose(written(tmp_path, [100, 2000] * u.pc), written(tmp_path, [0.1, 2.0]), rtol=1e-12)


def test_galpy_units():
    """galpy's ro and vo, both ways."""
    galpy = pytest.importorskip("galpy.potential")
    exported = SPHERE.to_galpy(ro=8200 * u.pc, vo=0.2 * u.Mm / u.s)
    assert (exported._ro, exported._vo) == pytest.approx((8.2, 200.0), rel=1e-12)
    one = potential.from_galpy(galpy.HernquistPotential(), ro=8200 * u.pc, vo=200 * u.km / u.s).phi(W[:, :3])
    torch.testing.assert_close(one, potential.from_galpy(galpy.HernquistPotential(), 8.2, 200.0).phi(W[:, :3]))


def test_constants_of_formulas():
    """Constants are converted to kpc, km/s and Msun; with units for all of them that of Phi is checked."""
    text = "-G*M/(b + sqrt(b**2 + r**2))"
    mass, b = elsewhere(1e11, "mass"), 3000 * u.pc
    for constants in ({"M": mass, "b": b}, {"M": 1e11, "b": b}):
        found = SymbolicPotential(text, constants, start={"b": 2000 * u.pc})
        torch.testing.assert_close(found.circular_speed(R), SPHERE.circular_speed(R), rtol=1e-12, atol=0)
        assert float(found._start["b"]) == pytest.approx(2.0)
    for constants in ({"M": mass, "b": 3 * u.km / u.s}, {"M": 3 * u.kpc, "b": b}):
        with pytest.raises(ValueError, match=r"not a potential with r in kpc and M in .*, b in .*give numbers alone"):
            SymbolicPotential(text, constants)
    with pytest.raises(ValueError, match=r"^M is a quantity of .* cannot be in cd"):
        SymbolicPotential("-G*M/(r + b)", {"M": 3 * u.cd, "b": 1.0})


def test_descriptions_and_parameters_of_mocks():
    """A wrong kind of parameter is named; sites have no unit."""
    assert float(potential.from_description({"name": "nfw", "m_s": 8e11, "r_s": 20000 * u.pc}).r_s) == 20.0
    with pytest.raises(ValueError, match=r"r_s is a length and cannot be in km / s"):
        mock("isochrone", n_stars=3, seed=0, r_s=3 * u.km / u.s)
    prior = Isochrone(dist.LogNormal(25.0, 0.1), 3.0)
    model = SnapshotModel(prior, SphericalMixture(), selection=SphericalShell(0.1, 100.0))
    for call in (
        model.at,
        model.chain,
        model.log_prior,
        model.log_factors,
        lambda values: model.select_at(values, Catalog(W), 9, 0),
    ):
        with pytest.raises(ValueError, match=r"m_tot comes in 1e\+09 solMass, but .* without a unit"):
            call({"potential.m_tot": elsewhere(1e11, "mass")})


def test_truths_and_curves_of_figures():
    """Truths and formulas are drawn in the field's unit; a wrong unit names the argument."""
    import matplotlib.pyplot as plt

    field = prior_draws().field("circular_speed", [1.0, 4.0, 20.0])
    truth = SPHERE.circular_speed(R).numpy()
    figure = plots.two_panel(field, truth=(truth * u.km / u.s).to("m/s"), stars_r=[1, 4, 20] * u.kpc)
    np.testing.assert_allclose(figure.axes[0].lines[1].get_ydata(), truth)
    other = plots.formulas_figure(field, {"isochrone": (truth * u.km / u.s).to("m/s")})
    np.testing.assert_allclose(other.axes[0].lines[1].get_ydata(), truth)
    for call in (
        lambda ax: plots.two_panel(field, truth=truth * u.kpc),
        lambda ax: plots.band(ax, field, reference=truth * u.kpc),
        lambda ax: plots.formulas(ax, field, {"isochrone": truth * u.kpc}),
        lambda ax: plots.bands_figure([field], {"circular_speed": truth * u.kpc}),
    ):
        with pytest.raises(
            ValueError, match=r"^(truth|reference|curve 'isochrone'|circular_speed) is a value in km / s"
        ):
            call(figure.axes[0])
    plt.close("all")


def test_gaia_zero_point_in_the_unit_of_the_column():
    """-0.03 mas are subtracted from parallaxes in arcsec as well; 0.03 arcsec was."""
    table = Table({"ra": [10.0, 50.0], "dec": [5.0, 8.0], "pmra": [1.0, 2.0], "pmdec": [1.0, 3.0],
                   "radial_velocity": [5.0, 9.0], "parallax": [1.0, 2.0]})  # fmt: skip
    expected = Catalog.from_gaia(table, parallax_zero_point=-0.03).w
    table["parallax"] = ([1.0, 2.0] * u.mas).to(u.arcsec)
    for zero in (-0.03, -0.03 * u.mas, elsewhere(-0.03, "parallax")):
        torch.testing.assert_close(Catalog.from_gaia(table, parallax_zero_point=zero).w, expected)


# ------------------------------------------------------------------------------------------------ the conversion


@pytest.mark.parametrize(
    "value",
    [
        [8000, 4000] * u.pc,
        np.array([8000, 4000], dtype=np.float32) * u.pc,
        [8 * u.kpc, 4000 * u.pc],
        (8.0, 4000 * u.pc),
        np.array([8 * u.kpc, 4000 * u.pc], dtype=object),
        QTable({"r": [8000, 4000] * u.pc})["r"],
        Table({"r": [8000, 4000] * u.pc})["r"],
        Column([8000, 4000], unit="pc"),
        MaskedColumn([8000, 4000], unit="pc", mask=[False, False]),
        Masked([8000, 4000] * u.pc),
        Column([8.0, 4.0]),
        np.ma.MaskedArray([8, 4]),
        [torch.tensor(8.0).double(), 4.0],
        torch.tensor([8, 4]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_forms_of_arrays(value):
    """Quantities, columns, lists of quantities (plain numbers among them are kpc), objects, masks without effect."""
    found = tensor(value, "length", "r")
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), [8.0, 4.0])
    np.testing.assert_allclose(prior_draws().field("density", value).points, [8.0, 4.0])


def test_forms_of_other_libraries():
    """pandas has no units; xarray has them as text; other packages' units are refused by name."""
    import pandas as pd
    import xarray as xr

    class Length(np.ndarray):
        units = object()

    np.testing.assert_allclose(tensor(pd.Series([8.0, 4.0], index=["unit", "units"]), "length", "r"), [8.0, 4.0])
    array = xr.DataArray([8000.0, 4000.0], attrs={"units": "pc"})
    np.testing.assert_allclose(tensor(array, "length", "r"), [8.0, 4.0])
    with pytest.raises(ValueError, match=r"^r comes in .* of .*'s: give an astropy Quantity, or .* in kpc"):
        tensor(np.array([8.0]).view(Length), "length", "r")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (8 * u.s, "r is a length and cannot be in s: give it in kpc"),
        (8 * u.dimensionless_unscaled, "r is a length and cannot be dimensionless: give it in kpc"),
        ([8 * u.kpc, 8 * u.s], "r is a length and cannot be in s"),
        (0.1 * u.mas, "r is a length and cannot be in mas"),
        (Masked([8, 4] * u.kpc, mask=[True, False]), "r has 1 masked of 2 values: fill or drop them"),
        (MaskedColumn([8, 4], unit="kpc", mask=[True, False]), "r has 1 masked of 2 values"),
        (np.ma.MaskedArray([8, 4], mask=[True, False]), "r has 1 masked of 2 values"),
        (np.array([8 + 1j]), "r must be numbers in kpc, got complex128 values"),
        (np.array(["2026-01-01"], dtype="M8[D]"), r"r must be numbers in kpc, got datetime64\[D\] values"),
        ("8 kpc", "r must be numbers in kpc or a Quantity, got the text '8 kpc'"),
        (TimeDelta(8 * u.s), "r must be numbers in kpc or a Quantity, got a TimeDelta"),
        (CartesianRepresentation([1, 2, 3] * u.kpc), "r must be numbers in kpc or a Quantity, got a Cartesian"),
        ({"r": 8.0}, "r must be numbers in kpc, got {'r': 8.0}"),
    ],
)
def test_refusals(value, message):
    """What is no length in one sentence with the argument, what came and what is wanted."""
    with pytest.raises(ValueError, match=f"^{message}"):
        SPHERE.circular_speed(value)


def test_equivalencies_of_the_caller_do_not_apply():
    """With astropy's parallax equivalency switched on a parallax is still no length."""
    with u.set_enabled_equivalencies(u.parallax()), pytest.raises(ValueError, match="cannot be in mas"):
        SPHERE.circular_speed(0.1 * u.mas)


def test_angles_and_logarithmic_masses():
    """Longitudes are angles; a mass in dex is a mass."""
    assert SkyCone(Longitude("8h"), 10.0, 5.0).longitude == pytest.approx(120.0)
    assert float(Isochrone(11 * u.dex(u.Msun), 3.0).m_tot) == pytest.approx(1e11)


def test_tensors_and_parameters_pass_untouched():
    """The same tensor arrives, with its graph; a parameter stays trainable and a prior stays a prior."""
    r = torch.tensor([8.0], dtype=torch.float64, requires_grad=True)
    assert plain(r, "length", "r") is r
    assert tensor(r, "length", "r") is r
    (slope,) = torch.autograd.grad(SPHERE.circular_speed(r).sum(), r)
    assert bool((slope < 0).all())
    scale = torch.nn.Parameter(torch.tensor(3.0).double())
    assert Isochrone(1e11 * u.Msun, scale).r_s is scale
    assert "r_s" in Isochrone(1e11 * u.Msun, dist.LogNormal(1.0, 1.0))._pyro_samples


def test_subclasses_take_what_they_override():
    """A potential of a user's own, whose argument has another name, and its parameters."""

    class Harmonic(potential.Potential):
        symmetry = "spherical"

        def __init__(self, omega):
            super().__init__()
            self._set_parameter("omega", omega)

        def phi(self, position):
            return self.omega**2 * (position**2).sum(-1) / 2

    own = Harmonic(0.1 * u.km / u.s / u.pc)
    assert float(own.phi([3000, 4000, 0] * u.pc)) == pytest.approx(100.0**2 * 25 / 2)
    assert float(own.circular_speed(2)) == pytest.approx(200.0)
    with pytest.raises(ValueError, match=r"^position is a length and cannot be in s"):
        own.phi([1, 2, 3] * u.s)


def test_declarations_are_checked():
    """An unknown kind or argument fails where it is declared."""
    with pytest.raises(ValueError, match="unknown quantity"):
        takes(r="width")(lambda r: r)
    with pytest.raises(ValueError, match="'s' is not in list"):
        takes(s="length")(lambda r: r)


def test_no_astropy_without_quantities(monkeypatch):
    """Potentials, actions, orbits and selections of plain numbers, lists and arrays work where astropy cannot load."""
    monkeypatch.setitem(sys.modules, "astropy", None)
    w = W.numpy()
    halo = potential.NFW(8e11, 20)
    assert halo.circular_speed([1, 2.0]).shape == halo.density(w[:, :3]).shape == (2,)
    assert bool(HeliocentricDistance(100)(w).all())
    assert bool(torch.isfinite(actions.SphericalActions().actions(halo, w)).all())
    assert orbit.integrate(halo, w, [0.0, 0.1]).shape == (2, 2, 6)
    with pytest.raises(ImportError):
        halo.circular_speed(8 * u.kpc)
