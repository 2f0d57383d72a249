"""Mock snapshots: stars in exact equilibrium in a known potential, with the truth in the metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bayespot.callers_state import keeps_callers_state
from bayespot.catalog.catalog import Catalog
from bayespot.mock.equilibrium import Equilibrium
from bayespot.potential.analytic import (
    ANALYTIC,
    NFW,
    CoredPowerLaw,
    Hernquist,
    Isochrone,
    Jaffe,
    Logarithmic,
    Plummer,
    describe,
    from_description,
)
from bayespot.potential.base import Potential
from bayespot.units import takes


@takes(anisotropy_radius="length", beta="number")
@dataclass(frozen=True)
class MockSystem:
    """A named system: potential, tracers (None: self-consistent) and anisotropy (`Equilibrium`)."""

    potential: Potential
    tracers: Potential | None = None
    anisotropy_radius: float | None = None
    beta: float = 0.0


#: More stars are refused rather than run out of memory.
MAX_STARS = 10**9
#: Named systems in kpc and Msun: galaxies, dwarfs in a core or a cusp, halo stars of a galaxy.
MOCKS: dict[str, MockSystem] = {
    "isochrone": MockSystem(Isochrone(m_tot=1e11, r_s=3.0)),
    "isochrone-radial": MockSystem(Isochrone(m_tot=1e11, r_s=3.0), anisotropy_radius=6.0),
    "plummer": MockSystem(Plummer(m_tot=1e10, r_s=1.0)),
    "hernquist": MockSystem(Hernquist(m_tot=1e11, r_s=5.0)),
    "jaffe": MockSystem(Jaffe(m_tot=1e11, r_s=5.0)),
    "hernquist-in-nfw": MockSystem(NFW(m_s=8e11, r_s=20.0), Hernquist(m_tot=1e9, r_s=10.0)),
    "hernquist-in-nfw-radial": MockSystem(NFW(m_s=8e11, r_s=20.0), Hernquist(m_tot=1e9, r_s=10.0), beta=0.3),
    "plummer-in-core": MockSystem(CoredPowerLaw(m_0=2.5e8, r_c=1.0, gamma=2.5), Plummer(m_tot=1e6, r_s=0.7)),
    "dwarf-in-nfw": MockSystem(NFW(m_s=1e9, r_s=3.0), Hernquist(m_tot=1e6, r_s=0.4)),
    "dwarf-cusp": MockSystem(NFW(m_s=8e8, r_s=1.0), Hernquist(m_tot=1e6, r_s=0.15), anisotropy_radius=0.15),
    "dwarf-core": MockSystem(
        CoredPowerLaw(m_0=1.7e9, r_c=1.0, gamma=2.5), Plummer(m_tot=1e6, r_s=0.25), anisotropy_radius=0.25
    ),
    "hernquist-in-logarithmic": MockSystem(Logarithmic(v_0=220.0, r_c=1.0), Hernquist(m_tot=1e9, r_s=8.0)),
    "hernquist-in-galaxy": MockSystem(
        Hernquist(m_tot=6e10, r_s=2.0) + NFW(m_s=7e11, r_s=20.0), Hernquist(m_tot=1e9, r_s=10.0)
    ),
}


@takes(anisotropy_radius="length", beta="number")
@keeps_callers_state
def mock(
    potential: str | Potential = "isochrone",
    *,
    tracers: str | Potential | None = None,
    n_stars: int,
    seed: int,
    anisotropy_radius: float | None = None,
    beta: float | None = None,
    **parameters: float,
) -> Catalog:
    r"""Return a snapshot of stars in exact equilibrium, :math:`f(E, L) = L^{-2\beta} f_Q(Q)`.

    Parameters
    ----------
    potential
        A name of `MOCKS`, a name of `bayespot.potential.ANALYTIC` with all its parameters, or a spherical
        analytic potential or sum.
    tracers
        What the stars' density follows, a potential of finite mass (its mass is irrelevant) or the name of a
        self-consistent system; by default the named system's tracers, or the potential itself.
    n_stars, seed
        Number of stars and seed; the same seed gives the same stars.
    anisotropy_radius
        Osipkov-Merritt radius r_a in kpc: anisotropy (r^2 + beta r_a^2) / (r^2 + r_a^2). None: the named
        system's, usually none.
    beta
        Anisotropy at the centre, in (-0.5, 0.5]. None: the named system's, usually 0.
    **parameters
        New values of the potential's parameters, for instance ``m_tot=1e10``.

    Returns
    -------
    Catalog
        With ``meta["truth"]``: descriptions of potential and tracers, anisotropy_radius, beta, seed.

    Raises
    ------
    ValueError
        If a name or parameter is unknown or out of range, or the combination has no equilibrium.

    Examples
    --------
    >>> catalog = mock("plummer", n_stars=100, seed=0, m_tot=1e9)
    >>> len(catalog), catalog.meta["truth"]["potential"]
    (100, {'name': 'Plummer', 'm_tot': 1000000000.0, 'r_s': 1.0})
    """
    if n_stars < 1:
        raise ValueError(f"n_stars must be at least 1, got {n_stars}")
    if n_stars > MAX_STARS:
        raise ValueError(
            f"n_stars = {n_stars:.3g}: the coordinates alone would take {n_stars * 48 / 1e9:.3g} GB; ask for at most "
            f"{MAX_STARS:.0g} stars"
        )
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}; choose 0 or more")
    system = _system(potential, parameters)
    if isinstance(tracers, str):
        tracers = _system(tracers, {}).potential
    tracers = tracers or system.tracers or system.potential
    r_a = system.anisotropy_radius if anisotropy_radius is None else anisotropy_radius
    beta = system.beta if beta is None else beta
    truth = {
        "potential": describe(system.potential),
        "tracers": describe(tracers),
        "anisotropy_radius": r_a,
        "beta": beta,
        "seed": seed,
    }
    w = Equilibrium(system.potential, tracers, r_a, beta).sample(n_stars, seed)
    return Catalog(w, meta={"truth": truth})


def equilibrium(catalog: Catalog | Mapping[str, Any]) -> Equilibrium:
    """Return the exact distribution function of a mock, from its catalogue or that catalogue's metadata.

    Raises
    ------
    ValueError
        If there is no truth in the metadata.
    """
    truth = _truth(catalog)
    if truth is None:
        raise ValueError("the catalogue's metadata hold no truth; only mocks have an exact distribution function")
    if "tracers" not in truth:
        raise ValueError(
            "the stars were drawn by their orbits: their f(J) is in meta['truth']['orbits'], as f(E, L) unknown"
        )
    potential, tracers = (from_description(truth[key]) for key in ("potential", "tracers"))
    return Equilibrium(potential, tracers, truth["anisotropy_radius"], truth["beta"])


def truth_potential(catalog: Catalog | Mapping[str, Any]) -> Potential | None:
    """Return the true potential of a mock, from its catalogue or that catalogue's metadata; else None.

    None as well of a mock in a potential that is not analytic, such as a draw of a free-form prior.
    """
    truth = _truth(catalog)
    return from_description(truth["potential"]) if truth and "potential" in truth else None


def _truth(catalog: Catalog | Mapping[str, Any]) -> dict[str, Any] | None:
    meta = catalog.meta if isinstance(catalog, Catalog) else catalog
    return meta.get("truth")


def _system(potential: str | Potential, parameters: Mapping[str, float]) -> MockSystem:
    """Return the named or given system with new values of the potential's parameters."""
    if not isinstance(potential, str):
        system = MockSystem(potential)
    elif potential in MOCKS:
        system = MOCKS[potential]
    elif potential.lower() in MOCKS and not parameters:
        raise ValueError(f"unknown system {potential!r}; {potential.lower()!r} is meant? Names are in small letters")
    elif potential.lower() in ANALYTIC:
        return MockSystem(from_description({"name": potential, **parameters}))
    else:
        from bayespot.mock.flattened import GALAXY_STARS

        raise ValueError(
            f"unknown system {potential!r}; choose one of {', '.join([*MOCKS, *ANALYTIC])}, or for a flattened galaxy "
            f"(galaxy_mock) of {', '.join(GALAXY_STARS)}"
        )
    if not parameters:
        return system
    description = describe(system.potential)
    if description["name"] == "SumPotential":
        raise ValueError(f"the potential is a sum: build it with new values of {', '.join(parameters)} yourself")
    changed = from_description({**description, **parameters})
    return MockSystem(changed, system.tracers, system.anisotropy_radius, system.beta)
