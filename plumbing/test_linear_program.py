"""Linear programs against their vertices and their duals."""
import numpy as np
import pytest
import torch

from plumbing.linear_program import linear_program, minimum_of_affine


@pytest.mark.parametrize("unit", [1.0, 1e-9, 1e9, 0.0])
def test_linear_programs_by_brute_force(unit):
    """Random ones in the plane: the minimum is at a vertex; and the duality gap is zero."""
    rng, infeasible = np.random.default_rng(0), 0
    for _ in range(300):
        m = int(rng.integers(0, 6))
        c, G, h = unit * rng.normal(size=2), rng.normal(size=(m, 2)), rng.normal(size=m) * 0.7
        low, high = -rng.random(2), rng.random(2)
        lines = [(np.eye(2)[i], t[i]) for i in (0, 1) for t in (low, high)] + list(zip(G, h))
        vertices = [np.linalg.solve([a, b], [s, t]) for k, (a, s) in enumerate(lines)
                    for b, t in lines[:k] if abs(np.linalg.det([a, b])) > 1e-9]
        inside = [v for v in vertices if (G @ v >= h - 1e-9).all() and (v >= low - 1e-9).all()
                  and (v <= high + 1e-9).all()]
        x, tries = linear_program(c, G, h, low, high)
        slope = c - tries[-1] @ G
        dual = np.minimum(slope * low, slope * high).sum() + tries[-1] @ h
        assert all((beta >= 0).all() for beta in tries)
        if inside:
            best = min(c @ v for v in inside)
            assert [c @ x, dual] == pytest.approx([best, best], abs=1e-12 * unit)
            assert (G @ x >= h - 1e-7).all()
            assert (x >= low - 1e-9).all() and (x <= high + 1e-9).all()
        else:
            infeasible += 1
            assert x is None and dual > 1e3 * (unit or 1)
    assert 20 < infeasible < 280


def test_the_minimum_of_an_affine_function():
    """f(x)[-1] where f(x)[:-1] >= 0: the same program, written as a function."""
    rng = np.random.default_rng(0)
    A, b = rng.normal(size=(4, 2)), rng.random(4) / 10                  # 0 is inside
    f = lambda x: torch.from_numpy(A) @ x + torch.from_numpy(b)
    low, high = torch.tensor([-1.0, -2.0]).double(), torch.tensor([2.0, 1.0]).double()
    x, tries = minimum_of_affine(f, low, high)
    want, betas = linear_program(A[-1], A[:-1], -b[:-1], low.numpy(), high.numpy())
    torch.testing.assert_close(x, torch.from_numpy(want))
    torch.testing.assert_close(tries[-1], torch.from_numpy(betas[-1]))
    assert (f(x)[:-1] >= -1e-9).all() and (f(x)[:-1] < 1e-9).any()      # at an edge of the first
