"""What callers of gls rely on beside its formulas: noise, memory, processes, what is refused."""
import math
from functools import partial

import pytest
import torch

import gls
import train
from plumbing.for_tests import QUICK_RUN, points_seen
from plumbing.processes import members_at_once


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("D", [5, 16, 37])          # 16 numbers or more are drawn by other code
def test_the_noise_depends_neither_on_chunks_nor_on_processes(D, dtype, monkeypatch):
    """Bit by bit; of many processes, each evaluates other pairs, and together all."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: None)
    seen = lambda **k: {tuple(p.tolist()) for calls in points_seen(
        partial(gls.pgpe, pairs=6, **k), 2, D, dtype) for points in calls for p in points}
    whole = seen()
    assert len(whole) == 12
    assert all(seen(chunk=chunk) == whole for chunk in (1, 2, 3, 4, 6, 12))
    for chunk in (2, 4, None):
        shares = [seen(chunk=chunk, shard=(rank, 2)) for rank in range(2)]
        assert shares[0] | shares[1] == whole and len(shares[0]) + len(shares[1]) == 12


def test_pgpe_holds_the_noise_of_a_chunk_only():
    """At most 5.5 vectors beside theta and one perturbed copy: 110 MB for 5 million float32."""
    from torch.distributed._tools.mem_tracker import MemTracker    # private: not in every version
    theta, generator = torch.zeros(50_000), torch.Generator()
    with MemTracker() as tracker:
        gls.pgpe(lambda t: t.sum(1), theta, torch.tensor(0.1), 64, generator, chunk=2)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert theta.nbytes < peak <= (2 + 5.5) * theta.nbytes


@pytest.mark.parametrize("estimator", [
    lambda *a, **k: gls.pgpe(*a, 6, **k), lambda *a, **k: gls.rgs(*a, 6, **k),
    lambda *a, **k: gls.rgs(*a, 6, antithetic=True, **k),
    lambda *a, **k: gls.smoothed_loss(*a, 6, **k)])
def test_estimators_leave_theta_alone_and_do_not_depend_on_chunks(estimator):
    theta, sizes = torch.randn(5, dtype=torch.float64), []

    def loss(t):
        sizes[-1] = max(sizes[-1], len(t))
        return t.square().sum(1).sin()

    before, results = theta.clone(), []
    for chunk in (None, 1, 4):
        sizes.append(0)
        results.append(estimator(loss, theta, 0.2, generator=torch.Generator().manual_seed(3),
                                 chunk=chunk))
    assert torch.equal(theta, before) and not theta.requires_grad
    assert sizes[0] > 4 and sizes[1:] == [1, 4]                         # the most at once
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert a is b is None or torch.allclose(a, b, rtol=1e-12)


def test_members_run_at_once_change_rounding_only(tmp_path):
    runs = [tmp_path / members for members in ("auto", "1", "3")]
    for opt, run in ((opt, run) for opt in ("rgs", "pgpe") for run in runs):
        words = [] if run.name == "auto" else ["--members", run.name]
        train.main([*QUICK_RUN.split(), "--opt", opt, "--samples", "4", *words, "--out",
                    str(run / opt)])
    for opt in ("rgs", "pgpe"):
        (auto, config, _), *others = (train.load_run(run / opt) for run in runs)
        assert config["members"] > 1
        for other, _, _ in others:
            for a, b in zip(auto.parameters(), other.parameters()):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert members_at_once(auto, config | dict(batch_size=10 ** 4)) == 1
    assert members_at_once(auto, config | dict(batch_size=10 ** 4, device="cuda")) == 16
    assert members_at_once(auto, config | dict(parts=8, batch_size=64)) == 8 * 16


def test_estimators_touch_nobody_elses_gradient():
    other = torch.ones(5, requires_grad=True)
    loss = lambda t: (t * other).sum(1)
    gls.rgs(loss, torch.zeros(5), 0.1, 2, torch.Generator())
    with torch.no_grad():
        assert torch.equal(gls.gradient(loss, torch.zeros(5))[1], torch.ones(5))
    assert other.grad is None
    sigma = torch.ones(5, dtype=torch.float64, requires_grad=True)
    for estimator in (gls.pgpe, gls.rgs):
        result = estimator(loss, torch.zeros(5), sigma, 2, torch.Generator())
        assert all(t is None or t.dtype == torch.float32 and not t.requires_grad for t in result)


def test_a_loss_may_say_yes_or_no():
    theta, generator = torch.zeros(5), torch.Generator().manual_seed(0)
    value, grad, _ = gls.pgpe(lambda t: t[:, 0] > 0, theta, 0.1, 4000, generator)
    assert value == 0.5 and (grad[0] - 1 / (0.1 * math.sqrt(2 * math.pi))).abs() < 0.3
    assert not gls.rgs(lambda t: t[:, 0] > 0, theta, 0.1, 4, generator)[1].any()


@pytest.mark.parametrize("call, message", [
    (lambda f, t, g: gls.rgs(f, t, 0.1, 2, g, chunk=-1), "chunk=-1"),
    (lambda f, t, g: gls.pgpe(f, t, 0.1, 2.5, g), "pairs=2.5"),
    (lambda f, t, g: gls.gradient(f, t[None]), "one vector"),
    (lambda f, t, g: gls.pgpe(f, t, 0.1, 0, g), "pairs=0"),
    (lambda f, t, g: gls.rgs(f, t, 0.1, 0, g), "samples=0"),
    (lambda f, t, g: gls.pgpe(f, t, 0.0, 2, g), "sigma"),
    (lambda f, t, g: gls.rgs(f, t, -1.0, 2, g), "sigma"),
    (lambda f, t, g: gls.rgs(f, t, 0.1, 3, g, antithetic=True), "samples=3 has to be even"),
    (lambda f, t, g: gls.pgpe(lambda t: t.sum(), t, 0.1, 2, g), "has to map (P, D) to (P,)"),
    (lambda f, t, g: gls.pgpe(f, t[None], 0.1, 2, g), "one vector"),
    (lambda f, t, g: gls.smoothed_loss(f, t, 0.1, 3, g), "samples=3 has to be even"),
    (lambda f, t, g: gls.rgs([f] * 2, t, 0.1, 3, g), "samples=3 has to be a multiple of the 2"),
    (lambda f, t, g: gls.pgpe([f] * 4, t, 0.1, 6, g), "pairs=6 has to be a multiple of the 4"),
    (lambda f, t, g: gls.smoothed_loss([f] * 2, t, 0.1, 2, g), "pairs=1 has to be a multiple"),
    (lambda f, t, g: gls.pgpe([], t, 0.1, 6, g), "a multiple of the 0 losses"),
    (torch.inference_mode()(lambda f, t, g: gls.rgs(f, t, 0.1, 2, g)), "has no gradients"),
    (torch.inference_mode()(lambda f, t, g: gls.gradient(f, t)), "has no gradients"),
])
def test_estimators_refuse_nonsense(call, message):
    with pytest.raises(ValueError) as error:
        call(lambda t: t.sum(1), torch.zeros(3), torch.Generator())
    assert message in str(error.value)
