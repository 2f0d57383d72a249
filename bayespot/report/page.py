"""A run as one self-contained HTML page: verdict first, then results, figures, diagnostics and how to reproduce it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bayespot.files import replacing
from bayespot.inference.verdict import LEVELS, verdict
from bayespot.report.plots.style import SINGLE
from bayespot.report.text import bands_in_columns, describe, quote, reweighted_where_it_matters

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bayespot.posterior.posterior import PotentialDraws

#: What a figure shows: its alternative text, its caption, and whether it is two columns wide.
CAPTIONS: dict[str, tuple[str, str, bool]] = {
    "circular_speed": (
        "Circular speed in km/s against radius in kpc with 68 and 95 % bands; below, the error or width in per cent.",
        "Circular speed: median, 68 and 95 % bands; dashed: the truth, where it is known; grey: where the stars are.",
        False,
    ),
    "enclosed_mass": (
        "Mass inside a radius in solar masses, with its 68 and 95 % bands; below, the error or width in per cent.",
        "Enclosed mass.",
        False,
    ),
    "density": (
        "Mass density in solar masses per cubic kpc against radius, with its 68 and 95 % bands.",
        "Mass density. The panel below shows the bulk: where few stars are the bands leave it.",
        False,
    ),
    "potential": (
        "Gravitational potential in squared km/s against radius, with its 68 and 95 % bands.",
        "Potential, zero at infinity where it has a limit; most of its uncertainty is mass beyond the last star.",
        False,
    ),
    "sd_profiles": (
        "Relative posterior standard deviation in per cent of potential, acceleration and density against radius.",
        "How well the fields are known: relative posterior standard deviation.",
        False,
    ),
    "uncertainty_maps": (
        "Four maps in the R-z plane: uncertainty of the potential, of the acceleration and of the density, and the "
        "number density of the stars.",
        "Where the fields are known: posterior standard deviation (colours) and mean (contours); right: the stars.",
        True,
    ),
    "parameters": (
        "Pair plot of the potential's parameters: marginal densities on the diagonal, 68 and 95 % contours below it.",
        "Parameters of the potential: 68 and 95 % contours and marginals; lines: the truth, where it is known.",
        True,
    ),
    "elbo": (
        "The evidence lower bound against the step of variational inference, relative to its final mean.",
        "Evidence lower bound; it should be level at the end.",
        False,
    ),
    "predictive": (
        "Radial profile, dispersions, anisotropy, orientations and angles of the catalogue over those of its replicas.",
        "The catalogue (points) and catalogues replicated from the posterior (bands).",
        True,
    ),
    "formulas": (
        "Distilled formulas over the posterior bands of the potential; below, their residuals in posterior sd.",
        "The formulas of the largest weight over the posterior; below, in posterior standard deviations.",
        False,
    ),
}
#: The same of the figures that only runs of axisymmetric potentials have.
AXIAL_CAPTIONS: dict[str, tuple[str, str, bool]] = {
    "vertical_force": (
        "Vertical force 1.1 kpc above the plane against radius, with its 68 and 95 % bands; below, the error or width.",
        "Vertical force 1.1 kpc above the plane, towards it.",
        False,
    ),
    "surface_density": (
        "Surface density within 1.1 kpc of the plane against radius, with 68 and 95 % bands; below, error or width.",
        "Surface density of all matter within 1.1 kpc of the plane.",
        False,
    ),
    "flattening": (
        "Axis ratio z/R of surfaces of equal density and of equal potential against radius, with 68 and 95 % bands.",
        "Flattening q = z/R of the surfaces of equal density and of equal potential through (R, 0).",
        False,
    ),
    "frequencies": (
        "Vertical and epicycle frequency of near-circular orbits against radius, with their 68 and 95 % bands.",
        "Vertical and epicycle frequency of near-circular orbits in the plane.",
        False,
    ),
    "meridional_maps": (
        "Eight maps in the R-z plane: posterior mean, and below it relative standard deviation, of the potential, the "
        "density and the accelerations along R and z.",
        "Posterior mean (top) and relative standard deviation (bottom); dashed: the region of 68 % of the stars.",
        True,
    ),
}
#: Most formulas that the page lists.
MAX_FORMULAS = 10
_RESULTS = {
    "circular_speed": "v_c [km/s]",
    "enclosed_mass": "M(<r) [Msun]",
    "density": "ρ [Msun/kpc³]",
    "potential": "Φ [km²/s²]",
}
_AXIAL_RESULTS = {
    "circular_speed": "v_c [km/s]",
    "vertical_acceleration": "K_z at 1.1 kpc [km²/s²/kpc]",
    "surface_density": "Σ within 1.1 kpc [Msun/kpc²]",
    "density": "ρ [Msun/kpc³]",
    "density_flattening": "q of ρ",
    "potential_flattening": "q of Φ",
}


@dataclass(frozen=True)
class Picture:
    """A figure as the page holds it."""

    name: str
    data: str
    alt: str
    caption: str
    double: bool
    #: In rem, in proportion to its printed width.
    width: float


@dataclass(frozen=True)
class Grid:
    """A table of text."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_page(
    folder: Path, posterior: PotentialDraws, config: Mapping[str, Any], diagnosis: Mapping[str, Any]
) -> Path:
    """Write ``report.html`` into a run's folder, complete or not at all, and return its path.

    Figures are those in ``figures/`` and ``distillation/``; the page needs no other file, no network and no script.

    Parameters
    ----------
    folder
        The run.
    posterior, config, diagnosis
        What `bayespot.report.load_run` returned.
    """
    path = folder / "report.html"
    with replacing(path) as temporary:
        temporary.write_text(render(folder, posterior, config, diagnosis), encoding="utf-8")
    return path


def render(folder: Path, posterior: PotentialDraws, config: Mapping[str, Any], diagnosis: Mapping[str, Any]) -> str:
    """Return the page's HTML."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    template = environment.from_string(files("bayespot.report").joinpath("page.html").read_text(encoding="utf-8"))
    judged = verdict(diagnosis)
    catalog = config["catalog"]
    r = np.geomspace(catalog["r_q"][2], catalog["r_q"][6], 8)
    exact = reweighted_where_it_matters(posterior, diagnosis, r)
    formulas = _formulas(folder)
    sections = [
        ("results", "Results"), ("figures", "Figures"), ("diagnostics", "Diagnostics"), ("checks", "Predictive checks"),
        *([("formulas", "Formulas")] if formulas else []),
        ("parameters", "Parameters"), ("reproduce", "How to reproduce"),
    ]  # fmt: skip
    predictive = diagnosis.get("predictive")
    return template.render(
        title=folder.resolve().name,
        folder=str(folder),
        lead=_lead(config, diagnosis, posterior.n_draws),
        verdict=judged,
        tone=("trusted", "care", "untrusted")[LEVELS.index(judged.level)],
        sections=sections,
        results=_results("Median and 68 % interval, from 5 to 95 % of the stars' radii", posterior.thinned(300), r),
        reweighted=exact and _results("The same, draws re-weighted to the exact posterior", exact, r),
        quote=quote(judged),
        figures=_pictures(folder, FIELD_FIGURES),
        diagnostics=describe(diagnosis),
        diagnostic_figures=_pictures(folder, ["elbo"]),
        checks=predictive and _checks(predictive),
        checks_verdict=" ".join((predictive or {}).get("warnings", [])) or "The replicas look like the catalogue.",
        check_figures=_pictures(folder, ["predictive"]),
        formulas=formulas,
        parameters=_parameters(posterior),
        parameter_figures=_pictures(folder, ["parameters"]),
        command=config["command"],
        reproduce=_reproduce(config),
        versions=config["versions"],
        versions_table=Grid("Versions that made this run", ["package", "version"], list(config["versions"].items())),
        settings=json.dumps(config["fit"], indent=1),
        notes=catalog.get("meta", {}).get("notes", []),
    )


#: Figures of the section of that name, in this order, as far as a run has them.
FIELD_FIGURES = (
    "circular_speed", "vertical_force", "surface_density", "flattening", "frequencies", "enclosed_mass", "density",
    "potential", "sd_profiles", "uncertainty_maps", "meridional_maps",
)  # fmt: skip


def mathml(text: str) -> str:
    """Return a formula (sympy syntax) as MathML, which browsers draw by themselves."""
    from sympy.printing.mathml import mathml as printed

    from bayespot.potential.symbolic import parse

    body = printed(parse(text), printer="presentation", mul_symbol="&#xB7;")
    return f'<math xmlns="http://www.w3.org/1998/Math/MathML" displaystyle="true">{body}</math>'


def _lead(config: Mapping[str, Any], diagnosis: Mapping[str, Any], n_draws: int) -> str:
    members = diagnosis.get("members")
    kind = f"ensemble of {len(members)} fits" if members else f"guide {config['fit']['guide']}"
    mock = " of a mock, whose truth is known" if "truth" in config["catalog"].get("meta", {}) else ""
    model = config["model"] or "given in Python"
    return (
        f"Gravitational potential from {config['catalog']['n_stars']} stars{mock}; model {model}, {kind}, "
        f"{n_draws} posterior draws. Lengths in kpc, velocities in km/s, masses in solar masses."
    )


def _results(caption: str, few: PotentialDraws, r: NDArray[Any]) -> Grid:
    axial = few.symmetry == "axisymmetric"
    heads = _AXIAL_RESULTS if axial else _RESULTS
    columns = bands_in_columns(few, r, tuple(heads))
    rows = [[f"{r[i]:.3g}", *(interval(*q[:, i]) for q in columns)] for i in range(len(r))]
    return Grid(caption + ", in the plane z = 0" * axial, ["R [kpc]" if axial else "r [kpc]", *heads.values()], rows)


def interval(low: float, middle: float, high: float) -> str:
    """Return ``median [low, high]``, with a common power of ten where numbers are large or small."""
    if np.isfinite([low, middle, high]).all() and 1e3 <= abs(middle) < 1e6:
        return f"{middle:.0f} [{low:.0f}, {high:.0f}]"
    if not np.isfinite([low, middle, high]).all() or middle == 0 or 1e-2 <= abs(middle) < 1e3:
        return f"{middle:.4g} [{low:.4g}, {high:.4g}]"
    power = int(np.floor(np.log10(abs(middle))))
    low, middle, high = (x / 10.0**power for x in (low, middle, high))
    return f"{middle:.3f} [{low:.3f}, {high:.3f}] × 10{str(power).translate(_SUPERSCRIPT)}"


def plus_minus(mean: float, sd: float) -> str:
    """Return ``mean ± sd``, with a common power of ten where the mean is large or small."""
    if not np.isfinite([mean, sd]).all() or mean == 0 or 1e-2 <= abs(mean) < 1e4:
        return f"{mean:.4g} ± {sd:.2g}"
    power = int(np.floor(np.log10(abs(mean))))
    return f"({mean / 10.0**power:.3f} ± {sd / 10.0**power:.3f}) × 10{str(power).translate(_SUPERSCRIPT)}"


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _pictures(folder: Path, names: Sequence[str]) -> list[Picture]:
    found = []
    for name in names:
        path = folder / ("distillation" if name == "formulas" else "figures") / f"{name}.png"
        if path.exists():
            alt, caption, double = (CAPTIONS | AXIAL_CAPTIONS)[name]
            content = path.read_bytes()
            # a PNG's width is in its header; 300 pixels per inch, a column is 26 rem wide
            width = round(26 * int.from_bytes(content[16:20], "big") / 300 / SINGLE, 1)
            found.append(Picture(name, base64.b64encode(content).decode(), alt, caption, double, width))
    return found


def _checks(predictive: Mapping[str, Any]) -> Grid:
    words = {
        "counts": "radial profile", "sigma_r": "radial dispersion", "sigma_t": "tangential dispersion",
        "beta": "anisotropy", "directions": "directions within orbital planes (symmetry of the potential)",
        "planes": "orbital planes (symmetry of f(J))", "angles": "angles (phase mixing)",
        "heights": "vertical profile", "mean_v_phi": "rotation", "sigma_R": "dispersion of v_R",
        "sigma_phi": "dispersion of v_phi", "sigma_z": "dispersion of v_z",
    }  # fmt: skip
    caption = f"Posterior predictive p-values, {predictive['n_draws']} replicas; below 0.01 or above 0.99 is a misfit"
    rows = [[words.get(name, name), f"{p:.2g}"] for name, p in predictive["p_values"].items()]
    return Grid(caption, ["statistic", "p"], rows)


def _parameters(posterior: PotentialDraws) -> Grid:
    table = posterior.summary()
    ours = table[[str(name).startswith("potential.") for name in table["parameter"]]]
    heads = ["parameter", "mean", "sd", "median [68 %]"]
    rows = [
        [str(row["parameter"]).removeprefix("potential."), f"{row['mean']:.4g}", f"{row['sd']:.3g}",
         interval(row["q16"], row["q50"], row["q84"])]
        for row in ours
    ]  # fmt: skip
    if "member" in table.colnames:
        heads = [*heads, "member"]
        rows = [[*row, str(entry["member"])] for row, entry in zip(rows, ours, strict=True)]
    caption = "Latent parameters of the potential (those of f(J) are in summary.ecsv)"
    return Grid(caption, heads, rows)


def _formulas(folder: Path) -> dict[str, Any] | None:
    """What a distillation found, for the template; None without one."""
    from markupsafe import Markup

    path = folder / "distillation" / "candidates.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        rows = []
        for one in found["formulas"][:MAX_FORMULAS]:
            constants = ", ".join(
                f"{name} = {plus_minus(c['mean'], c['sd'])} {c['unit']}".rstrip()
                for name, c in one["constants"].items()
            )
            rows.append(
                {
                    # written by sympy from a formula that was parsed: no text of the file reaches the page as HTML
                    "mathml": Markup(mathml(one["formula"])),
                    "weight": f"{one['weight']:.3f}",
                    "chi2": f"{one['chi2']:.1f} / {one['n_directions']}",
                    "constants": constants,
                }
            )
        judged = found["verdict"]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a readable distillation ({error}); distil again with --overwrite") from error
    return {
        "verdict": judged[:1].upper() + judged[1:] + ".",
        "rows": rows,
        "unit": "Φ in (km/s)²",
        "figures": _pictures(folder, ["formulas"]),
    }


def _reproduce(config: Mapping[str, Any]) -> str:
    model = config["model"]
    file = "; the run's model.py is the model file" if config.get("model_file") else ""
    return (
        f"Seed {config['fit']['seed']}, model {model or 'given in Python'}{file}. The same catalogue, settings and "
        "versions on the same kind of machine give the same numbers. posterior.nc holds the draws (ArviZ), "
        "summary.ecsv and fields.ecsv the tables, figures/ the figures as PNG and PDF."
    )
