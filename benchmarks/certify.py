"""Complete certification of networks that were not trained for it: how far does certify.py get?

    git clone https://github.com/Verified-Intelligence/alpha-beta-CROWN
    python benchmarks/certify.py --checkout alpha-beta-CROWN --case mnist_cnn_a_adv --timeout 30

The networks and images are those on which beta-CROWN (Wang et al. 2021) is usually measured: CNN-A
of the SDP-FO benchmark (Dathathri et al. 2020), adversarially trained, two convolutions and two
linear layers, and 200 images each. Prints the table of certify.py; --out writes every verdict and
where they were found as JSON. Expect up to --timeout seconds for each image.
"""
import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import common                                       # first: it puts the checkout on the path
import certify

CASES = {  # name: data set, radius, mean and std of the pixels in the first layer
    "mnist_cnn_a_adv": ("mnist", 0.3, None),
    "cifar_cnn_a_adv": ("cifar", 2 / 255, ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))),
    "cifar_cnn_a_mix": ("cifar", 2 / 255, ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))),
}


def load(checkout, case):
    """The network in eval mode, images (200, C, H, W) in [0, 1], labels and eps."""
    data, eps, statistics = CASES[case]
    root = Path(checkout) / "complete_verifier"
    images = np.load(root / f"datasets/sdp/{data}/X_sdp.npy", allow_pickle=False)   # NHWC
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float().clamp(0, 1)
    y = torch.from_numpy(np.load(root / f"datasets/sdp/{data}/y_sdp.npy", allow_pickle=False))
    net = nn.Sequential(nn.Conv2d(x.shape[1], 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1),
                        nn.ReLU(), nn.Flatten(), nn.Linear(32 * (x.shape[2] // 4) ** 2, 100),
                        nn.ReLU(), nn.Linear(100, 10))
    net.load_state_dict(torch.load(root / f"models/sdp/{case}.model", map_location="cpu",
                                   weights_only=True))
    if statistics:
        normalize = nn.BatchNorm2d(3, eps=0.0, affine=False)
        normalize.running_mean.copy_(torch.tensor(statistics[0]) / 255)
        normalize.running_var.copy_((torch.tensor(statistics[1]) / 255).square())
        net = nn.Sequential(normalize, *net)
    return net.eval(), x, y.long(), eps


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--checkout", required=True, help="of alpha-beta-CROWN")
    p.add_argument("--case", choices=CASES, default="mnist_cnn_a_adv")
    p.add_argument("--samples", type=int, default=200)
    p.add_argument("--timeout", type=float, default=30.0, help="seconds for each image")
    p.add_argument("--device", default="cpu")
    p.add_argument("--out", help="a JSON file")
    args = p.parse_args()
    net, x, y, eps = load(args.checkout, args.case)
    x, y, net = (t.to(args.device) for t in (x[:args.samples], y[:args.samples], net))

    def report(v):
        print(f"{v.index:4} {v.status:14} {v.stage:17} bound {v.bound:9.4f}  {v.seconds:6.1f} s",
              flush=True)

    verdicts = certify.certify(net, x, y, eps, args.timeout, report=report)
    lines = certify.summary(verdicts, certify.STAGES)
    print("\n".join(lines))
    rows = [dict(index=v.index, status=v.status, stage=v.stage, seconds=round(v.seconds, 2),
                 bound=v.bound if v.bound > -float("inf") else None) for v in verdicts]
    common.write(args.out, **common.machine(args.device), case=args.case, eps=eps,
                 timeout=args.timeout, summary=lines, results=rows)


if __name__ == "__main__":
    main()
