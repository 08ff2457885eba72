"""The self-check of benchmarks/ finds errors that are planted."""
import re
import sys
from pathlib import Path

import certify
from plumbing.for_tests import command

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import self_check                                                                  # noqa: E402


def test_the_self_check_finds_planted_errors(monkeypatch, capsys):
    assert command(self_check.main, 200) == 0
    assert re.search(r"2\d\d checks, 0 contradictions", capsys.readouterr().out)
    sound = self_check.margin_lower_bounds
    monkeypatch.setattr(self_check, "margin_lower_bounds",
                        lambda *args, **options: sound(*args, **options) + 0.02)
    assert command(self_check.main, 200) != 0
    assert "contradiction" in capsys.readouterr().out
    monkeypatch.undo()
    bounds = self_check.preactivation_bounds
    monkeypatch.setattr(self_check, "preactivation_bounds", lambda *args, **options: [
        (l, u - 0.05 * (u - l)) for l, u in bounds(*args, **options)])
    assert len(self_check.self_check(200)[1]) > 3
    monkeypatch.undo()
    monkeypatch.setattr(self_check, "certify", lambda net, x, *args, **options: [
        certify.Verdict("certified", "box", 1.0, 0.0, index=i) for i in range(len(x))])
    assert any("box" in c for c in self_check.self_check(400)[1])
