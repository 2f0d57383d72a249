"""How every figure looks: widths of journals' columns, fonts, colours, names and units of quantities."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayespot.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Widths of one and of two columns in inches: 88 and 180 mm, as in A&A (MNRAS 84 and 174, AAS 86 and 178 mm).
SINGLE, DOUBLE = 3.46, 7.09
#: Okabe and Ito's colours, distinguishable with every kind of colour vision.
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#555555"
#: Opacities of the 95 and 68 % bands.
ALPHA95, ALPHA68 = 0.2, 0.4
#: The truth of a mock.
TRUTH: dict[str, Any] = {"color": "black", "ls": "--", "lw": 1.0}

SYMBOLS = {
    "potential": r"$\Phi$",
    "acceleration": r"$|a|$",
    "radial_acceleration": r"$a_r$",
    "density": r"$\rho$",
    "enclosed_mass": r"$M(<r)$",
    "circular_speed": r"$v_c$",
    "acceleration_R": r"$a_R$",
    "acceleration_z": r"$a_z$",
    "vertical_acceleration": r"$|K_z|(1.1\,\mathrm{kpc})$",
    "surface_density": r"$\Sigma(1.1\,\mathrm{kpc})$",
    "vertical_frequency": r"$\nu$",
    "epicycle_frequency": r"$\kappa$",
    "density_flattening": r"$q$ of $\rho$",
    "potential_flattening": r"$q$ of $\Phi$",
}
UNITS = {
    "potential": r"km$^2$ s$^{-2}$",
    "acceleration": r"km$^2$ s$^{-2}$ kpc$^{-1}$",
    "radial_acceleration": r"km$^2$ s$^{-2}$ kpc$^{-1}$",
    "density": r"M$_\odot$ kpc$^{-3}$",
    "enclosed_mass": r"M$_\odot$",
    "circular_speed": r"km s$^{-1}$",
    "acceleration_R": r"km$^2$ s$^{-2}$ kpc$^{-1}$",
    "acceleration_z": r"km$^2$ s$^{-2}$ kpc$^{-1}$",
    "vertical_acceleration": r"km$^2$ s$^{-2}$ kpc$^{-1}$",
    "surface_density": r"M$_\odot$ kpc$^{-2}$",
    "vertical_frequency": r"km s$^{-1}$ kpc$^{-1}$",
    "epicycle_frequency": r"km s$^{-1}$ kpc$^{-1}$",
}
LOGARITHMIC = ("density", "enclosed_mass", "vertical_acceleration", "surface_density")


def label(name: str) -> str:
    """Return a quantity's symbol with its unit; its name where it has no symbol."""
    return f"{SYMBOLS[name]} [{UNITS[name]}]" if name in UNITS else SYMBOLS.get(name, name)


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib settings of all figures: one column wide, 8 pt, ticks inside, fonts embedded as text."""
    import matplotlib as mpl

    settings: dict[Any, Any] = {
        "figure.figsize": (SINGLE, 0.95 * SINGLE),
        "figure.dpi": 150,
        "savefig.dpi": 300,
        "pdf.fonttype": 42,
        "font.size": 8,
        "axes.titlesize": 8,
        "axes.linewidth": 0.7,
        "lines.linewidth": 1.2,
        "xtick.direction": "in",
        "ytick.direction": "in",
        "xtick.top": True,
        "ytick.right": True,
        "legend.frameon": False,
        "legend.fontsize": 7,
        "legend.handlelength": 1.6,
    }
    with mpl.rc_context(settings):
        yield


def new_figure(figure: Any, width: float, height: float) -> Any:
    """Return the given figure (or subfigure), or a new one of that size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained") if figure is None else figure


def radius_axis(ax: Axes, name: str = "r") -> None:
    """Make x a logarithmic axis of radius in kpc, with plain numbers from 0.001 to 9999."""
    from matplotlib.ticker import FuncFormatter, LogFormatter

    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: power_of_ten(x)))
    # numbers between the decades where there are few decades
    ax.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    ax.set_xlabel(rf"${name}$ [kpc]")


def power_of_ten(value: float) -> str:
    """Return a short label: digits below 1e4, beyond them powers of ten."""
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    digits = f"{float(mantissa):g}"
    times = {"1": "", "-1": "-"}.get(digits, rf"{digits}\times")
    return rf"${times}10^{{{int(exponent)}}}$"


def save(figure: Figure, path: Any) -> None:
    """Write a figure (PNG or PDF by suffix), complete or not at all, without touching pyplot's state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary)
