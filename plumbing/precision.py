"""Bounds in full float32, whatever precision float32 products are set to elsewhere.

torch.set_float32_matmul_precision, the fp32_precision switches that followed it, TF32 on a GPU and
an environment variable of oneDNN let float32 products round their factors to 8 to 11 bits: fine for
training, but no bound. On a CPU all of them act through oneDNN, so the bounds are computed without
it while one is on; on a GPU they are refused. The user's settings stay as they are, but that the
import of relaxations.py switches off the TF32 of cuDNN, which is on by default.
NVIDIA_TF32_OVERRIDE=1 acts inside of NVIDIA's libraries, whatever PyTorch is set to.
"""
import os
import threading
from contextlib import contextmanager

import torch

LOCK, INSIDE = threading.Lock(), []     # what oneDNN was set to, once for each thread in the guard
ENVIRONMENT = "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"
CPU = {"torch.backends": torch.backends,
       "torch.backends.mkldnn.matmul": torch.backends.mkldnn.matmul,
       "torch.backends.mkldnn.conv": torch.backends.mkldnn.conv}
GPU = {"torch.backends": torch.backends,
       "torch.backends.cuda.matmul": torch.backends.cuda.matmul,
       "torch.backends.cudnn.conv": torch.backends.cudnn.conv}


def reduced(device="cpu"):
    """The switch that lets float32 products on that device round their factors, or None."""
    on = [name for name in ENVIRONMENT if os.environ.get(name, "STRICT").upper() != "STRICT"]
    if device != "cpu" and os.environ.get("NVIDIA_TF32_OVERRIDE", "0") != "0":
        on.append("NVIDIA_TF32_OVERRIDE")
    on += [f"{name}.fp32_precision" for name, place in (CPU if device == "cpu" else GPU).items()
           if place.fp32_precision not in ("none", "ieee")]
    try:
        if torch.get_float32_matmul_precision() != "highest":
            on.append("torch.set_float32_matmul_precision")
    except RuntimeError:
        pass                           # old and new switches were mixed: the new ones, above, count
    return on[0] if on else None


@contextmanager
def full_precision(t):
    """A context in which products of float32 tensors like t keep all of their 24 bits.

    Raises ValueError where that cannot be had.
    """
    switch = reduced(t.device.type) if t.dtype == torch.float32 else None
    if switch and t.device.type != "cpu":
        raise ValueError(f"{switch} lets float32 products round to 8 to 11 bits, which makes no "
                         "bounds; switch it off, or use float64")
    if not switch:
        yield
        return
    with LOCK:
        INSIDE.append(torch.backends.mkldnn.enabled if not INSIDE else INSIDE[0])
        torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        with LOCK:
            before = INSIDE.pop()
            if not INSIDE:             # the last thread to leave
                torch.backends.mkldnn.enabled = before


def finite(t):
    """t, but NaN where sums overflowed, for infinity could be on the wrong side: NaN reaches the
    margins, and no sample is certified."""
    return torch.add(t, t.detach(), alpha=0)
