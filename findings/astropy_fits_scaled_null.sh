#!/usr/bin/env bash
# astropy 8.0.2: FITS integers with TSCAL and TNULL are not masked.
#
# FITS 4.0, section 7.3.2: TNULLn is the value of the *stored* integer that stands for an undefined one, before TSCALn and
# TZEROn are applied. astropy's Table.read compares it with the scaled numbers, so a radial velocity stored as -9999 with
# TSCAL = 0.1 is a measurement of -999.9 km/s, without a word. Without TSCAL the same column is masked, as it should be.
# Beside that, Table.read of an ASCII table (XTENSION = 'TABLE') of integers with TNULL ends in a TypeError.
#
# Seen here: two rows, stored -9999 and 1234. Scaled: no value masked, the first reads -999.9. Not scaled: the first is
# masked. The ASCII table raises TypeError.
#
# What it means for users: sentinels enter as measurements; one such star at -1000 km/s moves a galaxy's mass by a factor.
# Exits 0 while this is so. PYTHON=python3.11 findings/astropy_fits_scaled_null.sh
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "${ASTROPY:-astropy==8.0.2}"
cat > "$folder/null.py" <<'PYTHON'
import io

import astropy
import numpy as np
from astropy.io import fits
from astropy.table import Table


def read(scale):
    hdu = fits.BinTableHDU(np.array([(-9999,), (1234,)], dtype=[("radial_velocity", ">i2")]))
    hdu.header["TNULL1"] = -9999
    if scale:
        hdu.header["TSCAL1"] = scale
    file = io.BytesIO()
    hdu.writeto(file)
    file.seek(0)
    return np.ma.asarray(Table.read(file, format="fits")["radial_velocity"])


scaled, plain = read(0.1), read(None)
print(f"astropy {astropy.__version__}: scaled {list(scaled)}, masked {np.ma.getmaskarray(scaled).tolist()};", end=" ")
print(f"not scaled: masked {np.ma.getmaskarray(plain).tolist()}")
column = fits.Column(name="radial_velocity", format="I6", null="-999", array=np.array([-999, 123]))
file = io.BytesIO()
fits.TableHDU.from_columns([column]).writeto(file)
file.seek(0)
try:
    ascii_error = None
    Table.read(file, format="fits")
except TypeError as error:
    ascii_error = error
print(f"ASCII table with TNULL: {ascii_error!r}")
wrong = not np.ma.getmaskarray(scaled).any() and abs(scaled[0] + 999.9) < 1e-9
raise SystemExit(not (wrong and np.ma.getmaskarray(plain).tolist() == [True, False] and ascii_error is not None))
PYTHON
"$folder/venv/bin/python" "$folder/null.py"
