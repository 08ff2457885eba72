#!/usr/bin/env bash
# torch 2.13.0 (CPU); found 2026-11-28.
#
# Guess: torch.backends.cuda.matmul.allow_tf32 = False, the advice for exact float32 products and
#   the default anyway, changes nothing on a machine without a GPU; whoever called
#   torch.set_float32_matmul_precision("medium") before reads "medium" or "highest" afterwards.
#   Both calls belong to the older interface.
# What happens: torch.get_float32_matmul_precision() raises RuntimeError from then on, and says that
#   the legacy and the new interface had been mixed. The switch was taken for a GPU only: products
#   on the CPU may still round their factors to bfloat16. In the other order nothing is wrong.
# Why it matters: code that computes bounds has to know whether float32 products keep their bits.
#   A check by get_float32_matmul_precision() fails, or, where the error is caught, misses that the
#   CPU rounds; and the import of one library makes a getter in another one fail.
#
# Exits with 0 while the behaviour is as described, with 1 once it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/order.py" <<'PYTHON'
import sys

import torch


def read():
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError as e:
        return f"RuntimeError: {str(e)[:140]}"


steps = {
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "no tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", False),
}
for name in sys.argv[1:]:
    steps[name]()
print(" then ".join(sys.argv[1:]), "->", read(), "| on a CPU:",
      torch.backends.mkldnn.matmul.fp32_precision)
PYTHON
python="$folder/venv/bin/python"
"$python" -c 'import torch; print("torch", torch.__version__)'
one=$("$python" "$folder/order.py" "medium" "no tf32")
two=$("$python" "$folder/order.py" "no tf32" "medium")
printf '%s\n' "$one" "$two"
[[ $one == *RuntimeError*legacy*"| on a CPU: bf16" && $two == *"-> medium |"* ]]
