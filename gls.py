"""Gaussian loss smoothing: follow the gradient of an averaged loss instead of the loss.

    L_sigma(theta) = E[L(theta + sigma * eps)],   eps ~ N(0, I)                (the smoothed loss)

L may jump, have kinks or be flat: L_sigma is infinitely differentiable. Its gradient is estimated
from samples, in one of two ways, both here; `gradient` is the unsmoothed reference.

    PGPE  values only:   mean of  (L(theta + d) - L(theta - d)) / 2 * eps / sigma,  d = sigma eps
    RGS   gradients:     mean of  grad L(theta + d)

They differ where it matters. PGPE is an unbiased estimate of grad L_sigma for every bounded L,
whether or not L has a gradient. RGS estimates E[grad L(theta + d)], which is grad L_sigma only if
L is continuous: a gradient does not see a jump. Take the step function L(theta) = 1 if theta > 0
else 0. Then L_sigma(theta) = Phi(theta / sigma) with the slope 1 / (sigma sqrt(2 pi)) at 0. PGPE
estimates that slope; RGS averages gradients that are all 0. In return RGS learns D numbers from
each evaluation where PGPE learns one, so its variance, and the samples it needs, are far smaller.

    Sehnke et al. 2010, "Parameter-exploring policy gradients" (PGPE; symmetric sampling)
    Balauca et al. 2025, "Gaussian loss smoothing enables certified training with tight convex
    relaxations" (both, for certified training; RGS is their randomised gradient smoothing)

Nothing here knows of networks or bounds. A loss maps parameter vectors (P, D) to losses (P,), one
per vector and each depending on its own vector alone. theta (D,) is read, never modified: there
is nothing to restore after a step. All randomness comes from the torch.Generator passed in.

Many processes. shard=(rank, world) tells an estimator that world processes call it together (in
torch.distributed's default group), each with the same arguments and the same generator. Each draws
all the noise, evaluates its share of it, and they add up what they found: PGPE 2n losses, the
gradient itself never travels; RGS a gradient.

PGPE in eight lines:

    theta, sigma = torch.zeros(5), 0.1
    generator = torch.Generator().manual_seed(0)
    loss = lambda thetas: (thetas - 1).abs().mul(10).ceil().sum(1)      # a staircase: no gradient
    optimizer = torch.optim.Adam([theta], lr=0.05)
    for step in range(200):
        value, theta.grad, _ = gls.pgpe(loss, theta, sigma, pairs=32, generator=generator)
        optimizer.step()
    print(theta)                                                  # near 1
"""
import torch
import torch.distributed as dist


def gradient(loss, theta):
    """Plain gradient: (L(theta), grad L(theta), None)."""
    _check(theta)
    values, grads = _gradients(loss, theta.detach()[None])         # (1,), (1, D)
    return values[0], grads[0], None


def pgpe(loss, theta, sigma, pairs, generator, chunk=None, adapt=True, shard=(0, 1)):
    """Zeroth-order estimate of the gradient of the smoothed loss, from antithetic pairs.

    Returns (estimate of L_sigma(theta), gradient (D,), gradient with respect to sigma).

    With f+-_i = L(theta +- sigma * eps_i), i = 1..n, and m_i = (f+_i + f-_i) / 2:
        d/dtheta = 1/n sum_i (f+_i - f-_i)/2 * eps_i / sigma
        d/dsigma = 1/n sum_i (m_i - b_i) * (eps_i^2 - 1) / sigma,   b_i = mean of the other m_j
    (Sehnke et al. 2010, there multiplied by sigma^2 and with one b for all i.) Both are unbiased:
    the baseline b_i leaves its own pair out, so it is independent of eps_i. With one pair b = 0.

    theta: (D,).  sigma: a number or () tensor, shared, or (D,), per parameter; all positive. The
    sigma gradient has its shape (summed over the parameters that share it), or is None with
    adapt=False.  pairs: n >= 1, each costs two losses.  chunk: the most parameter vectors
    evaluated at once (None: all 2n). It bounds what the evaluations hold, but not the noise (n, D),
    which is drawn and kept whole, and it does not change the result.
    shard: see the top of this file; whole chunks go to a process (with chunk=None, all to the
    first), so that the result is that of one process, bit by bit.
    """
    theta, sigma = _check(theta, sigma, chunk, pairs=pairs)
    eps = _noise(pairs, theta, generator)                         # (n, D)
    plus, minus = _antithetic_losses(loss, theta, sigma, eps, chunk, shard)
    middle = (plus + minus) / 2
    grad = (plus - minus) / 2 @ eps / pairs / sigma
    if not adapt:
        return middle.mean(), grad, None
    # m_i - b_i = n/(n-1) (m_i - mean), since b_i leaves i out
    surplus = (middle - middle.mean()) * pairs / (pairs - 1) if pairs > 1 else middle
    per_parameter = (surplus @ eps.square() - surplus.sum()) / pairs   # times 1/sigma, (D,)
    sigma_grad = (per_parameter if sigma.dim() else per_parameter.sum()) / sigma
    return middle.mean(), grad, sigma_grad


def rgs(loss, theta, sigma, samples, generator, antithetic=False, chunk=None, shard=(0, 1)):
    """First-order estimate: (mean loss, mean gradient (D,), None) at randomly perturbed weights.

        1/n sum_i grad L(theta + sigma * eps_i)

    An unbiased estimate of E[grad L(theta + sigma * eps)]. That is the gradient of the smoothed
    loss if L is continuous wherever the noise reaches, not only at theta; what L's jumps contribute
    is missing (see the top of this file).
    antithetic: use eps and -eps; samples is then even. Other arguments as in pgpe. With shard, each
    process takes as many samples, and the result is that of one up to the rounding of sums.
    """
    theta, sigma = _check(theta, sigma, chunk, samples=samples)
    if antithetic and samples % 2:
        raise ValueError(f"samples={samples} has to be even with antithetic=True")
    eps = _noise(samples // 2 if antithetic else samples, theta, generator)
    eps = torch.cat([eps, -eps]) if antithetic else eps           # (n, D)
    sums = theta.new_zeros(1 + len(theta))                        # of the losses, of the gradients
    each = -(-samples // shard[1])
    for i in _slices(samples, min(chunk or each, each), shard):
        values, grads = _gradients(loss, theta + sigma * eps[i])
        sums += torch.cat([values.sum()[None], grads.sum(0)])
    value, grad = (_summed(sums, shard) / samples).split([1, len(theta)])
    return value[0], grad, None


def smoothed_loss(loss, theta, sigma, samples, generator, chunk=None):
    """Monte Carlo estimate of L_sigma(theta) and its standard error, for plots and tests.

    samples: an even number; antithetic pairs. The error is that of the mean of the pair means,
    infinite for a single pair.
    """
    theta, sigma = _check(theta, sigma, chunk, samples=samples)
    if samples % 2:
        raise ValueError(f"samples={samples} has to be even: they are used in antithetic pairs")
    eps = _noise(samples // 2, theta, generator)
    middle = _antithetic_losses(loss, theta, sigma, eps, chunk).mean(0)
    error = middle.std() / len(middle) ** 0.5 if len(middle) > 1 else middle.new_tensor(torch.inf)
    return middle.mean(), error


def _noise(rows, theta, generator):
    return torch.randn(rows, len(theta), generator=generator, dtype=theta.dtype,
                       device=theta.device)


def _slices(total, size, shard=(0, 1)):
    """0..total in slices of size; of these, the share of one process: every world-th."""
    rank, world = shard
    return [slice(i, i + size) for i in range(0, total, size)][rank::world]


def _summed(t, shard):
    """t, summed over the processes, in place."""
    if shard[1] > 1:
        dist.all_reduce(t)
    return t


def _losses(loss, points):
    values = loss(points)
    if values.shape != points.shape[:1]:
        raise ValueError(f"loss has to map (P, D) to (P,); it mapped {tuple(points.shape)} to "
                         f"{tuple(values.shape)}")
    return values


def _antithetic_losses(loss, theta, sigma, eps, chunk, shard=(0, 1)):
    """L(theta + sigma eps_i) and L(theta - sigma eps_i), (2, n)."""
    n = len(eps)
    values, number = theta.new_zeros(2 * n), torch.arange(2 * n, device=theta.device)
    with torch.no_grad():
        for i in _slices(2 * n, chunk or 2 * n, shard):
            d = sigma * eps[number[i] % n]
            values[i] = _losses(loss, theta + torch.where(number[i, None] < n, d, -d))
    return _summed(values, shard).view(2, n)               # what others evaluated was 0 here


def _gradients(loss, points):
    """Losses (n,) and their gradients (n, D), zero where the loss does not depend on the points."""
    points = points.requires_grad_()
    with torch.enable_grad():
        values = _losses(loss, points)
        if not values.requires_grad:                              # a step function, say
            return values, torch.zeros_like(points)
        grads, = torch.autograd.grad(values.sum(), points, allow_unused=True,
                                     materialize_grads=True)
    return values.detach(), grads


def _check(theta, sigma=1.0, chunk=None, **counts):
    """theta and sigma as tensors of one dtype, apart from any graph; ValueError for nonsense."""
    if theta.dim() != 1:
        raise ValueError(f"theta has to be one vector (D,), not {tuple(theta.shape)}")
    for name, n in {**counts, "chunk": chunk or 1}.items():
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"{name}={n} has to be a whole number, at least 1")
    sigma = torch.as_tensor(sigma, dtype=theta.dtype, device=theta.device).detach()
    if sigma.shape not in ((), theta.shape) or not ((sigma > 0) & sigma.isfinite()).all():
        raise ValueError(f"sigma has to be positive and finite, a number or a tensor like theta; "
                         f"got {sigma.tolist() if sigma.dim() == 0 else tuple(sigma.shape)}")
    return theta.detach(), sigma
