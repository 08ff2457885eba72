"""The tables and the code on the pages, from results/ and the files: none of it is typed by hand.

    python figures/tables.py            rewrites what stands between the <!-- table --> marks

The standard error of a difference comes from the spread over seeds, sqrt(s1^2 / n1 + s2^2 / n2).
(Runs of two methods with the same seed share initial weights and batches, but are no pairs: one run
repeated with sums in another order may differ as much as two seeds, see results/README.md.) p is
that of the exact permutation test: the share of all ways to deal the runs to two methods that give
so large a difference. Both are for the settings that tuning chose, do not know how much that choice
owes to chance, and are about these test images.
"""
import ast
import json
import re
from collections import Counter
from itertools import combinations
from statistics import mean, median, stdev

import experiments                                  # first: it puts the checkout on the path
import labels
from plumbing.runs import LOG

NAME = {"box": "box (IBP)", "crown-ibp": "CROWN-IBP", "deeppoly": "DeepPoly",
        "alpha-crown": "alpha-CROWN", "sabr": "SABR", "mtl-ibp": "MTL-IBP",
        "staps": "STAPS", "taps": "TAPS", "deepz": "DeepZ",
        "grad": "grad", "rgs": "RGS", "pgpe": "PGPE"}
CLAIMS = [  # (relax, opt) against (relax, opt)
    (("deeppoly", "grad"), ("box", "grad")), (("crown-ibp", "grad"), ("box", "grad")),
    (("deeppoly", "pgpe"), ("box", "pgpe")), (("crown-ibp", "pgpe"), ("box", "pgpe")),
    (("deeppoly", "rgs"), ("deeppoly", "grad")), (("crown-ibp", "rgs"), ("crown-ibp", "grad")),
    (("box", "rgs"), ("box", "grad")), (("deeppoly", "rgs"), ("box", "rgs")),
    (("deeppoly", "rgs"), ("box", "grad")), (("deeppoly", "rgs"), ("sabr", "grad")),
    (("deeppoly", "rgs"), ("mtl-ibp", "grad")), (("deeppoly", "pgpe"), ("deeppoly", "rgs"))]


def table_cells(name):
    """{method: its cells with the tuned settings, one for each seed}. TABLE/FILE: of another."""
    name, _, file = name.partition("/")
    best = experiments.tuned(name)
    cells = [c for c in experiments.read(file or name) if "failed" not in c]
    found = {m: [c for c in cells if (c["relax"], c["opt"]) == m and c["settings"] == best[m]]
             for m in best}
    return {m: cells for m, cells in found.items() if cells}


def merged(names):
    """The cells of one table and of those that were added to it later, as TABLE+TABLE."""
    found = {}
    for name in names.split("+"):
        for (relax, opt), cells in table_cells(name).items():
            found["deepz" if name.endswith("-deepz") else relax, opt] = cells
    return found


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
    for method, cells in merged(name).items():
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


TITLE = {"digits": "digits", "digits-long": "digits, longer",
         "mnist-small-0.1": "MNIST, 0.1, small", "mnist-cnn3-0.1": "MNIST, 0.1",
         "mnist-cnn3-0.1-all": "MNIST, 0.1, all images",
         "mnist-cnn3-0.3": "MNIST, 0.3", "mnist-cnn3-0.3-all": "MNIST, 0.3, all images",
         "cifar10-cnn3": "CIFAR-10, 2/255"}


def summary(names):
    """What is certified: a row for each table and gradient, a column for each loss."""
    found = {name.split("+")[0]: merged(name) for name in names.split(",")}
    losses = list(dict.fromkeys(relax for cells in found.values() for relax, _ in cells))
    lines = ["| certified, % | " + " | ".join(NAME[relax] for relax in losses) + " |",
             "|" + "---|" * (len(losses) + 1)]
    for name, cells in found.items():
        for opt in ("grad", "rgs", "pgpe"):
            runs = [cells.get((relax, opt)) for relax in losses]
            if any(runs):
                columns = [spread(percent(r, "certified")) if r else "" for r in runs]
                lines.append("| " + " | ".join([f"{TITLE[name]}, {NAME[opt]}", *columns]) + " |")
    return lines


def permutation_test(first, second):
    both, n = first + second, len(first)
    def distance(chosen):
        rest = [v for i, v in enumerate(both) if i not in chosen]
        return abs(mean(both[i] for i in chosen) - mean(rest))
    seen = distance(range(n))
    splits = [distance(chosen) >= seen - 1e-9 for chosen in combinations(range(len(both)), n)]
    return mean(splits)


def contrast(plus, minus):
    """The sum of the means of plus, less that of minus, and its standard error."""
    d = sum(map(mean, plus)) - sum(map(mean, minus))
    return d, sum(stdev(runs) ** 2 / len(runs) for runs in (*plus, *minus)) ** 0.5


def differences(name):
    found = table_cells(name)
    lines = ["| certified, points | difference | standard error | p |", "|---|---|---|---|"]
    for a, b in CLAIMS:
        if a in found and b in found and min(len(found[a]), len(found[b])) > 1:
            first, second = (percent(found[m], "certified") for m in (a, b))
            d, error = contrast([first], [second])
            lines.append(f"| {' '.join(NAME[m] for m in a)} − {' '.join(NAME[m] for m in b)} | "
                         f"{d:+.1f} | {error:.1f} | {permutation_test(first, second):.3f} |")
    return lines


def gaps(names):
    """Certified by DeepPoly less by box, and how much more that is by a smoothed gradient; last the
    mean of the latter, weighted by the inverse of its variance."""
    lines = ["| DeepPoly − box, points | by grad | by RGS | more than by grad | by PGPE | "
             "more than by grad |", "|" + "---|" * 6]
    moved = {"rgs": [], "pgpe": []}
    for name in names.split(","):
        runs = {m: percent(cells, "certified") for m, cells in table_cells(name).items()}
        tight, loose = ({o: runs.get((r, o)) for o in ("grad", "rgs", "pgpe")}
                        for r in ("deeppoly", "box"))
        columns = [TITLE[name], "{:+.1f} ± {:.1f}".format(*contrast([tight["grad"]],
                                                                   [loose["grad"]]))]
        for opt, found in moved.items():
            if tight[opt] and loose[opt]:
                found.append(contrast([tight[opt], loose["grad"]], [loose[opt], tight["grad"]]))
                columns += ["{:+.1f} ± {:.1f}".format(*contrast([tight[opt]], [loose[opt]])),
                            "**{:+.1f} ± {:.1f}**".format(*found[-1])]
            else:
                columns += ["", ""]
        lines.append("| " + " | ".join(columns) + " |")
    means = []
    for found in moved.values():
        weight = sum(error ** -2 for _, error in found)
        value = sum(d * error ** -2 for d, error in found) / weight
        means.append(f"**{value:+.1f} ± {weight ** -0.5:.1f}**")
    return [*lines, f"| mean | | | {means[0]} | | {means[1]} |"]


def source(name):
    cells = [c for cells in table_cells(name).values() for c in cells]
    of_all = lambda key: sorted({c[key] for c in cells})
    commits, processors, jobs = map(of_all, ("commit", "processor", "jobs"))
    minutes = sum(c["train_seconds"] + c["certify_seconds"] for c in cells) / 60
    return [f"{len(cells)} runs of one thread each, {' or '.join(map(str, jobs))} at a time, on "
            f"{' and '.join(processors)}, torch {cells[0]['torch']}, at commit "
            f"{', '.join(commits)}; {minutes:.0f} minutes of "
            "one thread, without tuning and sweeps. Mean ± standard deviation over seeds."]


def again(names):
    """How far single runs, and the means over seeds, moved in a second run of the same commands."""
    first, second = map(table_cells, names.split(","))
    rows = [mean(percent(first[m], "certified")) - mean(percent(second[m], "certified"))
            for m in first]
    known = {c["train"]: c for cells in second.values() for c in cells}
    pairs = [(c, known[c["train"]]) for cells in first.values() for c in cells]
    moved = sorted(((100 * abs(a["certified"] - b["certified"]) / a["n"],
                     f"{NAME[a['relax']]}, {NAME[a['opt']]}") for a, b in pairs), reverse=True)
    same = sum(abs(a["certified"] - b["certified"]) <= 1 for a, b in pairs)
    return [f"The mean of each of the {len(rows)} rows moved by at most {max(map(abs, rows)):.1f} "
            f"points; {same} of {len(pairs)} runs certify the same to one image, and those that "
            "moved most, by rounding alone, did so by "
            + " and ".join(f"{d:.0f} ({m})" for d, m in moved[:2]) + " points."]


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


def variants(name):
    """Several settings changed together, for all seeds, and how far that is from the table."""
    lines = ["| loss, gradient | changed | certified, % | seeds | less the table's | "
             "standard error | p |", "|" + "---|" * 7]
    best, table = experiments.tuned(name), table_cells(name)
    for changed, methods in experiments.TABLES[name]["variants"]:
        for m in methods:
            found = [c for c in experiments.read(name) if (c["relax"], c["opt"]) == m
                     and "failed" not in c and c["settings"] == {**best[m], **changed}]
            if len(found) < 2:                                   # not run yet
                continue
            runs = [percent(cells, "certified") for cells in (found, table[m])]
            d, error = contrast(runs[:1], runs[1:])
            columns = [", ".join(NAME[part] for part in m),
                       ", ".join(f"{k} {v:g}" for k, v in changed.items()), spread(runs[0]),
                       str(len(found)), f"{d:+.1f}", f"{error:.1f}",
                       f"{permutation_test(*runs):.3f}"]
            lines.append("| " + " | ".join(columns) + " |")
    return lines


CASE = {"digits": "CNN3 / digits", "cnn3": "CNN3 / MNIST", "cnn3-256": "CNN3 / MNIST",
        "cnn5": "CNN5 / CIFAR-10", "cnn7": "CNN7 / CIFAR-10",
        "cnn7-bn": "CNN7, BatchNorm / CIFAR-10", "init": "initial",
        "box": "trained by box", "deeppoly": "trained by DeepPoly"}
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


DATA = {"digits": "digits", "mnist": "MNIST", "cifar10": "CIFAR-10"}


def benchmark(name):
    return json.loads((experiments.RESULTS / "benchmarks" / f"{name}.json").read_text())


def rows_of(name, what):
    return [r for r in benchmark(name)["results"] if r["what"] == what]


def measured(name):
    """By which command, at which commit and where the files NAME*.json were made."""
    files = sorted(p.stem for p in (experiments.RESULTS / "benchmarks").glob(f"{name}*.json"))
    lines = ["```text"]
    for file in files:
        run = benchmark(file)
        command = re.sub(r"(--data-dir|--checkout|--peer|--code) \S+", r"\1 DIR", run["command"])
        command = re.sub(r"--out \S+", f"--out results/benchmarks/{file}.json", command)
        lines.append(f"{command}      # at {run['commit'][:7]}, {run['device']}, "
                     f"{run['threads']} threads, torch {run['torch']}")
    return [*lines, "```"]


def population(name):
    """Losses of P networks: so many at once, against a loop over them."""
    lines = ["| P networks | bounds | one by one, ms each | 4 at once, times faster | 16 | all P | "
             "`train.py` takes |", "|" + "---|" * 7]
    for r in rows_of(name, "population"):
        ratio = {m: f"{v:.1f}" for m, v in r["ratios"].items()}
        lines.append(f"| {r['P']} of {DATA[r['dataset']]} {r['net']} | {NAME[r['relax']]} | "
                     f"{1e3 * median(r['times']['1']) / r['P']:.1f} | {ratio['4']} | {ratio['16']} "
                     f"| {ratio[str(r['P'])]} | {r['chosen']} at once: **{ratio[str(r['chosen'])]}"
                     "** |")
    return lines


def rgs_steps(name):
    lines = ["| network, batch | bounds | gradient, ms | RGS with 2 samples, ms | times as long |",
             "|" + "---|" * 5]
    for r in rows_of(name, "rgs"):
        lines.append(f"| {DATA[r['dataset']]} {r['net']}, {r['batch']} | {NAME[r['relax']]} | "
                     + " | ".join(f"{1e3 * median(t):.0f}" for t in r["times"].values())
                     + f" | **{r['ratio']:.2f}** |")
    return lines


def parts(name):
    """Rows of benchmarks/steps.py: ratios by the log and, in brackets, by CPU seconds."""
    lines = ["| bounds | CPU ms of a step: gradient | RGS in 2 parts | RGS, whole, there | RGS in "
             "parts / gradient | RGS there / gradient | times as fast as there |", "|" + "---|" * 7]
    for r in benchmark(name)["results"]:
        columns = [NAME[r["relax"]], *(f"{1e3 * median(t):.0f}" for t in r["cpu"].values()),
                   *("{:.2f} (**{:.2f}**)".format(*r[k]) for k in ("to_gradient",
                                                                  "there_to_gradient", "faster"))]
        lines.append("| " + " | ".join(columns) + " |")
    return lines


def growth(name):
    lines = ["| gradient of | seconds | for each image and member, ms | MiB |", "|" + "---|" * 4]
    for r in rows_of(name, "growth"):
        lines.append(f"| {DATA[r['dataset']]} {r['net']}, batch {r['batch']}, P = {r['P']} | "
                     f"{r['seconds']:.2f} | {1e3 * r['seconds'] / r['batch'] / r['P']:.1f} | "
                     f"{r['MiB']:.0f} |")
    return lines


def fits(name):
    """The largest sizes within a memory, from the steepest step between two rows of growth."""
    lines = ["| | 8 GB | 24 GB | 80 GB |", "|" + "---|" * 4]
    series = {}
    for r in rows_of(name, "growth"):
        series.setdefault((r["dataset"], r["net"]), []).append((r["batch"], r["P"], r["MiB"]))
    for (dataset, net), found in series.items():
        members = len({P for _, P, _ in found}) > 1
        size = [P if members else batch for batch, P, _ in found]
        MiB = [m for *_, m in found]
        steepest = max((b - a) / (n - m) for m, n, a, b in zip(size, size[1:], MiB, MiB[1:]))
        what = f"members with {found[0][0]} images each" if members else "images in a batch"
        fit = [size[-1] + (1e9 * GB / 2 ** 20 - MiB[-1]) / steepest for GB in (8, 24, 80)]
        lines.append(f"| {DATA[dataset]} {net}, {what} | "
                     + " | ".join(f"{float(f'{n:.2g}'):,.0f}" for n in fit) + " |")
    return lines


def scaling(name):
    run = benchmark(name)
    lines = [f"| a step of | one process, ms | {run['processes']} processes, ms | times as fast | "
             "bytes a process adds up |", "|" + "---|" * 5]
    for r in run["results"]:
        lines.append(f"| {r['case']} | {1e3 * r['seconds_one']:.0f} | "
                     f"{1e3 * r['seconds_many']:.0f} | **{r['ratio']:.2f}** | {r['bytes']:,} |")
    return lines


def reach(name):
    """The verdicts of benchmarks/certify.py, from results/benchmarks/NAME*.json."""
    lines = ["| network, eps | images | commit | natural, % | not attacked, % | "
             "certified up to DeepPoly, % | ... alpha-CROWN | ... branch and bound | unknown | "
             "seconds |", "|" + "---|" * 10]
    for path in sorted((experiments.RESULTS / "benchmarks").glob(f"{name}*.json")):
        run = benchmark(path.stem)
        verdicts, n = run["results"], len(run["results"])
        status = Counter(v["status"] for v in verdicts)
        stages = [v["stage"] for v in verdicts if v["status"] == "certified"]
        natural, late = n - status["misclassified"], ("branch-and-bound", "alpha-crown")
        share = [natural, natural - status["attacked"],
                 *(len(stages) - sum(map(stages.count, late[:i])) for i in (2, 1)), len(stages)]
        lines.append(f"| `{run['case']}`, {run['eps']:.3g} | {n} | `{run['commit'][:7]}` | "
                     + " | ".join(f"{100 * k / n:.1f}" for k in share[:-1])
                     + f" | **{100 * share[-1] / n:.1f}** | {status['unknown']} | "
                     f"{sum(v['seconds'] for v in verdicts):.0f} |")
    return lines


def heart(where):
    """Functions as they stand in a file, FILE:NAME or FILE:NAME,NAME."""
    file, names = where.split(":")
    text = (experiments.ROOT / file).read_text()
    found = {node.name: node for node in ast.parse(text).body if hasattr(node, "name")}
    parts = [text.splitlines()[found[name].lineno - 1:found[name].end_lineno]
             for name in names.split(",")]
    return ["```py", *"\n\n".join("\n".join(part) for part in parts).splitlines(), "```"]


def log(_):
    """What stands in the columns of log.csv."""
    return ["| column | meaning |", "|---|---|",
            *(f"| `{name}` | {meaning} |" for name, meaning in LOG.items())]


def fields(_):
    """What stands in a line of results/*.jsonl."""
    return ["| field | meaning |", "|---|---|",
            *(f"| `{name}` | {meaning} |" for name, meaning in labels.FIELDS.items())]


TABLES = {"results": results_table, "differences": differences, "source": source,
          "sweeps": sweeps, "variants": variants, "summary": summary, "speed": speed,
          "measured": measured, "population": population, "rgs": rgs_steps, "parts": parts,
          "growth": growth, "fits": fits, "scaling": scaling, "reach": reach, "gaps": gaps,
          "again": again, "heart": heart, "log": log, "fields": fields}
PAGES = [experiments.ROOT / page for page in ("README.md", "docs/runs.md", "results/README.md",
                                              "benchmarks/README.md")]


def filled(text):
    """A page with its tables made anew."""
    def fill(match):
        return "\n".join([match[1], *TABLES[match[2]](match[3]), match[4]])
    return re.sub(r"(<!-- (\S+) (\S+) -->)\n.*?(<!-- end -->)", fill, text, flags=re.S)


if __name__ == "__main__":
    labels.main()
    for page in PAGES:
        page.write_text(filled(page.read_text()))
