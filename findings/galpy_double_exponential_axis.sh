#!/usr/bin/env bash
# galpy 1.12.1: DoubleExponentialDiskPotential vanishes near the z axis: Phi, forces and all, without a word.
#
# Phi and forces are integrals over k of Bessel functions of k R by Ogata's formula, whose nodes k go as 1/R: towards the
# axis all of them move past the scales of the disc. At R = z = 0 itself Phi is computed in closed form.
#
# Seen here, default hr = 1/3, hz = 1/16 (galpy's units, of 8 kpc): Phi(R, 0.05) = -0.2202 at R = 0.01, and -2e-6 at
# R = 1e-5, where Phi(0, 0) = -0.2279; the force towards the plane there is 1e-4 of that at R = 0.01. At R = 0.001 (8 pc)
# it is 30 % too large.
#
# What it means for users: a star that passes within some 20 pc of the axis of a disc of scale length 2.7 kpc gets a wrong
# kick, one on the axis feels no disc. Exits 0 while this is so. Needs Python 3.11 or newer:
# PYTHON=python3.11 findings/galpy_double_exponential_axis.sh
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check galpy==1.12.1 numpy==2.3.5 scipy==1.16.3
cat > "$folder/axis.py" <<'PYTHON'
import warnings

# numpy's of the call at the origin itself, whose value is right; the others give none
warnings.simplefilter("ignore")
import galpy
from galpy.potential import DoubleExponentialDiskPotential

disc, z = DoubleExponentialDiskPotential(), 0.05
centre = float(disc(0.0, 0.0, use_physical=False))
phi = {R: float(disc(R, z, use_physical=False)) for R in (0.01, 0.001, 1e-5)}
force = {R: float(disc.zforce(R, z, use_physical=False)) for R in phi}
print(f"galpy {galpy.__version__}: Phi(0, 0) = {centre:.4f}")
for R in phi:
    print(f"R = {R:g}, z = {z}: Phi = {phi[R]:.3g}, force towards the plane {force[R]:.3g}")
flat = abs(force[0.001] / force[0.01] - 1) > 0.2
raise SystemExit(not (phi[0.01] < 0.9 * centre and phi[1e-5] > 1e-3 * centre and abs(force[1e-5]) < 1e-2 and flat))
PYTHON
"$folder/venv/bin/python" "$folder/axis.py"
