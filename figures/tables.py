"""The README's tables of experiments, from results/*.jsonl: no number in them is typed by hand.

    python figures/tables.py            rewrites what stands between the <!-- table --> marks

A difference is called one only when it exceeds twice its standard error, which comes from the
spread over seeds: sqrt(s1^2 / n1 + s2^2 / n2).
"""
import re
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
             "**certified, %** | unknown | training, s | settings | seeds |",
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


def differences(name):
    found = table_cells(name)
    lines = ["| certified, points | difference | standard error | |", "|---|---|---|---|"]
    for a, b in CLAIMS:
        if a in found and b in found and min(len(found[a]), len(found[b])) > 1:
            first, second = percent(found[a], "certified"), percent(found[b], "certified")
            d = mean(first) - mean(second)
            error = (stdev(first) ** 2 / len(first) + stdev(second) ** 2 / len(second)) ** 0.5
            word = "none to be seen" if abs(d) <= 2 * error else "better" if d > 0 else "worse"
            lines.append(f"| {' '.join(NAME[m] for m in a)} − {' '.join(NAME[m] for m in b)} | "
                         f"{d:+.1f} | {error:.1f} | {word} |")
    return lines


def source(name):
    cells = [c for cells in table_cells(name).values() for c in cells]
    commits = sorted({c["commit"] for c in cells})
    return [f"{len(cells)} runs of one thread each, {cells[0]['jobs']} at a time, on "
            f"{cells[0]['processor']}, torch {cells[0]['torch']}, at commit {', '.join(commits)}; "
            f"{sum(c['train_seconds'] + c['certify_seconds'] for c in cells) / 60:.0f} minutes of "
            "one thread in all. Mean ± standard deviation over seeds."]


TABLES = {"results": results_table, "differences": differences, "source": source}


def main():
    path = experiments.ROOT / "README.md"
    def fill(match):
        return "\n".join([match[1], *TABLES[match[2]](match[3]), match[4]])
    text = re.sub(r"(<!-- (\S+) (\S+) -->)\n.*?(<!-- end -->)", fill, path.read_text(), flags=re.S)
    path.write_text(text)


if __name__ == "__main__":
    main()
