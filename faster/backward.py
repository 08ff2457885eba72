"""Steps of back-substitution with backward passes by hand, which keep the rows alone; autograd
keeps what is made of them, too. Rows are A (..., R, Q); lines, boxes and biases, (..., 1, Q), may
have fewer of the leading dimensions. They can be differentiated twice.

Without them a gradient by DeepPoly takes 1.15 times as long on CNN5, in 1.4 times the memory, and
1.01 times on CNN3, in 1.14 times the memory (untrained, one thread; benchmarks/prices.py).
"""
import torch
import torch.nn.functional as F

from relaxations import Box, Lines, minus


def ones_where(negative):
    """1 where A- < 0, else 0: numbers, as PyTorch would first make numbers of a bool."""
    return negative.detach().sign().neg_()


class Relax(torch.autograd.Function):
    """A+ lower + A- upper (..., R, Q), and A- . intercept (..., R), which Lines.back adds to d. The
    derivative by A is lower where A >= 0, upper and intercept where A < 0."""
    generate_vmap_rule = True

    @staticmethod
    def forward(A, lower, upper, intercept):
        negative = minus(A)
        below = torch.addcmul(A * lower, negative, upper - lower)
        return below, (negative @ intercept.mT).squeeze(-1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g, h):
        A, lower, upper, intercept = ctx.saved_tensors
        of_A, of_lower, *of_rest = ctx.needs_input_grad
        grads, negative = [None] * 4, minus(A)
        if of_lower:
            grads[1] = (g * F.relu(A)).sum_to_size(lower.shape)
        if any(of_rest):
            grads[2] = (g * negative).sum_to_size(upper.shape)
            grads[3] = (h[..., None, :] @ negative).sum_to_size(intercept.shape)
        if of_A:
            grad = (g * (upper - lower)).addcmul_(h[..., None], intercept)      # where A < 0
            grad = grad.mul_(ones_where(negative)).addcmul_(g, lower)
            grads[0] = grad.sum_to_size(A.shape)
        return tuple(grads)


class Constant(torch.autograd.Function):
    """A . bias (..., R), which Op.back adds to d."""
    generate_vmap_rule = True

    @staticmethod
    def forward(A, bias):
        return (A @ bias.mT).squeeze(-1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, h):
        A, bias = ctx.saved_tensors
        of_A, of_bias = ctx.needs_input_grad
        grads = [None] * 2
        if of_A:
            grads[0] = (h[..., None] * bias).sum_to_size(A.shape)
        if of_bias:
            grads[1] = (h[..., None, :] @ A).sum_to_size(bias.shape)
        return tuple(grads)


class Smallest(torch.autograd.Function):
    """A+ . lower + A- . upper (..., R), which Box.back adds to d."""
    generate_vmap_rule = True

    @staticmethod
    def forward(A, lower, upper):
        return (A @ lower.mT + minus(A) @ (upper - lower).mT).squeeze(-1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, h):
        A, lower, upper = ctx.saved_tensors
        of_A, *of_box = ctx.needs_input_grad
        grads, negative = [None] * 3, minus(A)
        if any(of_box):
            rows = h[..., None, :]
            grads[1] = (rows @ F.relu(A)).sum_to_size(lower.shape)
            grads[2] = (rows @ negative).sum_to_size(upper.shape)
        if of_A:
            corner = torch.addcmul(lower, ones_where(negative), upper - lower)
            grads[0] = (h[..., None] * corner).sum_to_size(A.shape)
        return tuple(grads)


class QuickLines(Lines):
    """Lines, of which Relax does the work."""

    def back(self, A, d):
        A, more = Relax.apply(A, *self)
        return A, d + more


class QuickBox(Box):
    """A Box, of which Smallest does the work."""

    def back(self, A, d):
        return None, d + Smallest.apply(A, *self)
