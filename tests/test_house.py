"""The size of files and functions, and what the heart of relaxations.py rests on."""
import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

import pytest

import relaxations
import train
from plumbing.for_tests import QUICK, command


def test_the_heart_names_nothing_from_below_it_and_has_150_lines():
    source = Path(relaxations.__file__).read_text()
    marks = [m.start() for m in re.finditer("^# =====", source, re.M)]
    heart, below = source[marks[0]:marks[1]], source[marks[1]:]
    defined = re.findall(r"^(?:def |class )(\w+)", below, re.M)
    defined += re.findall(r"^(\w+) =", below, re.M)
    names = {node.id for node in ast.walk(ast.parse(heart)) if isinstance(node, ast.Name)}
    assert not names & set(defined)
    assert "lower_bound" in heart and len(heart.strip().splitlines()) <= 150
    assert source[marks[3]:].startswith("# =") and "the same numbers, faster" in source[marks[3]:]


HOUSE = Path(__file__).resolve().parents[1]
MOST_LINES = {"relaxations.py": 700, "train.py": 650, "certify.py": 600, "gls.py": 200,
              "test_gls.py": 1500, "README.md": 150}


BEHIND = [f"faster/{path.name}" for path in (HOUSE / "faster").glob("*.py")]


@pytest.mark.parametrize("name", [*MOST_LINES, *BEHIND])
def test_files_and_functions_keep_to_their_size(name):
    text = (HOUSE / name).read_text()
    lines = len(text.splitlines())
    assert lines <= MOST_LINES.get(name, 250)
    tree = ast.parse(text if name.endswith(".py") else "")
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        lines = function.end_lineno - function.lineno + 1
        assert lines <= 50, function.name
        arguments = len(function.args.posonlyargs + function.args.args)
        assert arguments <= 8, function.name


def tokens_of_lines(name):
    """{line: names, numbers, strings and signs on it}, but for docstrings."""
    text, counts, inside = (HOUSE / name).read_text(encoding="utf-8"), Counter(), 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        inside -= kind == "FSTRING_END"                    # one string, from Python 3.12 on, too
        if kind in ("NAME", "NUMBER", "STRING", "OP", "FSTRING_START") and not inside:
            counts[token.start[0]] += 1
        inside += kind == "FSTRING_START"
    for node in ast.walk(ast.parse(text)):
        described = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if described and ast.get_docstring(node):
            words = node.body[0]
            for line in range(words.lineno, words.end_lineno + 1):
                del counts[line]
    return counts


def test_no_line_has_more_than_100_characters():
    long = [f"{path.relative_to(HOUSE)}:{number}"
            for path in (*HOUSE.glob("*.py"), *HOUSE.glob("*/*.py"))
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if len(line) > 100]
    assert not long, long


MOST_TOKENS = {"relaxations.py": 12, "train.py": 12, "certify.py": 12, "gls.py": 13}


def test_lines_are_light():
    """On average, and more than 30 tokens on at most 12 lines of all four modules."""
    lines = {name: tokens_of_lines(name) for name in MOST_TOKENS}
    for name, counts in lines.items():
        assert counts.total() <= MOST_TOKENS[name] * len(counts), name
    dense = [f"{name}:{line}" for name, counts in lines.items()
             for line, count in counts.items() if count > 30]
    assert len(dense) <= 12, dense


def test_what_is_behind_imports_nothing_that_stands_on_it():
    """plumbing/ knows no method, faster/ only the bounds; relaxations.py needs no faster/."""
    above = {"plumbing": ("train", "certify", "relaxations", "faster", "gls"),
             "faster": ("train", "certify", "gls")}
    for folder, names in above.items():
        for path in (HOUSE / folder).glob("*.py"):
            if not path.name.startswith(("test_", "for_tests", "__init__")):
                found = set()
                for node in ast.walk(ast.parse(path.read_text())):
                    if isinstance(node, ast.ImportFrom):
                        found.add(node.module.split(".")[0])
                    elif isinstance(node, ast.Import):
                        found |= {each.name.split(".")[0] for each in node.names}
                assert found and not found & set(names), path
    top = ast.parse((HOUSE / "relaxations.py").read_text()).body
    assert not [node for node in top if isinstance(node, ast.ImportFrom)
                and node.module.startswith("faster")]


def test_one_step_runs_few_lines_of_the_heart(tmp_path, monkeypatch):
    """The second step of training by CROWN-IBP, in the ramp, with the fast path switched off."""
    take_step, lines, steps = train.take_step, set(), []

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if HOUSE not in path.parents or path == Path(__file__):
            return None                                # no event for the lines of this function
        if event == "line":
            lines.add((path.name, frame.f_lineno))
        return note

    def step(*args, **options):
        steps.append(len(lines))
        before = sys.gettrace()
        sys.settrace(note if len(steps) == 2 else before)
        try:
            return take_step(*args, **options)
        finally:
            sys.settrace(before)

    monkeypatch.setattr(relaxations, "FAST", False)
    monkeypatch.setattr(train, "take_step", step)
    assert command(train.main, "--net", "mlp", "--opt", "grad", "--relax", "crown-ibp",
                   "--out", tmp_path / "run", *QUICK, "--ramp", 1) == 0
    assert len(steps) == 3
    method = [name for name, _ in lines if name in ("relaxations.py", "train.py", "gls.py")]
    assert (len(method) <= 205, len(lines) <= 300) == (True, True), (len(method), len(lines))


def test_the_fast_path_is_found_wherever_the_process_has_gone():
    """From a command line or a notebook, the folder of the modules is known as "" alone."""
    words = ("import os, torch, relaxations; os.chdir('/'); net = torch.nn.Sequential("
             "torch.nn.Flatten(), torch.nn.Linear(4, 3)); "
             "relaxations.margin_lower_bounds(net, torch.rand(1, 1, 2, 2), [0], 0.1)")
    subprocess.run([sys.executable, "-c", words], check=True, cwd=HOUSE)
