"""The lines of results/*.jsonl say what they belong to."""
import json
import sys
from pathlib import Path
from statistics import mean

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import experiments                                                                 # noqa: E402
import labels                                                                      # noqa: E402
import tables                                                                      # noqa: E402

NAMES = sorted(path.stem for path in experiments.RESULTS.glob("*.jsonl"))


@pytest.mark.parametrize("name", NAMES)
def test_lines_in_the_table_give_its_numbers(name):
    of_line, cells = labels.labels(name), experiments.read(name)
    assert all(set(cell) <= set(labels.FIELDS) for cell in cells)
    mine = [cell for cell in cells if of_line(cell["train"])["in_table"] and "failed" not in cell]
    if name.endswith("-tuning"):
        assert not mine
        return
    base = name.removesuffix("-again")
    for method, of_page in tables.table_cells(base + f"/{name}" * (base != name)).items():
        found = [cell for cell in mine if (cell["relax"], cell["opt"]) == method]
        ours, its = (mean(tables.percent(some, "certified")) for some in (found, of_page))
        assert ours == its


@pytest.mark.parametrize("name", NAMES)
def test_each_line_has_its_labels_written_into_it(name):
    """What pandas reads: labels.py, run again, would change nothing."""
    assert (experiments.RESULTS / f"{name}.jsonl").read_text().splitlines() == labels.labelled(name)


def test_the_lines_in_the_table_alone_give_the_number_of_the_page():
    """Read without any of our code, and without the lines of the sweeps, which make it another."""
    lines = map(json.loads, (experiments.RESULTS / "digits.jsonl").read_text().splitlines())
    cells = [cell for cell in lines if (cell["relax"], cell["opt"]) == ("box", "pgpe")]
    certified = [100 * cell["certified"] / cell["n"] for cell in cells if cell["in_table"]]
    page = (experiments.RESULTS / "README.md").read_text()
    assert len(cells) > len(certified) == 5
    assert "| box (IBP), PGPE | " in page and f"**{mean(certified):.1f} ± " in page


def test_results_name_the_commit_that_gave_them():
    """A clean one, so that they can be had again."""
    assert not [path for path in experiments.RESULTS.rglob("*.json*")
                if "-dirty" in path.read_text()]


def test_results_name_no_place_of_one_machine():
    for path in experiments.RESULTS.rglob("*.json*"):
        text = path.read_text()
        assert not any(word in text for word in ("--data-dir /", "/home/", "/root/", "/tmp/")), path
