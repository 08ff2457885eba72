"""The tables of the README pages, from results/: no number in them is typed by hand.

    python figures/tables.py            rewrites what stands between the <!-- table --> marks

The standard error of a difference comes from the spread over seeds, sqrt(s1^2 / n1 + s2^2 / n2), or
from that of the differences between runs of the same seed, which share their initial weights, their
batches and their test images. p is that of the exact permutation test: the share of all ways to
deal the runs to two methods that give so large a difference. All are for the settings that tuning
chose, and do not know how much that choice owes to chance.
"""
import json
import re
from itertools import combinations
from statistics import mean, stdev

import experiments

NAME = {"box": "box (IBP)", "crown-ibp": "CROWN-IBP", "deeppoly": "DeepPoly",
        "alpha-crown": "alpha-CROWN", "sabr": "SABR", "mtl-ibp": "MTL-IBP",
        "grad": "grad", "rgs": "RGS", "pgpe": "PGPE"}
CLAIMS = [  # (relax, opt) against (relax, opt)
    (("deeppoly", "grad"), ("box", "grad")), (("crown-ibp", "grad"), ("box", "grad")),
    (("deeppoly", "pgpe"), ("box", "pgpe")), (("crown-ibp", "pgpe"), ("box", "pgpe")),
    (("deeppoly", "rgs"), ("deeppoly", "grad")), (("crown-ibp", "rgs"), ("crown-ibp", "grad")),
    (("box", "rgs"), ("box", "grad")), (("deeppoly", "rgs"), ("box", "rgs")),
    (("deeppoly", "rgs"), ("box", "grad")), (("deeppoly", "rgs"), ("sabr", "grad")),
    (("deeppoly", "rgs"), ("mtl-ibp", "grad")), (("deeppoly", "pgpe"), ("deeppoly", "rgs"))]


def table_cells(name):
    """{method: its cells with the tuned settings, one for each seed}."""
    best = experiments.tuned(name)
    cells = [c for c in experiments.read(name) if "failed" not in c]
    found = {m: [c for c in cells if (c["relax"], c["opt"]) == m and c["settings"] == best[m]]
             for m in best}
    return {m: cells for m, cells in found.items() if cells}


def percent(cells, key):
    return [100 * c[key] / c["n"] for c in cells]


def spread(values):
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def up_to(cell, stage):
    stages = list(cell["certified_by"])
    return sum(cell["certified_by"][s] for s in stages[:stages.index(stage) + 1])


def results_table(name):
    lines = ["| loss, gradient | natural, % | not attacked, % | certified up to DeepPoly, % | "
             "**certified, %** | unknown, of all runs | training, s | settings | seeds |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for method, cells in table_cells(name).items():
        columns = [", ".join(NAME[m] for m in method), spread(percent(cells, "natural")),
                   f"{mean(100 * (c['natural'] - c['attacked']) / c['n'] for c in cells):.1f}",
                   f"{mean(100 * up_to(c, 'deeppoly') / c['n'] for c in cells):.1f}",
                   f"**{spread(percent(cells, 'certified'))}**",
                   str(sum(c["unknown"] for c in cells)),
                   f"{mean(c['train_seconds'] for c in cells):.0f}",
                   ", ".join(f"{k} {v:g}" for k, v in cells[0]["settings"].items()),
                   str(len(cells))]
        lines.append("| " + " | ".join(columns) + " |")
    return lines


TITLE = {"digits": "digits", "mnist-cnn3-0.1": "MNIST, 0.1", "mnist-cnn3-0.3": "MNIST, 0.3",
         "mnist-pgpe-0.1": "MNIST, 0.1, small", "cifar10-cnn3": "CIFAR-10, 2/255"}


def summary(names):
    """What is certified: a row for each loss, a column for each table and gradient."""
    found = {name: table_cells(name) for name in names.split(",")}
    columns = [(name, opt) for name in found for opt in ("grad", "rgs", "pgpe")
               if any(method[1] == opt for method in found[name])]
    lines = ["| certified, % | " + " | ".join(f"{TITLE[name]}, {NAME[opt]}"
                                              for name, opt in columns) + " |",
             "|" + "---|" * (len(columns) + 1)]
    for relax in dict.fromkeys(method[0] for cells in found.values() for method in cells):
        runs = [found[name].get((relax, opt)) for name, opt in columns]
        lines.append("| " + " | ".join([NAME[relax], *(
            spread(percent(cells, "certified")) if cells else "" for cells in runs)]) + " |")
    return lines


def permutation_test(first, second):
    both, n = first + second, len(first)
    def distance(chosen):
        rest = [v for i, v in enumerate(both) if i not in chosen]
        return abs(mean(both[i] for i in chosen) - mean(rest))
    seen = distance(range(n))
    splits = [distance(chosen) >= seen - 1e-9 for chosen in combinations(range(len(both)), n)]
    return mean(splits)


def differences(name):
    found = table_cells(name)
    lines = ["| certified, points | difference | standard error | by seeds | p |",
             "|---|---|---|---|---|"]
    for a, b in CLAIMS:
        if a in found and b in found and min(len(found[a]), len(found[b])) > 1:
            by_seed = [{c["seed"]: percent([c], "certified")[0] for c in found[m]} for m in (a, b)]
            first, second = ([*cells.values()] for cells in by_seed)
            pairs = [v - by_seed[1][seed] for seed, v in by_seed[0].items() if seed in by_seed[1]]
            d = mean(first) - mean(second)
            error = (stdev(first) ** 2 / len(first) + stdev(second) ** 2 / len(second)) ** 0.5
            lines.append(f"| {' '.join(NAME[m] for m in a)} − {' '.join(NAME[m] for m in b)} | "
                         f"{d:+.1f} | {error:.1f} | {stdev(pairs) / len(pairs) ** 0.5:.1f} | "
                         f"{permutation_test(first, second):.3f} |")
    return lines


def source(name):
    cells = [c for cells in table_cells(name).values() for c in cells]
    commits = sorted({c["commit"] for c in cells})
    return [f"{len(cells)} runs of one thread each, {cells[0]['jobs']} at a time, on "
            f"{cells[0]['processor']}, torch {cells[0]['torch']}, at commit {', '.join(commits)}; "
            f"{sum(c['train_seconds'] + c['certify_seconds'] for c in cells) / 60:.0f} minutes of "
            "one thread, without tuning and sweeps. Mean ± standard deviation over seeds."]


def sweeps(name):
    """One setting after another changed, the others as tuned."""
    lines = ["| loss, gradient | certified, % | seeds |", "|---|---|---|"]
    best, cells = experiments.tuned(name), experiments.read(name)
    for option, (values, methods) in experiments.TABLES[name]["sweeps"].items():
        for m, value in ((m, value) for m in methods for value in values):
            found = [c for c in cells if (c["relax"], c["opt"]) == m and "failed" not in c
                     and c["settings"] == {**best[m], option: value}]
            lines.append(f"| {', '.join(NAME[part] for part in m)}, {option} {value:g} | "
                         f"{spread(percent(found, 'certified'))} | {len(found)} |")
    return lines


CASE = {"cnn3": "CNN3 / MNIST", "cnn3-256": "CNN3 / MNIST", "cnn5": "CNN5 / CIFAR-10",
        "cnn7": "CNN7 / CIFAR-10", "init": "initial", "box": "trained by box",
        "deeppoly": "trained by DeepPoly"}
ROW = {"box": "box", "crown-ibp": "CROWN-IBP", "deeppoly": "DeepPoly, textbook",
       "skip-stable": "DeepPoly, skip_stable"}


def speed(name):
    """Rows of benchmarks/bounds.py, from results/benchmarks/NAME*.json; ratios to auto_LiRPA."""
    lines = ["| network, batch | weights | bounds | forward, ms | times faster | forward + "
             "backward, ms | times faster | MiB at the peak, here : there |", "|" + "---|" * 8]
    files = (experiments.RESULTS / "benchmarks").glob(f"{name}*.json")
    for path in sorted(files, key=lambda path: path.stem):
        for r in json.loads(path.read_text())["results"]:
            columns = [f"{CASE[r['case']]}, {r['batch']}", CASE[r["state"]], ROW[r["row"]]]
            for run in ("forward", "forward+backward"):
                t = r.get(run)
                columns += [f"{1e3 * t['ours']:.0f}", f"**{t['ratio']:.2f}**" if "ratio" in t
                            else "fails"] if t else ["", ""]
            memory = r.get("forward+backward", r["forward"]).get("MiB", {})
            columns.append(" : ".join(f"{memory[k]:.0f}" if memory.get(k) else "-"
                                      for k in ("ours", "auto_LiRPA")))
            lines.append("| " + " | ".join(columns) + " |")
    return lines


TABLES = {"results": results_table, "differences": differences, "source": source,
          "sweeps": sweeps, "speed": speed, "summary": summary}
PAGES = [experiments.ROOT / folder / "README.md" for folder in (".", "results", "benchmarks")]


def filled(text):
    """A page with its tables made anew."""
    def fill(match):
        return "\n".join([match[1], *TABLES[match[2]](match[3]), match[4]])
    return re.sub(r"(<!-- (\S+) (\S+) -->)\n.*?(<!-- end -->)", fill, text, flags=re.S)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
