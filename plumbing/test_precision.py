"""Bounds are those of full float32 under every switch, which stays as it was."""
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import relaxations
import train
from plumbing import precision

ROOT = Path(train.__file__).parent
PROBE = """
import torch
{before}
import train
from plumbing import precision
from relaxations import adaptive, margin_lower_bounds

def watching(l, u):                              # a slope rule that sees what the bounds run with
    seen.add(torch.backends.mkldnn.enabled)
    return adaptive(l, u)

torch.manual_seed(0)
net = train.build_network("cnn5", (3, 32, 32), 10)
x, y = torch.rand(2, 3, 32, 32), torch.arange(2)
exact = train.build_network("cnn5", (3, 32, 32), 10).double()
exact.load_state_dict(net.state_dict())
for switch in {after}:
    exec(switch)
    set_to, seen = precision.reduced(), set()
    low = margin_lower_bounds(net, x, y, 2 / 255, "crown-ibp", slope=watching)
    assert set_to == precision.reduced() and torch.backends.mkldnn.enabled
    true = margin_lower_bounds(exact, x.double(), y, 2 / 255, "crown-ibp")
    assert (low - true).abs().max() < 1e-5 * true.abs().max()
    print(set_to, *seen)
    exec(switch.split("=")[0] + "= 'none'" if "=" in switch else "")
"""


def probe(before="", after=("",), **environment):
    """What is said of each switch and whether oneDNN was on, in a process of its own."""
    code = PROBE.format(before=before, after=list(after))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout.splitlines()


def test_a_switch_changes_no_bound_and_stays_as_it_was():
    """Not every processor rounds where it may; so what the guard does is watched, too."""
    legacy = "torch.set_float32_matmul_precision"
    for level in ("high", "medium"):
        said, = probe(f"{legacy}('{level}')")
        assert said == "torch.backends.mkldnn.matmul.fp32_precision False"
    level, _ = probe(f"{legacy}('medium')", ["print(torch.get_float32_matmul_precision())"])
    assert level == "medium"                             # the import leaves it readable
    places = ["torch.backends.mkldnn.matmul", "torch.backends.mkldnn.conv", "torch.backends"]
    switches = [f"{place}.fp32_precision = 'tf32'" for place in places]
    assert probe(after=switches) == [f"{place}.fp32_precision False" for place in places]
    name = "ONEDNN_DEFAULT_FPMATH_MODE"
    assert probe(**{name: "BF16"}) == [f"{name} False"] and probe() == ["None True"]


def test_switches_of_a_gpu_count_there_only():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert precision.reduced("cuda") == "torch.backends.cuda.matmul.fp32_precision"
        assert precision.reduced("cpu") is None
    finally:
        matmul.fp32_precision = before
    assert precision.reduced("cuda") is None


def test_threads_share_the_guard(monkeypatch):
    """The first to leave does not switch oneDNN on for the others; the last restores it."""
    monkeypatch.setattr(precision, "reduced", lambda device: "a switch")
    seen, barriers = [], [threading.Barrier(2) for _ in range(2)]

    def work(leaves_first):
        with precision.full_precision(torch.zeros(1)):
            barriers[0].wait()
            if not leaves_first:
                barriers[1].wait()                       # the other one is out
                seen.append(torch.backends.mkldnn.enabled)
        if leaves_first:
            barriers[1].wait()

    threads = [threading.Thread(target=work, args=(first,)) for first in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [False] and torch.backends.mkldnn.enabled
    with precision.full_precision(torch.zeros(1).double()):
        assert torch.backends.mkldnn.enabled             # float64 needs no guard


def test_subdomains_are_guarded_too(monkeypatch):
    net = train.build_network("mlp", (1, 4, 4), 3)
    x, seen = torch.rand(1, 1, 4, 4), []
    network, box = relaxations.prepare(net, x, 0.1, "box", None)
    l = u = torch.zeros(1, 200)
    sub = relaxations.Subdomains(torch.eye(3)[:1], box, l - 1, u + 1, l, l, l)
    monkeypatch.setattr(precision, "reduced", lambda device: "a switch")
    bound = relaxations.lower_bound
    monkeypatch.setattr(relaxations, "lower_bound", lambda *args: (
        seen.append(torch.backends.mkldnn.enabled), bound(*args))[1])
    relaxations.subdomain_bounds(network, sub)
    assert seen == [False] and torch.backends.mkldnn.enabled


def test_the_self_check_would_see_rounded_products(monkeypatch):
    """Its own rounding stands for that of processors that make use of the switches."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import self_check
    monkeypatch.setattr(precision, "reduced", lambda device: "a switch")
    check = lambda: self_check.self_check(90, rounding=self_check.Rounding)[1]
    assert check() == []
    monkeypatch.setattr(precision, "reduced", lambda device: None)
    assert len(check()) > 9


def test_where_it_cannot_be_had_one_line_refuses(monkeypatch):
    monkeypatch.setattr(precision, "reduced", lambda device: "torch.set_float32_matmul_precision")
    with pytest.raises(ValueError, match="set_float32_matmul_precision lets float32"):
        with precision.full_precision(torch.zeros(1, device="meta")):
            pass
