"""PGD: where it starts, what it aims at, how it steps, and that it finds the worst point."""
import torch
import torch.nn as nn

import train
from relaxations import margin_lower_bounds


def test_attack_is_exact_on_an_affine_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    x = torch.rand(20, 1, 3, 4)
    y = net(x).argmax(1)
    points = train.attack(net, x, y, 0.15, steps=30)
    worst = train.forward_margin(net, points, y)
    exact = train.smallest(margin_lower_bounds(net.double(), x.double(), y, 0.15), y)
    torch.testing.assert_close(worst, exact, atol=1e-5, rtol=0)
    wide = x.double()                                          # float32 points, exactly in the ball
    assert ((points.double() - wide).abs() <= 0.15).all()
    assert points.min() >= 0 and points.max() <= 1


def test_each_step_of_the_attack_forgets_the_one_before():
    """Else the memory of all steps would be held until the last."""
    is_leaf, W, x = [], torch.randn(12, 4), torch.rand(3, 1, 3, 4, requires_grad=True)

    class Net(torch.nn.Module):
        def forward(self, z):
            is_leaf.append(z.is_leaf)
            return z.flatten(1) @ W

    train.attack(Net(), x, torch.tensor([0, 1, 2]), 0.1, steps=4, restarts=2)
    assert is_leaf == [True] * (2 * 5 + 1)


def test_each_restart_of_the_attack_starts_aims_and_steps_as_it_says():
    """Logit k is pixel k: the margin to class k falls by lowering pixel y and raising pixel k, and
    no other pixel moves. 4 steps of 0.25, 0.25, 0.1 and 0.02 eps, from within the ball."""
    seen, eps = [], 0.1
    class Identity(nn.Module):
        def forward(self, z):
            seen.append(z.detach().clone())
            return z
    x = torch.tensor([[0.5, 0.7, 0.4, 0.6], [0.2, 0.3, 0.4, 0.5]])
    y, ranking = torch.tensor([1, 3]), [[1, 3, 0, 2], [3, 2, 1, 0]]
    best = train.attack(Identity(), x, y, eps, steps=4, restarts=5)
    starts, points = [], torch.stack(seen[-25:]).view(5, 5, 2, 4)      # restart, step, image, pixel
    for r, path in enumerate(points):
        position = (path[0] - x) / eps
        starts.append(position[0])
        torch.testing.assert_close(position[0], position[1])           # the same for all images
        for i, classes in enumerate(ranking):
            target = classes[1 + (r - 1) % 3] if r else classes[1]
            way = torch.zeros(4)
            way[classes[0]], way[target] = -1, 1
            z = x[i] + eps * position[i]
            for k, step in enumerate((0.25, 0.25, 0.1, 0.02)):
                z = (z + step * eps * way).clamp(x[i] - eps, x[i] + eps)
                torch.testing.assert_close(path[k + 1, i], z)
    starts = torch.stack(starts)
    assert starts[0].abs().max() == 0 and (starts[1:].abs() <= 1 + 1e-6).all()
    assert starts[1:].std() > 0.3 and len(set(map(tuple, starts.tolist()))) == 5
    margins = points.gather(3, y.expand(5, 5, 2)[..., None]) - points
    lowest = train.smallest(margins, y).flatten(0, 1).amin(0)          # the last step's count too
    assert torch.equal(train.smallest(best.gather(1, y[:, None]) - best, y), lowest)
    only = train.attack(Identity(), x, y, eps, steps=1, restarts=1)
    torch.testing.assert_close(only[0], x[0] + 0.25 * eps * torch.tensor([0., -1., 0., 1.]))
