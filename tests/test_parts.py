"""--parts: every part of a minibatch is used, equally often, and their mean is the loss."""
import re
from functools import partial

import pytest
import torch

import gls
import train
from plumbing.for_tests import arrivals, loss_at, make, points_seen, train_on_noise


def test_each_part_sees_as_many_samples_and_both_signs_of_a_pair_if_it_can():
    for chunk in (None, 1, 3):
        by_pgpe = [torch.cat(calls) for calls in points_seen(
            partial(gls.pgpe, pairs=6, chunk=chunk), 3, 4)]
        by_rgs = [torch.cat(calls) for calls in points_seen(
            partial(gls.rgs, samples=12, antithetic=True, chunk=chunk), 3, 4)]
        for points in (*by_pgpe, *by_rgs):
            points = {tuple(p.tolist()) for p in points}
            assert len(points) == 4 and points == {tuple(-v for v in p) for p in points}
        for seen in (by_pgpe, by_rgs):
            assert len({tuple(p.tolist()) for p in torch.cat(seen)}) == 12
    (plus,), (minus,) = points_seen(partial(gls.rgs, samples=2, antithetic=True), 2, 4)
    assert torch.equal(plus, -minus) and len(plus) == 1


def test_equal_parts_give_what_one_loss_gives():
    theta, loss = torch.randn(5, dtype=torch.float64), lambda t: t.square().sum(1).sin()
    for estimator in (partial(gls.pgpe, pairs=6), partial(gls.rgs, samples=6),
                      partial(gls.smoothed_loss, samples=12)):
        whole, parts = (estimator(losses, theta, 0.2, generator=torch.Generator().manual_seed(3))
                        for losses in (loss, [loss] * 3))
        for a, b in zip(whole[:2], parts[:2]):                # that of sigma has other baselines
            assert torch.allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("pairs", [2, 8])
def test_the_levels_of_parts_are_no_noise_in_the_gradient_by_sigma(pairs):
    """A pair is compared with others of its part, if there are any, and unbiased with none."""
    theta, generator = torch.zeros(3, dtype=torch.float64), torch.Generator().manual_seed(0)
    bowl = lambda t: t.square().sum(1)                         # by sigma: 2 D sigma
    for level, spread in ((0.0, 5), (1000.0, 5 if pairs > 2 else 1e5)):
        parts = [bowl, lambda t: bowl(t) + level]
        found = torch.stack([gls.pgpe(parts, theta, 0.3, pairs, generator)[2]
                             for _ in range(3000)])
        assert found.std() < spread
        assert (found.mean() - 1.8).abs() < 4 * found.std() / 3000 ** 0.5


@pytest.mark.parametrize("relax, opt", [("mtl-ibp", "rgs"), ("sabr", "rgs"), ("deeppoly", "pgpe")])
def test_the_mean_over_parts_is_the_loss_of_the_minibatch(relax, opt, monkeypatch):
    """Also where they are not of one size; each is attacked by itself. Of fewer images than parts,
    all are one."""
    net, x, y = make("windows", batch=8)
    config = train.parse_config(f"--relax {relax} --opt {opt} --samples 12 --parts 3 --kappa 0.3 "
                                "--l1 0.01 --regularize 0".split())
    theta = torch.nn.utils.parameters_to_vector(net.parameters()).detach()[None]
    calls, certified = arrivals(monkeypatch, train, "attack"), ([], [])
    parts = train.losses_of_step(net, x, y, 0.05, config, certified[0])
    attacked = [len(given["x"]) for given, _ in calls]
    assert attacked == ([3, 3, 2] if relax in train.ATTACKING else []) and len(parts) == 3
    whole, = train.losses_of_step(net, x, y, 0.05, config | dict(parts=1), certified[1])
    each = torch.cat([loss(theta) for loss in parts])
    torch.testing.assert_close(each.mean(), whole(theta)[0])
    assert each.std() > 0.01 * each.mean()                                # so it could differ
    torch.testing.assert_close(torch.stack(certified[0]).mean(), certified[1][0])
    alone, = train.losses_of_step(net, x[:2], y[:2], 0.05, config)
    all_of_it, = train.losses_of_step(net, x[:2], y[:2], 0.05, config | dict(parts=1))
    assert torch.equal(alone(theta), all_of_it(theta))


def test_each_part_has_its_own_regularisers(monkeypatch):
    net, x, y = make("windows", batch=8)
    config = train.parse_config("--samples 4 --parts 4 --regularize 0.5 --relax box".split())
    theta = torch.nn.utils.parameters_to_vector(net.parameters()).detach()[None]
    parts = train.losses_of_step(net, x, y, 0.05, config)                 # in the ramp: eps is 0.1
    for i, loss in enumerate(parts):
        images = slice(2 * i, 2 * i + 2)
        assert loss(theta).item() == pytest.approx(
            loss_at(net, x[images], y[images], 0.05, "box", regularize=0.25))


@pytest.mark.parametrize("words", ["--opt rgs --samples 4 --parts 4", "--opt rgs --parts 2",
                                   "--opt pgpe --samples 8 --parts 4 --members 3"])
def test_parts_share_out_every_minibatch(tmp_path, monkeypatch, words):
    """20 images in steps of 8, 8 and 4: an epoch sees each once, whatever the number of parts."""
    calls = arrivals(monkeypatch, train, "robust_loss")
    train_on_noise(tmp_path, f"--epochs 1 {words}")
    seen = torch.cat([given["x"] for given, _ in calls]).flatten(1)
    assert len(seen) == len({tuple(x.tolist()) for x in seen}) == 20
    assert len(calls) == 3 * int(re.search(r"--parts (\d)", words)[1])


def test_rgs_has_parts_by_default_where_its_samples_can_use_them():
    for words, parts in (("", 2), ("--samples 6", 2), ("--samples 3 --no-antithetic", 1),
                         ("--samples 4 --parts 1", 1), ("--opt grad", 1), ("--opt pgpe", 1)):
        assert train.parse_config(words.split())["parts"] == parts


@pytest.mark.parametrize("words", ["--opt grad --parts 2", "--opt rgs --samples 4 --parts 3",
                                   "--opt pgpe --samples 12 --parts 4"])
def test_parts_that_cannot_be_used_equally_often_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        train.parse_config(words.split())
    err = capsys.readouterr().err
    assert "argument --parts" in err and err.count("\n") == 1
