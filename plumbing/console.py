"""The command line: settings and their parser, one-line errors, progress, the machine's devices."""
import argparse
import ctypes
import math
import os
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch


class InputError(ValueError, argparse.ArgumentTypeError):
    """Something the user gave cannot be used; the message names it and the mend. (The second base
    class makes argparse show it as it is, after the name of the option.)"""

    @classmethod
    def raised(cls, message):
        raise cls(message)


class Interrupted(Exception):
    """A signal asked to stop; everything is saved. args: its number, and how to go on."""


def warn(text):
    """One line on stderr, of the first of many processes: allowed, but probably a mistake."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"warning: {text}", file=sys.stderr)


# --------------------------------------------------------------------------------------- settings

class Setting(NamedTuple):
    """One option of a command line.

    default: a value, {key: value} where it depends on another setting, or None.
    limits: an argument type such as number and count make, a tuple of choices, bool for a switch,
    or [type] for any number of values.
    meaning: the line of help; where default is None it says what happens then.
    source: where the default is from.
    """
    default: object
    limits: object
    meaning: str
    source: str = ""


class Parser(argparse.ArgumentParser):
    """Errors are one line; options are written out, so that a new one never changes an old line."""

    def __init__(self, *args, allow_abbrev=False, **options):
        super().__init__(*args, allow_abbrev=allow_abbrev, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser_of(settings, prog, description):
    """A Parser with an option for each of {name: Setting}. What it returns holds what was given
    only: the rest is for defaults to fill in."""
    parser = Parser(prog=prog, description=description, argument_default=argparse.SUPPRESS)
    for name, setting in settings.items():
        default = shown(setting.default)
        text = setting.meaning + (f"; default: {default}" if default else "")
        option = dict(help=text.replace("%", "%%"))
        if setting.limits is bool:
            option["action"] = argparse.BooleanOptionalAction
        elif isinstance(setting.limits, tuple):
            option["choices"] = setting.limits
        elif isinstance(setting.limits, list):
            option |= dict(type=setting.limits[0], nargs="*")
        else:
            option["type"] = setting.limits
        parser.add_argument("--" + name.replace("_", "-"), **option)
    return parser


def defaults(settings, *keys):
    """{name: value}; where a default depends on another setting, that of the first key it has."""
    values = {}
    for name, setting in settings.items():
        value = setting.default
        if isinstance(value, dict):
            value = value[next(key for key in keys if key in value)]
        values[name] = float(value) if isinstance(value, Fraction) else value
    return values


def with_defaults(settings, given, kind):
    """All settings of train.py: those given, and the defaults of the rest for this kind of data."""
    recipe = defaults(settings, kind, given.get("opt", settings["opt"].default))
    config = recipe | given
    del config["resume"]
    if "epochs" in given and "ramp" not in given:          # a shorter run keeps the recipe's shape
        scale = given["epochs"] / recipe["epochs"]
        config["ramp"] = round(recipe["ramp"] * scale)
        if "milestones" not in given:
            config["milestones"] = [max(1, round(m * scale)) for m in recipe["milestones"]]
    if config["eps_train"] is None:
        config["eps_train"] = config["eps"]
    if config["opt"] == "grad":
        config |= dict(samples=1, sigma=0.0)
    if "parts" not in given and config["samples"] % config["parts"]:
        config["parts"] = 1
    return config


def shown(default):
    """A default as the help shows it: "0.1 (digits), 2/255 (cifar10)"."""
    if isinstance(default, dict):
        return ", ".join(f"{shown(value)} ({key})" for key, value in default.items())
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, list):
        return " ".join(map(shown, default))
    return "" if default is None else str(default)


def checked(settings, given, but=()):
    """Settings given in Python, of {name: Setting} without some, with the limits of the command
    line. Raises InputError."""
    values = {}
    for name, value in given.items():
        if name not in settings or name in but:
            known = ", ".join(key for key in settings if key not in but)
            raise InputError(f"{name} is no setting here; known are {known}")
        limits = settings[name].limits
        choices = (False, True) if limits is bool else limits
        if isinstance(choices, tuple):
            if value not in choices:
                raise InputError(f"{name}={value!r} has to be one of {choices}")
            values[name] = value
        elif isinstance(limits, list):
            if not isinstance(value, (list, tuple)):
                raise InputError(f"{name}={value!r} has to be a list")
            values[name] = [limits[0](str(each)) for each in value]
        else:
            values[name] = limits(str(value))
    return values


def check_together(config, relaxations, error):
    """Settings that are right one by one, but not together."""
    opt, relax, samples, parts = (config[k] for k in ("opt", "relax", "samples", "parts"))
    paired = opt == "pgpe" or opt == "rgs" and config["antithetic"]
    if paired and samples % 2:
        error(f"argument --samples: {samples} is odd, but {opt} uses antithetic pairs; use "
              f"{samples + 1}" + ", or --no-antithetic" * (opt == "rgs"))
    if samples % (2 * parts if opt == "pgpe" else parts):
        error(f"argument --parts: {opt} cannot use {parts} parts equally often with {samples} "
              "samples" + ", which are pairs" * (opt == "pgpe"))
    if config["loss"] == "certified-error" and opt != "pgpe":
        error("argument --loss: the gradient of certified-error is 0; use --opt pgpe")
    if config["loss"] == "certified-error" and relax not in relaxations:
        error(f"argument --loss: {relax} has no certified-error; use a --relax of "
              + ", ".join(relaxations))
    if config["sigma_adapt"] != "fixed" and opt != "pgpe":
        error("argument --sigma-adapt: only --opt pgpe estimates a gradient of sigma, not "
              f"--opt {opt}; use fixed")


def warn_without_effect(settings, given, config):
    """Name what was given, but is not read with the other settings. Whose meaning begins "rgs,
    pgpe: ..." is read if another setting, which has these among its choices, has one of them."""
    for name in given.keys() & settings.keys():
        words, colon, _ = settings[name].meaning.partition(": ")
        readers = words.split(", ")
        for other, setting in settings.items():
            choices = setting.limits if isinstance(setting.limits, tuple) else ()
            if colon and set(readers) <= set(choices) and config[other] not in readers:
                warn(f"--{name.replace('_', '-')} has no effect with --{other.replace('_', '-')} "
                     f"{config[other]}: only {words} read it")
                break


def refuse_others(parser, given, option, *allowed):
    """With this option, only those allowed may be given: a run keeps its settings."""
    others = sorted(given.keys() - {option, *allowed})
    if others:
        names = ", ".join("--" + name.replace("_", "-") for name in others)
        parser.error(f"argument --{option}: a run keeps its settings; leave out {names}")


def number(low, high=math.inf, open_low=False, endless=False):
    """An argument type: a number or fraction ("8/255") within limits; inf, if it may be endless."""
    limits = f"{'>' if open_low else '>='} {low:g}"
    if high < math.inf:
        limits += f" and <= {high:g}"

    def parse(text):
        try:
            value = float(Fraction(text)) if "/" in text else float(text)
        except (ValueError, ZeroDivisionError):
            value = math.nan
        seen = ctypes.c_float(value).value               # 1e-50 is 0 for a network, 1e50 is inf
        above = low < seen if open_low else low <= seen
        if not above or not value <= high or math.isinf(seen) and not endless:
            raise InputError(
                f"{text!r} has to be a number {limits}, such as 0.1 or 2/255")
        return value
    return parse


unit = number(0, 1)                          # [0, 1]
positive_unit = number(0, 1, open_low=True)
positive = number(0, open_low=True)
not_negative = number(0)


def count(low, high=10 ** 9):
    """An argument type: a whole number within limits."""
    def parse(text):
        if not text.lstrip("-").isdigit() or not low <= int(text) <= high:
            raise InputError(f"{text!r} has to be a whole number >= {low}")
        return int(text)
    return parse


# --------------------------------------------------------------------------------------- printing

class Progress:
    """One line that rewrites itself on a terminal; elsewhere a line at most every 10 seconds, but
    every 3 in the first minute. In a with block a line that stays is shown again as often, with its
    age: nothing is silent for long."""

    def __init__(self):
        self.terminal, self.last, self.begun = sys.stdout.isatty(), 0.0, time.time()
        self.line, self.given, self.over = "", time.time(), threading.Event()

    def __call__(self, line, force=False):
        self.line, self.given = line, time.time()
        if force or time.time() - self.last >= (0.2 if self.terminal else self.every()):
            self.put(line, "" if self.terminal else "\n")

    def every(self):
        return 3.0 if time.time() < self.begun + 60 else 10.0

    def put(self, line, end):
        print(f"\r{line}\033[K" if self.terminal else line, end=end, flush=True)
        self.last = time.time()

    def done(self, line):
        self.line = ""
        self.put(line, "\n")

    def __enter__(self):
        threading.Thread(target=self.tick, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.over.set()

    def tick(self):
        while not self.over.wait(0.5):
            now, every = time.time(), 3.0 if self.terminal else self.every()
            if self.line and now - self.given >= 2.5 and now - self.last >= every - 0.5:
                age = f"  ({now - self.given:.0f} s ago)"
                self.put(self.line + age, "" if self.terminal else "\n")


def header(config, data, net):
    """What is about to be trained, as lines of text."""
    parameters = sum(p.numel() for p in net.parameters())
    n = len(data.x_train[:config["subset"]])
    n_test = len(data.x_test[:config["test_subset"]])
    return (f"{Path(config['dataset']).stem}: {n} training and {n_test} test images "
            f"{tuple(config['input_shape'])}, {data.classes} classes\n"
            f"{config['net']}: {parameters} parameters; {config['relax']} bounds, {config['opt']}; "
            f"eps {config['eps_train']:.4g} in training, {config['eps']:.4g} in the test; "
            f"{config['device']}")


def show_training(rows, config, show):
    """The end of the log in one line, and a warning if nothing was learnt."""
    last, classes = rows[-1], config["classes"]
    epochs = f"{len(rows)} epoch" + "s" * (len(rows) != 1)
    power = 2 if "taps" in config.get("relax", "") else 1     # its loss is a product of two
    guessing = math.log(classes) ** power
    show.done(f"trained {epochs} in {duration(last['seconds'])}: loss "
              f"{decimals(last['loss'])}, {100 * last['certified']:.1f} % certified in training")
    is_error = config.get("loss") == "certified-error"        # no cross-entropy to compare with
    if not is_error and config["ramp"] < config["epochs"] and last["loss"] > 0.98 * guessing:
        more = last["loss"] / guessing - 1
        what = "about that" if more < 0.05 else f"{100 * more:.0f} % above that" if more < 1 else \
            f"{more + 1:.3g} times that"
        warn(f"the loss, {last['loss']:.4g}, is {what} of guessing {classes} classes, "
             f"{guessing:.3f}; try a longer --ramp, a smaller --eps-train or --lr, or --relax box")


TITLES = {"natural": "natural accuracy", "attack": "under attack (PGD)",
          "box": "certified by box (IBP)", "crown-ibp": "certified by CROWN-IBP",
          "deeppoly": "certified by DeepPoly", "best": "certified by the best of them"}


def table(result):
    """An evaluation {name: (n,) bool} as lines of text."""
    n = len(result["natural"])
    return [f"  {TITLES[k]:32}{100 * v.float().mean():6.2f} %   {int(v.sum())}/{n}"
            for k, v in result.items()]


def decimals(value):
    """A number with four decimals, unless these are lost in its size: 4.1e+19."""
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4g}"


def duration(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


# ------------------------------------------------------------------------------------ the machine

def pick_device(name):
    """The torch.device of --device; with CUDA, this process's own."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    if name == "cuda" and not cuda:
        raise InputError("--device cuda: this PyTorch finds no CUDA GPU; use --device cpu, or auto")
    if name == "mps" and not mps:
        raise InputError("--device mps: this PyTorch finds no Apple GPU; use --device cpu, or auto")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)


def keep_memory():
    """Tell glibc's malloc to keep freed memory instead of handing it back to the system.

    A step frees and allocates the same megabytes again and again, and each fresh page costs a
    fault: about a third of a DeepPoly step on a CPU. No effect with another C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(-4, 0)            # M_MMAP_MAX
    mallopt(-1, -1)           # M_TRIM_THRESHOLD: never
    mallopt(-2, 2 ** 26)      # M_TOP_PAD


def run(main):
    """Run a command line: whatever the user can mend is one line on stderr and exit status 2."""
    keep_memory()
    try:
        main()
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as e:
        print(f"stopped: {e}", file=sys.stderr)
        sys.exit(1)
    except Interrupted as e:
        number, how = e.args
        print(f"\ninterrupted and saved; {how}", file=sys.stderr)
        sys.exit(128 + number)
    except KeyboardInterrupt:
        print("\ninterrupted; the run folder is complete up to the last epoch or verdict",
              file=sys.stderr)
        sys.exit(130)
