"""Affine layers without their modules, a population of them at once: what the fast path multiplies.

Conv2d, Linear, BatchNorm and zero padding are read, as most networks have nothing else; any other
layer sends its network through the heart of relaxations.py. Letters as there.
"""
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from faster.backward import Constant
from plumbing.precision import finite

FEW = 3      # channels: up to so many, a transposed convolution is slow on a CPU


class Op(NamedTuple):
    """A Layer without its module: a linear one (stride None) or a convolution.

    Its bounds are in PyTorch's order; rows, and the lines and the box that they meet, in the order
    (height, width, channel), in which transposed convolutions are fastest (hwc translates).
    """
    weight: torch.Tensor     # (P, O, N), or (P, O, C/groups, kh, kw)
    bias: torch.Tensor       # (P, O)
    in_shape: tuple          # (N,) or (C, H, W), also of a linear layer that reads a map
    out_shape: tuple
    stride: tuple = None
    padding: tuple = (0, 0)
    dilation: tuple = (1, 1)
    groups: int = 1

    def apply(self, h, weight, bias=None):
        """W h + b: (P or 1, B, N) -> (P, B, N')."""
        P, B = len(weight), h.shape[1]
        if self.stride is None:
            y = (weight @ h.mT).mT           # not h @ weight.mT, whose gradient is a transpose
            return y if bias is None else y + bias[:, None]
        # The population becomes channels: one grouped convolution, or, while all members still see
        # the same input, one convolution with P times the output channels.
        shared = len(h) == 1 and self.groups == 1
        h = h if shared else h.expand(P, -1, -1)
        h = h.transpose(0, 1).reshape(B, -1, *self.in_shape[1:])
        y = F.conv2d(h, weight.flatten(0, 1), None if bias is None else bias.flatten(),
                     self.stride, self.padding, self.dilation, 1 if shared else P * self.groups)
        return y.reshape(B, P, -1).transpose(0, 1)

    def interval(self, lower, upper):
        middle = torch.lerp(lower, upper, 0.5)
        # Centre before radius: autograd goes backwards, and adds to what abs gave in its place.
        centre = finite(self.apply(middle, self.weight, self.bias))
        radius = self.apply(upper - middle, self.weight.abs())
        return centre - radius, centre + radius

    def back(self, A, d, kernel=None, size=None, padding=None):
        """Layer.back, for rows A (P, ..., Q) of all outputs; or of a window of them of the size
        kernel, which sees inputs of the given size."""
        window = (kernel or self.out_shape[1:], size or self.in_shape[1:],
                  self.padding if padding is None else padding)
        lead, rows = A.shape[1:-1], A.flatten(1, -2)                           # (P, rows, Q)
        if self.stride is None or self.is_dense(window[1]):
            below = rows @ self.matrix(*window)
        else:
            below = self.transposed(rows, *window)
        # After the product, so that autograd adds the product's gradient to this one in its place.
        bias = self.bias.repeat(1, math.prod(window[0]))[:, None]
        constants = Constant.apply(rows, bias)
        return below.unflatten(1, lead), d + constants.unflatten(1, lead)

    def is_dense(self, size):
        """Is a product with one dense matrix, mostly zeros, faster than the transposed convolution?
        Measured on a CPU: the fewer the channels below, the slower is the convolution."""
        C, kh, kw = self.weight.shape[2:]
        return size[0] * size[1] * C <= min(64, 10 * C) * kh * kw

    def matrix(self, kernel, size, padding):
        """The layer on such a window as a matrix, (P, Q, Q')."""
        if self.stride is None:
            return hwc(self.weight, self.in_shape)
        eye = torch.eye(self.weight.shape[1] * math.prod(kernel)).to(self.weight)
        return self.transposed(eye[None], kernel, size, padding)

    def transposed(self, rows, kernel, size, padding):
        """Rows (P, M, Q) of a window of outputs as rows of the inputs that it sees."""
        P, O = self.bias.shape
        A = as_map(rows.expand(P, -1, -1), (O, *kernel))
        A = conv_transpose(A, self.weight.flatten(0, 1), size, self.stride, padding,
                           self.dilation, P * self.groups)
        return as_rows(A, P)


def as_map(t, shape):
    """(P, B, H*W*C) -> (B, P*C, H, W), in the memory as torch.channels_last has it."""
    C, H, W = shape
    t = t.unflatten(-1, (H, W, C)).permute(1, 2, 3, 0, 4)                      # (B, H, W, P, C)
    return t.flatten(3).permute(0, 3, 1, 2)


def as_rows(y, P):
    """(B, P*C, H, W) -> (P, B, H*W*C)."""
    y = y.permute(0, 2, 3, 1).unflatten(-1, (P, -1))                           # (B, H, W, P, C)
    return y.permute(3, 0, 1, 2, 4).flatten(2)


def hwc(t, shape):
    """The last dimension of t, if it is a map (C, H, W), in the order (H, W, C)."""
    if len(shape) < 3:
        return t
    return t.unflatten(-1, (shape[0], -1)).mT.flatten(-2)


def chw(t, shape):
    """The last dimension of t, if it is a map, in PyTorch's order again."""
    if len(shape) < 3:
        return t
    return t.unflatten(-1, (-1, shape[0])).mT.flatten(-2)


def read_op(layer, ops, source):
    """Append the layer to ops as an Op, or fold it into the last of them; False: it cannot be."""
    module, tensors, shape = layer.module, layer.tensors, layer.in_shape
    norm = isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))
    if isinstance(module, nn.Linear) and len(shape) == 1:
        weight = tensors["weight"]
        op = Op(weight, bias_of(tensors, weight), source or shape, layer.out_shape)
    elif len(shape) == 3 and source in ((), shape) and conv_padding(module):
        weight, options = tensors["weight"], (module.stride, conv_padding(module), module.dilation)
        op = Op(weight, bias_of(tensors, weight), shape, layer.out_shape, *options, module.groups)
    elif norm and ops and source == shape:
        op, (scale, shift) = ops.pop(), scale_and_shift(module, tensors)
        each = scale.view(*scale.shape, *[1] * (op.weight.dim() - 2))
        op = op._replace(weight=op.weight * each, bias=op.bias * scale + shift)
    elif norm and len(shape) == 3 and source in ((), shape):
        scale, shift = scale_and_shift(module, tensors)
        kernel = scale[..., None, None, None]                                # (P, C, 1, 1, 1)
        op = Op(kernel, shift, shape, shape, stride=(1, 1), groups=shape[0])
    else:
        return False
    ops.append(op)
    return True


def bias_of(tensors, weight):
    bias = tensors["bias"].flatten(1) if "bias" in tensors else weight.new_zeros(())
    return bias.expand(weight.shape[:2])                       # that of Linear may be one number


def conv_padding(module):
    """(above and below, left and right) of a Conv2d that pads with zeros, alike on both sides."""
    if not isinstance(module, nn.Conv2d) or module.padding_mode != "zeros":
        return None
    if module.padding != "same":
        return (0, 0) if module.padding == "valid" else module.padding
    width = spans(module.weight.shape[2:], module.dilation)
    return tuple(w // 2 for w in width) if all(w % 2 for w in width) else None


def spans(kernel, dilation):
    """The cells along each axis from the first to the last that a kernel sees."""
    return [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]


def scale_and_shift(norm, tensors):
    """s = gamma / sqrt(var + eps) and t = beta - s mean, (P, C) each: BatchNorm is z -> s z + t."""
    scale = (tensors["running_var"] + norm.eps).rsqrt() * tensors.get("weight", 1)
    return scale, tensors.get("bias", 0) - tensors["running_mean"] * scale


def conv_transpose(A, weight, size, stride, padding, dilation, groups):
    """conv_transpose2d to a map of the given size."""
    kernel = weight.shape[2:]
    square = all(t[0] == t[1] for t in (kernel, stride, padding))
    if square and stride[0] > 1 and dilation == (1, 1) and weight.shape[1] <= FEW:
        return sub_pixel(A, weight, size, stride[0], padding[0], groups)
    along = zip(size, stride, padding, spans(kernel, dilation))
    rest = [(n + 2 * p - span) % s for n, s, p, span in along]
    return F.conv_transpose2d(A, weight, None, stride, padding, rest, groups, dilation)


# Without it CROWN-IBP takes 1.2 to 1.4 times as long, 1.04 to 1.19 with its gradient.
def sub_pixel(A, weight, size, s, p, groups):
    """conv_transpose2d of stride s as a convolution to s*s times the channels, which are blocks of
    s x s outputs (Shi et al. 2016, "sub-pixel").

    Output y gets input i times weight[y + p - s i]. Blocks begin at -p; block Y has the outputs
    s Y + a - p and sees inputs Y + t - m, where m = (k-1)//s. So the tap is weight[a + s (m - t)].
    """
    k = weight.shape[2]
    m = (k - 1) // s
    t = torch.arange(m + 1, device=A.device)
    a = torch.arange(s, device=A.device)[:, None]
    tap = (a + s * (m - t)).clamp(max=k)                                               # k: nothing
    W = F.pad(weight, (0, 1, 0, 1))
    W = W[..., tap[:, None, :, None], tap[:, None]]
    W = W.unflatten(0, (groups, -1))                                   # (groups, O, C, a, b, t, t)
    W = W.permute(0, 3, 4, 2, 1, 5, 6).flatten(0, 3)
    A = F.conv2d(A, W, padding=m, groups=groups)
    A = A.unflatten(1, (groups, s, s, -1))
    A = A.permute(0, 5, 2, 6, 3, 1, 4)
    A = A.flatten(5, 6).flatten(3, 4).flatten(1, 2)                       # (M, s Y, s X, groups*C)
    below, right = (n + p - made for n, made in zip(size, A.shape[1:3]))
    A = F.pad(A, (0, 0, -p, right, -p, below))
    return A.permute(0, 3, 1, 2)
