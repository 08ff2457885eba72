"""Gaussian loss smoothing: follow the gradient of an averaged loss instead of the loss.

    L_sigma(theta) = E[L(theta + sigma * eps)],   eps ~ N(0, I)                (the smoothed loss)

L may jump, have kinks or be flat: L_sigma is smooth (if L is bounded, say). Its gradient is
estimated from samples, in one of two ways, both here; `gradient` is the unsmoothed reference.

    PGPE  values only:   mean of  (L(theta + d) - L(theta - d)) / 2 * eps / sigma,  d = sigma eps
    RGS   gradients:     mean of  grad L(theta + d)

They differ where it matters. PGPE is unbiased for grad L_sigma of every bounded L. RGS estimates
E[grad L(theta + d)], which is grad L_sigma if L is continuous and piecewise smooth: a gradient does
not see a jump. Take the step L(theta) = 1 if theta > 0 else 0: L_sigma(theta) = Phi(theta / sigma),
its slope at 0 is 1 / (sigma sqrt(2 pi)). PGPE estimates that; RGS averages gradients that are all
0. In return RGS learns D numbers from each evaluation, PGPE one, so RGS needs far fewer samples.

    Sehnke et al. 2010, "Parameter-exploring policy gradients" (PGPE; symmetric sampling)
    Balauca et al. 2025, "Gaussian loss smoothing enables certified training with tight convex
    relaxations" (both, for certified training; RGS is their randomised gradient smoothing)

A loss maps parameter vectors (P, D) to losses (P,), each depending on its own vector alone. theta
(D,) is read, never modified. All randomness comes from the torch.Generator passed in.

Parts. A loss that averages over data, L = (L_1 + ... + L_m) / m, may be passed as the sequence of
the L_j: sample or pair i then sees part i mod m alone, at an m-th of the price. Their number n is a
multiple of m, so each part is seen n/m times, and the mean stays. The variance of independent
samples is 1/n times the mean over the parts of that of one sample (docs/derivations.md).

Many processes. With shard=(rank, world), the processes of torch.distributed's default group make
the same call, with equal generators; each evaluates its share. PGPE adds up losses, RGS gradients.

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


def gradient(loss, theta):
    """Plain gradient: (L(theta), grad L(theta), None)."""
    _check(loss, theta)
    values, grads = _gradients(loss, theta.detach()[None])         # (1,), (1, D)
    return values[0], grads[0], None


def pgpe(loss, theta, sigma, pairs, generator, chunk=None, adapt=True, shard=(0, 1)):
    """Zeroth-order: (estimate of L_sigma(theta), of its gradient (D,), of its gradient by sigma).

    With f+-_i = L(theta +- sigma * eps_i), i = 1..n, and v_i = (f+_i + f-_i) / 2:
        d/dtheta = 1/n sum_i (f+_i - f-_i)/2 * eps_i / sigma
        d/dsigma = 1/n sum_i (v_i - b_i) * (eps_i^2 - 1) / sigma,   b_i = mean of the other v_j
    (Sehnke et al. 2010: times sigma^2, with one b for all i.) Both are unbiased: b_i, of pairs of
    the same part if it has others, leaves out its own, and with it eps_i. With one pair b = 0.

    loss: one, or a sequence of parts; both signs of a pair see the same.  theta: (D,).  sigma: a
    number or () tensor, shared, or (D,), per parameter; all positive. The sigma gradient has its
    shape (summed over the parameters that share it), or is None with adapt=False.  pairs: n >= 1,
    each costs two losses.  chunk: the most parameter vectors at once (None: all of a part), in
    whole pairs; no more is held, and rounding alone depends on it. Its price: noise is drawn twice.
    shard: whole chunks (with None, parts) go to a process; the result is, bit by bit, that of one.
    """
    losses, theta, sigma = _check(loss, theta, sigma, chunk, pairs=pairs)
    start = generator.get_state()
    turns, values = _antithetic_losses(losses, theta, sigma, pairs, generator, chunk, shard)
    middle, difference = values.mean(0), (values[0] - values[1]) / 2
    columns = middle.view(-1, len(losses) if pairs > len(losses) else 1)     # (n, parts or 1)
    n = len(columns)
    # v_i - b_i = n/(n-1) (v_i - mean), since b_i leaves i out
    surplus = (columns - columns.mean(0)).flatten() * n / (n - 1) if n > 1 else middle
    sums = theta.new_zeros(2, len(theta))
    generator.set_state(start)                                    # the same noise again, (k, D)
    for _, i in turns:
        eps = _noise(len(i), theta, generator)
        sums[0] += difference[i] @ eps
        sums[1] += surplus[i] @ eps.square_().sub_(1) if adapt else 0
    grad, slopes = sums.div_(pairs * sigma)
    slopes = slopes if sigma.dim() else slopes.sum()
    return middle.mean(), grad, slopes if adapt else None


def rgs(loss, theta, sigma, samples, generator, antithetic=False, chunk=None, shard=(0, 1)):
    """First-order estimate: (mean loss, mean gradient (D,), None) at randomly perturbed weights.

        1/n sum_i grad L(theta + sigma * eps_i)
    Unbiased for E[grad L(theta + sigma * eps)]: grad L_sigma, but for jumps that the noise reaches.
    antithetic: use eps and -eps; samples is then even. Both signs see the same part if samples is a
    multiple of 2 m. Two samples of two parts, + on one and - on the other, cost one gradient, as
    unbiased: each sign is N(0, I) by itself. Other arguments as in pgpe; the noise is held whole.
    With shard, each process takes about as many samples, the result that of one but for rounding.
    """
    losses, theta, sigma = _check(loss, theta, sigma, chunk, antithetic, samples=samples)
    rows = samples // 2 if antithetic else samples
    eps = _noise(rows, theta, generator)
    eps = torch.cat([eps, -eps]) if antithetic else eps           # (n, D)
    sums = theta.new_zeros(1 + len(theta))                        # of the losses, of the gradients
    rank, world = shard
    each = -(-samples // world)
    for loss, rows in _turns(losses, eps, min(chunk or each, each))[rank::world]:
        values, grads = _gradients(loss, theta + sigma * rows)
        sums += torch.cat([values.sum()[None], grads.sum(0)])
    if world > 1:
        torch.distributed.all_reduce(sums)
    mean = sums / samples
    return mean[0], mean[1:], None


def smoothed_loss(loss, theta, sigma, samples, generator, chunk=None):
    """Monte Carlo estimate of L_sigma(theta) and its standard error (too large for parts, infinite
    for one pair) from samples, an even number, in antithetic pairs: for plots and tests."""
    pairs = samples // 2
    losses, theta, sigma = _check(loss, theta, sigma, chunk, True, samples=samples, pairs=pairs)
    middle = _antithetic_losses(losses, theta, sigma, pairs, generator, chunk)[1].mean(0)
    error = middle.std() / pairs ** 0.5 if pairs > 1 else middle.new_tensor(torch.inf)
    return middle.mean(), error


def relative_error(estimate, runs=8):
    """Standard error of a gradient estimate over the norm of its mean, a () tensor, from runs >= 2
    of it. estimate: lambda: gls.rgs(...), say. Infinite where the noise hides the mean."""
    grads = torch.stack([estimate()[1] for _ in range(runs)])     # (runs, D)
    variance = grads.var(0).sum()
    square = grads.mean(0).square().sum() - variance / runs
    return (variance / square.clamp(min=0)).sqrt()


def _noise(rows, theta, generator):
    """(rows, D), drawn row by row: torch's numbers depend on how many are drawn at once."""
    eps = theta.new_empty(rows, len(theta))
    for row in eps:
        row.normal_(generator=generator)
    return eps


def _turns(losses, rows, size):
    """[(loss, at most size of the rows that see it), ...]: row i sees loss i mod m."""
    return [(loss, some) for j, loss in enumerate(losses)
            for some in rows[j::len(losses)].split(size)]


def _losses(loss, points):
    values = loss(points)
    if values.shape != points.shape[:1]:
        raise ValueError(f"loss has to map (P, D) to (P,), not {points.shape} to {values.shape}")
    return values.to(points)


@torch.no_grad()
def _antithetic_losses(losses, theta, sigma, n, generator, chunk, shard=(0, 1)):
    """The turns, and L(theta + sigma eps_i) and L(theta - sigma eps_i), (2, n)."""
    rank, world = shard
    chunk = chunk or 2 * n
    values = theta.new_zeros(2, n)
    turns = _turns(losses, torch.arange(n), max(1, chunk // 2))
    for turn, (loss, i) in enumerate(turns):
        d = _noise(len(i), theta, generator).mul_(sigma)        # in place, here and below: memory
        if turn % world == rank:
            points = torch.cat([d, -d]).add_(theta).split(chunk)
            found = [_losses(loss, some) for some in points]
            values[:, i] = torch.cat(found).view(2, -1)
    if world > 1:
        torch.distributed.all_reduce(values)                    # what others evaluated was 0 here
    return turns, values


def _gradients(loss, points):
    """Losses (n,) and their gradients (n, D), zero where the loss does not depend on the points."""
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode() has no gradients; torch.no_grad() will do")
    points.requires_grad_()
    with torch.enable_grad():
        values = _losses(loss, points)
        if not values.requires_grad:                              # a step function, say
            return values, torch.zeros_like(points)
        grads, = torch.autograd.grad(values.sum(), points, materialize_grads=True)
    return values.detach(), grads


def _check(loss, theta, sigma=1.0, chunk=None, antithetic=False, **counts):
    """A list of losses; theta, sigma of one dtype, apart from any graph. ValueError: nonsense."""
    losses = [loss] if callable(loss) else list(loss)
    if theta.dim() != 1:
        raise ValueError(f"theta has to be one vector (D,), not {tuple(theta.shape)}")
    for name, n in {**counts, "chunk": chunk or 1}.items():
        if type(n) is not int or n < 1:
            raise ValueError(f"{name}={n!r} has to be an int, at least 1")
        if antithetic and name == "samples" and n % 2:
            raise ValueError(f"{name}={n} has to be even, for antithetic pairs")
        if name != "chunk" and (not losses or n % len(losses)):
            raise ValueError(f"{name}={n} has to be a multiple of the {len(losses)} losses")
    sigma = torch.as_tensor(sigma, dtype=theta.dtype, device=theta.device).detach()
    if sigma.shape not in ((), theta.shape) or not ((sigma > 0) & sigma.isfinite()).all():
        raise ValueError("sigma has to be positive and finite, a number or a tensor like theta")
    return losses, theta.detach(), sigma
