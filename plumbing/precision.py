"""Bounds in full float32, whatever precision float32 products are set to elsewhere.

torch.set_float32_matmul_precision, the fp32_precision switches that followed it, TF32 on a GPU and
an environment variable of oneDNN let float32 products round their factors to 8 to 11 bits: fine for
training, but no bound. On a CPU all of them act through oneDNN, so the bounds are computed without
it while one is on; on a GPU they are refused. The user's settings stay as they are.
"""
import os
import threading
from contextlib import contextmanager

import torch

LOCK, INSIDE = threading.Lock(), []     # what oneDNN was set to, once for each thread in the guard


def reduced():
    """The switch that lets float32 products round their factors, or None."""
    for name in ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"):
        if os.environ.get(name, "STRICT").upper() != "STRICT":
            return name
    backends = torch.backends
    places = {"torch.backends": backends, "torch.backends.cudnn": backends.cudnn,
              "torch.backends.mkldnn": backends.mkldnn}
    for operation in ("matmul", "conv"):
        for name in ("torch.backends.mkldnn", "torch.backends.cudnn"):
            places[f"{name}.{operation}"] = getattr(places[name], operation, None)
    places["torch.backends.cuda.matmul"] = backends.cuda.matmul
    for name, place in places.items():
        if getattr(place, "fp32_precision", "none") not in ("none", "ieee"):
            return f"{name}.fp32_precision"
    try:
        highest = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:               # old and new switches were mixed: the new ones, above, count
        highest = True
    return None if highest else "torch.set_float32_matmul_precision"


@contextmanager
def full_precision(t):
    """A context in which products of float32 tensors like t keep all of their 24 bits.

    Raises ValueError where that cannot be had.
    """
    switch = reduced() if t.dtype == torch.float32 else None
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
