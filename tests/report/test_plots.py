"""Figures drawn on made-up fields: what every one of them promises (units, bands, widths, nothing left in pyplot)."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from bayespot.diagnostics import to_inference_data
from bayespot.potential import RADIAL_FIELDS, Field
from bayespot.report import plots
from bayespot.report.plots.style import LOGARITHMIC, SYMBOLS, UNITS
from bayespot.units import UNITS as INTERNAL

R = np.geomspace(0.5, 200, 30)


@pytest.fixture
def field() -> Field:
    """A thousand draws of v_c with a relative sd of 10 %."""
    scatter = np.random.default_rng(0).normal(size=(1000, 1))
    return Field("circular_speed", "km / s", R, 200 * (1 + 0.1 * scatter) * np.ones_like(R))


def test_widths():
    """One and two columns are 88 and 180 mm."""
    assert pytest.approx((88, 180), abs=0.2) == (plots.SINGLE * 25.4, plots.DOUBLE * 25.4)


def test_bands_hold_their_fraction(field):
    """The bands' edges are the 2.5, 16, 84 and 97.5 % quantiles: 1.96 and 0.99 sd of 20 km/s."""
    ax = plots.band(Figure().subplots(), field)
    heights = [np.ptp(c.get_paths()[0].vertices[:, 1]) / 2 for c in ax.collections]
    assert heights == pytest.approx([1.96 * 20, 0.994 * 20], rel=0.06)


def test_every_field_has_a_unit():
    """Labels of all fields name the internal unit's parts; symbols exist for all of them."""
    for name in RADIAL_FIELDS:
        parts = INTERNAL[name].replace("Msun", "M$_\\odot$").replace("(", " ").replace(")", " ").split()
        for part in parts:
            if (word := part.strip("/")) and not word[-1].isdigit():
                assert word.split("$")[0] in UNITS[name], (name, word)
        assert name in SYMBOLS
    assert set(LOGARITHMIC) <= set(UNITS)


def test_radius_axis():
    """Ticks are plain numbers of kpc."""
    ax = Figure().subplots()
    ax.plot([0.05, 500], [1, 1])
    plots.radius_axis(ax)
    ax.figure.canvas.draw()
    assert ax.get_xlabel() == "$r$ [kpc]"
    assert {"0.1", "1", "10", "100"} <= {label.get_text() for label in ax.get_xticklabels()}


def test_composite_figures_take_a_subfigure(field):
    """Two panels, profiles and formulas drawn side by side in one figure of two columns."""
    with plots.style():
        figure = Figure(figsize=(plots.DOUBLE, 3), layout="constrained")
        left, middle, right = figure.subfigures(1, 3)
        assert plots.two_panel(field, 200 + 0 * R, R, figure=left) is left
        assert plots.sd_profiles([field], R, figure=middle) is middle
        assert plots.formulas_figure(field, {"$v$": 210 + 0 * R}, R, figure=right) is right
        figure.canvas.draw()
    assert [len(part.axes) for part in (left, middle, right)] == [2, 1, 2]
    dashed = [line for line in left.axes[0].lines if line.get_linestyle() == "--"]
    np.testing.assert_allclose(dashed[0].get_ydata(), 200)


def test_error_panel_of_a_positive_field():
    """A field that is never negative is never more than 100 % too small, and the panel does not show more."""
    wide = Field(
        "density", "Msun / kpc3", R, np.exp(3 * np.random.default_rng(1).normal(size=(500, 1))) * np.ones_like(R)
    )
    low, high = plots.two_panel(wide, np.ones_like(R)).axes[1].get_ylim()
    assert low == pytest.approx(-110)
    assert high > 1000


def test_arviz_figures():
    """Pair plot with the truth dashed in every panel, ranks of every chain; pyplot is left without figures."""
    import torch

    draws = {
        f"potential.{n}": torch.randn(400, generator=torch.Generator().manual_seed(i)) for i, n in enumerate("abc")
    }
    data = to_inference_data(draws, n_chains=4)
    figure = plots.parameters(data, list(draws), dict.fromkeys(draws, 0.0))
    visible = [ax for ax in figure.axes if ax.axison]
    assert len(visible) == 6
    for ax in visible:
        assert any(line.get_linestyle() == "--" for line in ax.lines)
    assert [ax.get_xlabel() for ax in figure.axes[-3:]] == ["a", "b", "c"]
    ax = plots.chain_ranks(Figure().subplots(), data, "potential.a")
    assert len(ax.collections) >= 4
    assert ax.get_title() == "a"
    assert pyplot.get_fignums() == []


@pytest.mark.usefixtures("drawn_figures")
def test_save_is_complete_or_nothing(tmp_path):
    """PNG and PDF by suffix, the PDF with embedded fonts; an unknown suffix leaves no file."""
    with plots.style():
        figure = Figure(figsize=(2, 2))
        figure.subplots().set_xlabel("text")
        for name, start in (("a.png", b"\x89PNG"), ("a.pdf", b"%PDF")):
            plots.save(figure, tmp_path / name)
            assert (tmp_path / name).read_bytes().startswith(start)
        with pytest.raises(ValueError, match="xyz"):
            plots.save(figure, tmp_path / "a.xyz")
    content = (tmp_path / "a.pdf").read_bytes()
    assert b"/FontFile2" in content
    assert b"/Type3" not in content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pdf", "a.png"]
