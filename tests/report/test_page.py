"""The report page of a run made from prior draws, as text and in a real headless browser.

Nothing may come from outside the file; every figure must be drawn by the browser (naturalWidth > 0) and its console
must stay empty. The browser's test is skipped where Chromium, its driver or selenium is missing.
"""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from bayespot import Isochrone, SnapshotModel, SphericalMixture, load_run, save_run
from bayespot.cli.results import report
from bayespot.inference import Diagnostics, FitConfig, FitResult
from bayespot.report import plots, write_page
from bayespot.report.manifest import register
from bayespot.report.page import CAPTIONS, interval, mathml, plus_minus

FORMULAS = [
    {
        "formula": "-G*M/(b + sqrt(b**2 + r**2))",
        "weight": 0.9,
        "chi2": 3.1,
        "n_directions": 4,
        "constants": {"M": {"mean": 1.02e11, "sd": 2e9, "unit": "Msun"}, "b": {"mean": 3.1, "sd": 0.1, "unit": "kpc"}},
    },
    {
        "formula": "-G*M*log(1 + r/a)/r",
        "weight": 0.1,
        "chi2": 8.0,
        "n_directions": 4,
        "constants": {"M": {"mean": 2e11, "sd": 1e10, "unit": "Msun"}, "a": {"mean": 5.0, "sd": 1.0, "unit": "kpc"}},
    },
]


@pytest.fixture(scope="module")
def run(isochrone_stars, tmp_path_factory) -> Path:
    """A run of a parametric model with figures, a predictive check and a distillation."""
    from torch.distributions import LogNormal

    one = torch.ones((), dtype=torch.float64)
    potential = Isochrone(LogNormal(25.3 * one, 0.05 * one), LogNormal(1.1 * one, 0.05 * one))
    model = SnapshotModel(potential, SphericalMixture(n_components=1))
    draws = model.sample_prior(60, seed=0)
    r = isochrone_stars.x.norm(dim=-1).sort().values
    r_q = [float(r[min(int(p * len(r)), len(r) - 1)]) for p in (0, 0.01, 0.05, 0.16, 0.5, 0.84, 0.95, 0.99, 1)]
    info = {"n_stars": len(isochrone_stars), "r_q": r_q, "radii": r.tolist(), "meta": dict(isochrone_stars.meta)}
    info["meta"]["notes"] = ["3 of 10 rows <dropped> & gone"]
    start = {k: v[0] for k, v in draws.items()}
    diagnosis = Diagnostics([-1.0] * 50, 0.01, 0, 0.3, 1, [], 8, {"map": 1.0}, [], n_stars=len(isochrone_stars))
    folder = tmp_path_factory.mktemp("page") / "halo"
    result = FitResult(model, draws, start, FitConfig(), diagnosis, info, {"log_q": torch.zeros(60)})
    save_run(
        folder, result, isochrone_stars, model_name="isochrone", command="bayespot fit isochrone 'a b.fits' -o halo"
    )
    stored = json.loads((folder / "diagnostics.json").read_text())
    p_values = {"counts": 0.4, "sigma_r": 0.002, "sigma_t": 0.5, "beta": 0.6, "angles": 0.2}
    stored["predictive"] = {"p_values": p_values, "warnings": ["sigma_r: p = 0.002"], "n_draws": 50}
    (folder / "diagnostics.json").write_text(json.dumps(stored))
    register(folder, [folder / "diagnostics.json"])
    (folder / "distillation").mkdir()
    (folder / "distillation" / "candidates.json").write_text(
        json.dumps({"verdict": "one formula holds 90 % of the weight", "formulas": FORMULAS})
    )
    for path in (folder / "figures" / "predictive.png", folder / "distillation" / "formulas.png"):
        figure = Figure(figsize=(2, 2))
        figure.subplots().plot([0, 1])
        plots.save(figure, path)
    write_page(folder, *load_run(folder))
    return folder


class Tags(HTMLParser):
    """Start tags with their attributes, and whether every element that must be closed is."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br", "mspace"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"


def test_page_is_complete(run):
    """Verdict first, then what it rests on; command, versions, notes and formulas are there; text is escaped."""
    page = (run / "report.html").read_text(encoding="utf-8")
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    order = [text.index(f'id="{name}"') for name in ("verdict", "results", "figures", "diagnostics", "checks")]
    assert order == sorted(order)
    for words in (
        "Verdict: to be taken with care",
        "sigma_r: p = 0.002",
        "v_c [km/s]",
        "bayespot fit isochrone &#39;a b.fits&#39; -o halo",
        "torch",
        "&lt;dropped&gt; &amp; gone",
        "One formula holds 90 % of the weight.",
        "m_tot",
    ):
        assert words in text, words
    assert "<dropped>" not in text


def test_page_is_self_contained(run):
    """No script, no address outside the file; every image is inline with an alternative text; tags are closed, every
    entry of the contents leads somewhere."""
    tags = Tags()
    tags.feed((run / "report.html").read_text(encoding="utf-8"))
    assert tags.open == []
    names = [tag for tag, _ in tags.found]
    assert "script" not in names
    for tag, attributes in tags.found:
        for key in ("src", "href"):
            assert (attributes.get(key) or "#").startswith(("#", "data:")), (tag, attributes)
    images = [attributes for tag, attributes in tags.found if tag == "img"]
    # all but the ELBO's and the figures that this run lacks
    assert len(images) == len(CAPTIONS)
    assert all(len(image["alt"] or "") > 20 for image in images)
    ids = {attributes["id"] for _, attributes in tags.found if "id" in attributes}
    links = [attributes["href"] for tag, attributes in tags.found if tag == "a"]
    assert len(links) == 7
    assert {link.removeprefix("#") for link in links} <= ids


def test_page_without_extras(run, tmp_path):
    """Without checks and a distillation the page says how to make them, or leaves the section out."""
    bare = shutil.copytree(run, tmp_path / "bare")
    shutil.rmtree(bare / "distillation")
    (bare / "figures" / "predictive.png").unlink()
    posterior, config, diagnosis = load_run(bare)
    diagnosis.pop("predictive")
    text = write_page(bare, posterior, config, diagnosis).read_text(encoding="utf-8")
    assert "bayespot check" in text
    assert 'id="formulas"' not in text
    assert "can be trusted" not in text
    assert "Verdict: trusted." in text
    assert sorted(p.name for p in bare.iterdir() if p.name.startswith(".")) == []


def test_damaged_distillation(run, tmp_path):
    """A candidates.json that is none is named, with the remedy; no page is written."""
    broken = shutil.copytree(run, tmp_path / "broken")
    (broken / "report.html").unlink()
    (broken / "distillation" / "candidates.json").write_text('{"formulas": [{}]}')
    with pytest.raises(ValueError, match=r"candidates.json: not a readable distillation.*--overwrite"):
        write_page(broken, *load_run(broken))
    assert not (broken / "report.html").exists()


@pytest.mark.usefixtures("drawn_figures")
def test_report_command(run, tmp_path, capsys):
    """`bayespot report` writes the page and every figure as PNG and PDF; PNGs are one column (88 mm) or two (180 mm)
    wide at 300 dpi."""
    import matplotlib.image

    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(copy / "figures")
    report(copy)
    assert f"wrote {copy / 'report.html'}" in capsys.readouterr().out
    drawn = list((copy / "figures").glob("*.png"))
    stems = {p.stem for p in drawn}
    assert {"circular_speed", "uncertainty_maps", "parameters", "elbo"} <= stems
    assert {p.stem for p in (copy / "figures").glob("*.pdf")} == stems
    assert all(p.read_bytes().startswith(b"%PDF") for p in (copy / "figures").glob("*.pdf"))
    for path in drawn:
        width = matplotlib.image.imread(path).shape[1] / 300
        wide = plots.DOUBLE if path.stem == "uncertainty_maps" else plots.SINGLE
        assert width == pytest.approx(3.2 if path.stem == "parameters" else wide, abs=0.01), path.name


def test_mathml_and_numbers():
    """A formula becomes MathML with fractions and roots; intervals share a power of ten."""
    text = mathml("-G*M/(b + sqrt(b**2 + r**2))")
    for tag in ("<math", "<mfrac>", "<msqrt>", "<msup>", "<mi>G</mi>"):
        assert tag in text
    with pytest.raises(ValueError, match="not a formula"):
        mathml("<script>")
    assert interval(95.0, 101.234, 110.0) == "101.2 [95, 110]"
    assert interval(3.4e9, 4.25e9, 5.1e9) == "4.250 [3.400, 5.100] × 10⁹"
    assert interval(-31000.4, -30000.0, -29000.0) == "-30000 [-31000, -29000]"
    assert plus_minus(1.02e11, 2e9) == "(1.020 ± 0.020) × 10¹¹"
    assert plus_minus(3.1, 0.1) == "3.1 ± 0.1"
    assert interval(1e-5, 2e-5, 4e-5) == "2.000 [1.000, 4.000] × 10⁻⁵"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium with a profile of its own."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no Chromium with chromedriver on this machine (Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update"):
        options.add_argument(f"--{flag}")
    options.add_argument("--disable-sync")
    options.add_argument("--disable-dev-shm-usage")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.add_argument("--window-size=1100,1400")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.mark.filterwarnings("ignore")
def test_page_in_a_browser(run, browser):
    """Every figure is drawn, formulas are laid out as two-dimensional mathematics, nothing overflows the page to the
    right, at a desktop's and at a phone's width, and the console is empty."""
    browser.get((run / "report.html").as_uri())
    widths = browser.execute_script("return [...document.images].map(i => i.naturalWidth)")
    assert len(widths) == len(CAPTIONS)
    assert all(width > 0 for width in widths), widths
    stacked = browser.execute_script(
        "return [...document.querySelectorAll('mfrac')].map(f => f.children[1].getBoundingClientRect().top"
        " - f.children[0].getBoundingClientRect().bottom)"
    )
    assert len(stacked) >= len(FORMULAS)
    assert all(gap > -2 for gap in stacked), f"fractions are not drawn as fractions: {stacked}"
    for width in (1100, 500):
        browser.set_window_size(width, 1400)
        over = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
        assert over <= 0, f"the page is {over} px wider than a window of {width} px"
    assert browser.get_log("browser") == []
