#!/usr/bin/env bash
# gala 1.11.0: LogarithmicPotential with phi != 0 has a wrong density and Hessian; so has LM10Potential.
#
# phi turns the axes q1 and q2 in the plane. Energy and gradient turn with it and agree with each other to 1e-11; density
# and Hessian do not, so that Poisson's equation fails. LM10Potential (Law & Majewski 2010) uses phi = 97 degrees.
#
# Seen here, at (4, 3, 1) kpc: v_c = 200 km/s, r_h = 1 kpc, q = (1, 0.9, 0.8). With phi = 0 density() is the divergence
# of gradient() over 4 pi G to 1e-6; with phi = 30 degrees it is 16 % too small; for LM10Potential 28 % too large at
# (10, 8, 3) kpc. The Hessian's trace is off as much.
#
# What it means for users: local dark-matter densities and tidal tensors of a halo turned in the plane are wrong, orbits
# are not. Exits 0 while this is so. Needs Python 3.11 or newer: PYTHON=python3.11 findings/gala_logarithmic_phi.sh
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check gala==1.11.0 numpy==2.3.5 scipy==1.16.3 astropy==7.1.1
cat > "$folder/turned.py" <<'PYTHON'
import gala
import gala.potential as gp
import numpy as np
from astropy import units as u
from gala.units import galactic

H = 1e-3


def errors(potential, x):
    """Relative errors of density and of the Hessian's trace against the divergence of the gradient."""

    def gradient(x):
        return potential.gradient(x * u.kpc).value[:, 0]

    divergence = sum((gradient(x + H * e) - gradient(x - H * e)) @ e / (2 * H) for e in np.eye(3))
    trace = float(np.trace(potential.hessian(x * u.kpc).value[:, :, 0]))
    density = float(potential.density(x * u.kpc).to_value(u.Msun / u.kpc**3)[0]) * 4 * np.pi * gravity
    return density / divergence - 1, trace / divergence - 1


def halo(phi):
    return gp.LogarithmicPotential(
        200 * u.km / u.s, 1 * u.kpc, q1=1.0, q2=0.9, q3=0.8, phi=phi * u.deg, units=galactic
    )


gravity = halo(0).G
rows = {
    "phi = 0": errors(halo(0), np.array([4.0, 3.0, 1.0])),
    "phi = 30 deg": errors(halo(30), np.array([4.0, 3.0, 1.0])),
    "LM10Potential": errors(gp.LM10Potential(), np.array([10.0, 8.0, 3.0])),
}
for name, (density, trace) in rows.items():
    print(f"gala {gala.__version__}, {name}: density off by {100 * density:.3f} %, trace of the Hessian by {100 * trace:.3f} %")
right = max(map(abs, rows["phi = 0"])) < 1e-5
raise SystemExit(not (right and rows["phi = 30 deg"][0] < -0.1 and rows["LM10Potential"][0] > 0.2))
PYTHON
"$folder/venv/bin/python" "$folder/turned.py"
