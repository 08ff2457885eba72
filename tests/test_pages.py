"""The pages and examples/one_page.py say what the code does."""
import inspect
import re
from pathlib import Path

import pytest
import torch

import certify
import gls
import relaxations
import train
from plumbing.runs import LOG
from relaxations import margin_lower_bounds


def test_defaults_of_the_loss_are_those_of_the_settings():
    given = inspect.signature(train.robust_loss).parameters
    for name in ("loss", "slope", "beta", "alpha", "lam", "split", "expand", "slope_steps"):
        assert given[name].default == train.SETTINGS[name].default, name


ROOT = Path(train.__file__).parent
PAGES = {page: (ROOT / page).read_text() for page in (
    "README.md", "docs/runs.md", "docs/networks.md", "docs/derivations.md", "faster/README.md",
    "results/README.md", "benchmarks/README.md", "data/README.md")}


def test_pages_have_the_tables_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "figures")
    import tables
    pages = [page.read_text() for page in tables.PAGES]
    assert [tables.filled(page) for page in pages] == pages
    assert all("<!-- end -->" in page for page in pages)
    # 5 and 5 runs, all of one above all of the other: 2 of 252 ways to deal them are as extreme
    assert tables.permutation_test([6., 7, 8, 9, 10], [1., 2, 3, 4, 5]) == pytest.approx(2 / 252)
    assert tables.permutation_test([1., 2], [1., 2]) == 1


def test_the_page_on_runs_explains_every_column_of_the_log():
    explained = re.search(r"<!-- log .*?<!-- end -->", PAGES["docs/runs.md"], re.S)[0]
    assert re.findall(r"^\| `(\w+)` \|", explained, re.M) == list(LOG)


def anchors(page):
    """What GitHub makes of the headings: lower case, no punctuation, - for a blank."""
    prose = re.sub(r"^```.*?^```", "", page, flags=re.S | re.M)
    titles = re.findall(r"^#+ (.*)", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_of_the_pages_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("page", PAGES)
def test_what_the_pages_name_exists(page):
    modules = dict(train=train, gls=gls, relaxations=relaxations, certify=certify)
    for module, name in re.findall(r"`(train|gls|relaxations|certify)\.(\w+)", PAGES[page]):
        assert name == "py" or hasattr(modules[module], name), f"{module}.{name}"
    files = [*ROOT.glob("test_*.py"), *ROOT.glob("*/test_*.py")]
    tests = "".join(file.read_text() for file in files)
    for name in re.findall(r"`(test_\w+)`", PAGES[page]):
        assert f"def {name}(" in tests, name
    for file in re.findall(r"(?:python3?|pytest) ((?:\w+/)*\w+\.py)", PAGES[page]):
        assert (ROOT / file).exists(), file


def test_one_page_ends_with_the_weights_of_train(tmp_path, monkeypatch):
    """examples/one_page.py shares the images with train.py, and no line."""
    page = (ROOT / "examples" / "one_page.py").read_text()
    assert not re.search(r"import.*\b(train|gls|relaxations|certify)\b", page)
    monkeypatch.syspath_prepend(ROOT / "examples")
    import one_page
    data = train.load_dataset("digits")
    x, y = data.x_train[:300].flatten(1), data.y_train[:300]
    net = one_page.train(x, y, epochs=2, ramp=2, clip=0.3)         # so that it clips now and then
    train.main(["--net", "mlp", "--init", "default", "--lr-decay", "1", "--regularize", "0",
                "--no-skip-stable", "--epochs", "2", "--ramp", "2", "--clip", "0.3",
                "--subset", "300", "--test-subset", "20", "--out", str(tmp_path / "run")])
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["state"].values()
    for one, other in zip(net.parameters(), saved, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
    assert [t.item() for t in one_page.relu_lines(torch.zeros(1), torch.zeros(1))] == [1, 0, 0]
    x, y = data.x_test[:20], data.y_test[:20]                          # and it bounds likewise
    theirs = train.load_run(tmp_path / "run")[0]
    torch.testing.assert_close(one_page.margins(net, x.flatten(1), y, 0.1),
                               margin_lower_bounds(theirs, x, y, 0.1), rtol=1e-4, atol=1e-4)
