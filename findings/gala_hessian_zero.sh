#!/usr/bin/env bash
# gala 1.11.0: Potential.hessian() of several built-in potentials is a matrix of zeros, without a word.
#
# Its documentation says that a potential without an implemented Hessian raises NotImplementedError, as the base class
# does. BurkertPotential, KuzminPotential, SCFPotential, MultipolePotential, SphericalSplinePotential and
# LeeSutoTriaxialNFWPotential return zeros instead.
#
# Seen here: a Burkert sphere of 1e7 Msun/kpc^3 and 5 kpc and a Kuzmin disc of 1e11 Msun and 3 kpc at (4, 3, 1) kpc:
# all nine second derivatives are 0.0, where differences of gala's own gradient give up to 6.8e-5 and 2e-3 per Myr^2. The
# density that gala computes otherwise is right (Burkert: the closed form to 1e-9).
#
# What it means for users: tidal tensors, Lyapunov exponents and densities by Poisson's equation are zero, or those of the
# other members of a sum. Exits 0 while this is so. Needs Python 3.11 or newer: PYTHON=python3.11 findings/gala_hessian_zero.sh
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check gala==1.11.0 numpy==2.3.5 scipy==1.16.3 astropy==7.1.1
cat > "$folder/zero.py" <<'PYTHON'
import gala
import gala.potential as gp
import numpy as np
from astropy import units as u
from gala.units import galactic

X, H = np.array([4.0, 3.0, 1.0]), 1e-4
found = {
    "Burkert": gp.BurkertPotential(1e7 * u.Msun / u.kpc**3, 5 * u.kpc, units=galactic),
    "Kuzmin": gp.KuzminPotential(1e11 * u.Msun, 3 * u.kpc, units=galactic),
}
wrong = True
for name, potential in found.items():

    def gradient(x):
        return potential.gradient(x * u.kpc).value[:, 0]

    hessian = potential.hessian(X * u.kpc).value[:, :, 0]
    slopes = np.stack([(gradient(X + H * e) - gradient(X - H * e)) / (2 * H) for e in np.eye(3)], -1)
    largest = [float(np.abs(a).max()) for a in (hessian, slopes)]
    print(f"gala {gala.__version__}, {name}: largest second derivative {largest[0]} where its gradient gives {largest[1]:.2g}")
    wrong &= largest[0] == 0 and largest[1] > 1e-5
raise SystemExit(not wrong)
PYTHON
"$folder/venv/bin/python" "$folder/zero.py"
