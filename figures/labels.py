"""Which table or sweep a line of results/*.jsonl belongs to, written into it; and what its fields
mean. Lines that experiments.py has added get theirs from

    python figures/labels.py                  or from figures/tables.py, which calls it

after which pandas gives the numbers of the pages:

    cells = pandas.read_json("results/digits.jsonl", lines=True).query("in_table")
    (100 * cells.certified / cells.n).groupby([cells.relax, cells.opt]).mean()
"""
import json

import experiments

FIELDS = {
    "table": "the table, as experiments.py calls it",
    "in_table": "whether the line counts in that table; the others are of sweeps and tuning",
    "sweeps": "the options whose sweeps it counts in",
    "relax": "the training loss", "opt": "the gradient", "seed": "of the training",
    "settings": "what was tuned, or swept, with the values of this line",
    "train": "the command that trained it; without --parts, --parts 1 was its default",
    "certify": "the command that certified it",
    "n": "images certified: test images, or, to tune, held-out ones",
    "natural": "how many are classified right", "attacked": "... have a counterexample",
    "certified": "... are certified",
    "unknown": "... are neither: time was up, or rounding hides it",
    "certified_by": "how many each stage certified", "train_seconds": "of training",
    "certify_seconds": "of certification, all images together",
    "curve": "eps, loss and certified fraction after each epoch of training",
    "failed": "instead of counts: why the training stopped",
    "commit": "of the code", "processor": "that computed it", "threads": "of PyTorch",
    "jobs": "processes on the machine at that time", "torch": "version of PyTorch",
}


def commands(table, cells):
    return {"python train.py " + " ".join(experiments.command(table, method, seed, chosen, **more))
            for method, seed, chosen, more in cells}


def labels(name):
    """A function: the labels of a line of results/NAME.jsonl. NAME-again has the table's cells."""
    of = name.removesuffix("-tuning")
    base = of.removesuffix("-again")
    table, of_table, of_sweep = experiments.TABLES[base], set(), {}
    if of == name:
        of_table = commands(table, experiments.table_cells(base, table))
        for option in table["sweeps"] if of == base else []:
            one = table | dict(sweeps={option: table["sweeps"][option]})
            of_sweep[option] = commands(one, experiments.sweep_cells(base, one))

    def of_line(train):
        sweeps = [option for option, lines in of_sweep.items() if train in lines]
        return dict(table=of, in_table=train in of_table, sweeps=sweeps)
    return of_line


def labelled(name):
    """The lines of results/NAME.jsonl with their labels in front."""
    of_line = labels(name)
    return [json.dumps(of_line(cell["train"]) | {k: v for k, v in cell.items() if k not in
                                                 ("table", "in_table", "sweeps")})
            for cell in experiments.read(name)]


def main():
    for path in sorted(experiments.RESULTS.glob("*.jsonl")):
        lines = labelled(path.stem)
        if lines != path.read_text().splitlines():
            path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
