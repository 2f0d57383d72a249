#!/usr/bin/env bash
# arviz-stats 1.3.3: array_stats.psislw wants ln p (of what is left out), not log importance weights.
#
# Its docstring says "Compute log weights for Pareto-smoothed importance sampling" of an `ary` whose meaning it does not
# give, and its name and result are those of arviz.psislw of ArviZ 0.x, which takes log weights. Given log weights it
# smooths the tail of the smallest ones and returns a Pareto k that says that all is well, without a word.
#
# Seen here: 4000 weights w = u^-0.7 with u uniform, whose tail has k = 0.7. psislw(ln w) returns k below 0;
# psislw(-ln w) returns 0.6 to 0.8. ArviZ 0.23.4's psislw(ln w) returns the latter as well.
#
# What it means for users: a verdict "k-hat below 0.7, re-weighting is safe" on any posterior, after nothing but an
# upgrade of ArviZ. Exits 0 while this is so. Needs Python 3.12 or newer: PYTHON=python3.12 findings/arviz_stats_psislw_sign.sh
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for pins in "old arviz==0.23.4 numpy==2.3.5 scipy==1.16.3" "new arviz-stats[xarray]==1.3.3 numpy==2.3.5 scipy==1.16.3"; do
    set -- $pins
    "${PYTHON:-python3}" -m venv "$folder/$1"
    "$folder/$1/bin/pip" install --quiet --disable-pip-version-check "${@:2}"
done
cat > "$folder/weights.py" <<'PYTHON'
import numpy as np

log_w = -0.7 * np.log(np.random.default_rng(0).uniform(size=4000))
PYTHON
cat > "$folder/old.py" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import arviz
from weights import log_w

k = float(arviz.psislw(log_w.copy())[1])
print(f"arviz {arviz.__version__}: psislw(ln w) gives k = {k:.2f}")
raise SystemExit(not 0.6 < k < 0.8)
PYTHON
cat > "$folder/new.py" <<'PYTHON'
import arviz_stats
from arviz_stats.base import array_stats
from weights import log_w

as_named, negative = (float(array_stats.psislw(x)[1]) for x in (log_w.copy(), -log_w))
print(f"arviz-stats {arviz_stats.__version__}: psislw(ln w) gives k = {as_named:.2f}, psislw(-ln w) {negative:.2f}")
raise SystemExit(not (as_named < 0 and 0.6 < negative < 0.8))
PYTHON
"$folder/old/bin/python" "$folder/old.py"
"$folder/new/bin/python" "$folder/new.py"
