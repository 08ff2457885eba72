"""A linear program, exactly: what is left of a network that has no ReLU left to cut."""
import numpy as np
import torch
from torch.func import jacrev


def minimum_of_affine(f, low, high):
    """min f(x)[-1]  subject to  f(x)[:-1] >= 0 and low <= x <= high (N,), for an affine f, by
    linear_program: x and multipliers as there, but as tensors."""
    J, at_low = jacrev(f)(low), f(low)
    c, G = J[-1], J[:-1]
    h = G @ low - at_low[:-1]
    x, tries = linear_program(*(t.cpu().numpy() for t in (c, G, h, low, high)))
    return None if x is None else torch.from_numpy(x), [torch.from_numpy(t).to(low) for t in tries]


def linear_program(c, G, h, low, high):
    """min c.x  subject to  G x >= h and low <= x <= high, by the dual simplex method.

    Returns x (None if infeasible) and a list of multipliers beta >= 0 to try: at the last of them,
    min over low <= x <= high of c.x - beta.(G x - h) is the optimum, or, if infeasible, large.

    Each variable v, that is x or a slack w = G x - h >= 0, is either at one of its ends ("at", n of
    them) or basic: basic = T at + t. The start is dual feasible whatever c is, because x is bounded
    on both sides: every x at the end that c prefers.
    """
    (m, n), tiny = G.shape, 1e-9                           # of pixels; constraints are normalised
    size = np.abs(G).max(1, initial=0)
    size[size == 0] = 1
    G, h = G / size[:, None], h / size                     # multipliers are divided in the end
    lo = np.concatenate([low, np.zeros(m)])
    hi = np.concatenate([high, np.full(m, np.inf)])
    T, t = np.vstack([G, c]), np.append(-h, 0.0)           # the last row is the objective
    ends, basic = np.arange(n), n + np.arange(m)
    top = c < 0                                            # at the upper end?
    for _ in range(50 * (m + n)):
        at = np.where(top, hi[ends], lo[ends])
        v = T[:m] @ at + t[:m]
        outside = np.maximum(lo[basic] - v, v - hi[basic])
        r = outside.argmax() if m else 0
        if not m or outside[r] <= tiny:
            x, price = np.empty(n + m), np.zeros(n + m)
            x[ends], x[basic], price[ends] = at, v, T[m]
            return x[:n], [price[n:].clip(0) / size]
        up = 1 if v[r] < lo[basic[r]] else -1              # where basic variable r has to go
        helps = up * T[r] * np.where(top, -1, 1)           # what moving each from its end does
        cost = np.abs(T[m]) / np.maximum(helps, tiny)
        ratio = np.where(helps > tiny, cost, np.inf)
        j = ratio.argmin() if n else 0
        if not np.isfinite(ratio[j]):                      # nothing helps: row r is a proof
            proof = np.zeros(n + m)
            proof[ends], proof[basic[r]] = (-up * T[r]).clip(0), 1
            beta = proof[n:] / size * (np.abs(c).max() or 1)
            return None, [beta * 10.0 ** k for k in range(-2, 11)]
        pivot(T, t, r, j)
        ends[j], basic[r], top[j] = basic[r], ends[j], up < 0
    return None, []


def pivot(T, t, r, j):
    """Basic variable r and the j-th of those at their ends change places, in place."""
    row, constant = -T[r] / T[r, j], -t[r] / T[r, j]       # row r solved for the j-th
    row[j] = 1 / T[r, j]
    column = T[:, j].copy()
    T[:, j] = 0
    T += np.outer(column, row)
    t += column * constant
    T[r], t[r] = row, constant
