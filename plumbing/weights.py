"""Weights from elsewhere: the tensors of a file, in a network built here. Nothing is executed."""
import zipfile
from pathlib import Path

import torch

from plumbing.console import InputError
from plumbing.data import check_zip


def read_weights(path, net):
    """net with the tensors of a state_dict as torch.save writes it, or of one under "state_dict":
    by its names; or, where these are others, in the order in which they stand, if all shapes fit.
    Raises InputError."""
    found, own = _tensors(path), net.state_dict()
    ours, theirs = (_sized(tensors) for tensors in (own, found))
    if ours.keys() == theirs.keys():
        found = {name: found.get(name, t) for name, t in own.items()}
    else:
        if len(ours) != len(theirs):
            raise InputError(f"{path} has {len(theirs)} tensors, {', '.join(theirs)}; the network "
                             f"needs {len(ours)}, {', '.join(ours)}: choose another --net")
        kinds = set(map(_kind, ours))
        for name, other in zip(ours, theirs):                  # shapes alone may fit any order
            if _kind(other) in kinds - {_kind(name)}:
                raise InputError(f"{path}: {other} stands where the network has {name}; give the "
                                 "tensors their names or their order")
        found = own | dict(zip(ours, theirs.values()))
    for name, t in found.items():
        if t.shape != own[name].shape:
            raise InputError(f"{path}: {name} has to be {tuple(own[name].shape)}, but is "
                             f"{tuple(t.shape)}; choose another --net or --dataset")
    net.load_state_dict(found)
    return net


def _kind(name):
    """weight, bias, running_mean, ..."""
    return name.rpartition(".")[2]


def _sized(tensors):
    """Those that hold numbers of the network: not the counts of BatchNorm."""
    return {name: t for name, t in tensors.items() if not name.endswith("num_batches_tracked")}


def _tensors(path):
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                check_zip(archive, Path(path))
                if bad := archive.testzip():                   # torch.load does not look
                    raise InputError(f"{path}: its part {bad} is damaged (wrong checksum)")
        found = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as e:       # torch.load raises many kinds for a damaged or foreign file
        why = str(e).splitlines()[0][:80] if str(e) else ""
        raise InputError(f"--weights {path}: not a readable file of tensors ({type(e).__name__}: "
                         f"{why}); torch.save(net.state_dict(), FILE) writes one") from None
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not found or not all(map(torch.is_tensor, found.values())):
        raise InputError(f"--weights {path}: holds no state_dict, {{name: tensor}}")
    return found
