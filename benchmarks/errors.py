"""Single errors in the Python of this checkout, drawn at random; mutants.py plants them.

A comparison, an operator, a sign, a constant or an index is off by the least that is possible; a
condition is negated; a line, an argument, a relu, a detach or a transposition is left out; two
arguments, or two functions such as minimum and maximum, are mixed up. Messages, annotations and
decorators are left alone. Errors are drawn by their kind first, all equally likely, then by place.
"""
import ast
import hashlib
import random
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent.parent
FILES = {                # of the first ones all functions, but those of the list below
    "relaxations.py": None, "gls.py": None, "train.py": None, "certify.py": None,
    "faster/layers.py": None, "faster/backward.py": None, "faster/windows.py": None,
    "faster/rows.py": None, "faster/network.py": None, "faster/reduced.py": None,
    "plumbing/attack.py": None, "plumbing/taps.py": None,
    "plumbing/linear_program.py": None, "plumbing/rounding.py": None,
    "plumbing/networks.py": ("ibp_init", "layers_of", "normalization", "update_batchnorm"),
    "plumbing/reports.py": ("outside_in", "inherited", "curve"),
    "plumbing/evaluations.py": ("comparison",), "plumbing/verdicts.py": ("charged", "Verdict")}
NO_MATHEMATICS = set("""
    main run arguments parse_args parse_config settings number count pick_device start_run
    train_and_show report log_row write_log table summary duration ranks fingerprint checksum
    check_agreement culprit first_not_finite process_group requests_to_stop locked claim
    new_folder newest_run load_run save_checkpoint write_whole keep_memory open_log sealed
    unsealed merge certify_run load_dataset self_check random_problem members_at_once Parser
    Progress Dataset ContradictionError InputError Interrupted Verdict Budget sizes_down
    is_dense default_memory Options check_settings
    show_training header at_start restored new_run network_of
    """.split())        # command lines, files, processes, printing, and what decides on speed alone
SWAPPED = dict(Lt="LtE", Gt="GtE", Eq="NotEq", Is="IsNot", In="NotIn", Add="Sub", Mult="Div",
               And="Or", BitAnd="BitOr", min="max", minimum="maximum", amin="amax", floor="ceil",
               argmin="argmax", all="any", mean="sum", zeros_like="ones_like", new_zeros="new_ones")
SWAPPED |= {new: old for old, new in SWAPPED.items()} | dict(FloorDiv="Mult", Pow="Mult")
DROPPED = ("relu", "abs", "detach", "square", "sign", "clamp", "sqrt", "rsqrt", "exp", "log")


class Mutant(NamedTuple):
    file: str
    function: str            # with its class, if it has one
    lines: range             # of the function
    kind: str
    line: int
    before: str
    after: str
    source: str              # the whole file with the error in it

    @property
    def key(self):
        """What tells it from all others, of this version of the file."""
        return hashlib.sha256(self.source.encode()).hexdigest()[:12]


# -------------------------------------------------------------------------------- kinds of error

def changed(node, **fields):
    return type(node)(**dict(ast.iter_fields(node)) | fields)


def swapped(op):
    return getattr(ast, SWAPPED[type(op).__name__])()


def of_call(node):
    """(kind, node, what takes its place) of errors in a call."""
    field = "attr" if isinstance(node.func, ast.Attribute) else "id"
    name, args, keywords = getattr(node.func, field, ""), node.args, node.keywords
    if name in SWAPPED:
        yield "function", node.func, changed(node.func, **{field: SWAPPED[name]})
    if name in DROPPED:
        module = field == "id" or getattr(node.func.value, "id", "") in ("torch", "F", "math", "np")
        yield "dropped", node, args[0] if module else node.func.value
    for i, k in enumerate(keywords):
        yield "argument dropped", node, changed(node, keywords=keywords[:i] + keywords[i + 1:])
        if k.arg in ("min", "max"):
            other = ast.keyword("max" if k.arg == "min" else "min", k.value)
            yield "function", node, changed(node, keywords=[
                other, *(o for o in keywords if o.arg not in ("min", "max"))])
    for i in range(1, len(args)):
        yield "arguments swapped", node, changed(
            node, args=[*args[:i - 1], args[i], args[i - 1], *args[i + 1:]])
    if len(args) > 1:
        yield "argument dropped", node, changed(node, args=args[:-1])


def of_expression(node):
    """(kind, node, what takes its place) of errors in any other expression."""
    match node:
        case ast.Compare(ops=[op]):
            yield "comparison", node, changed(node, ops=[swapped(op)])
        case ast.Compare(ops=[first, *rest]):
            yield "comparison", node, changed(node, ops=[swapped(first), *rest])
            yield "comparison", node, changed(node, ops=[first, *map(swapped, rest)])
        case ast.BoolOp():
            yield "and, or", node, changed(node, op=swapped(node.op))
        case ast.BinOp() if type(node.op).__name__ in SWAPPED:
            yield "arithmetic", node, changed(node, op=swapped(node.op))
        case ast.UnaryOp():
            yield "sign or not dropped", node, node.operand
        case ast.Constant(value=bool(value)):
            yield "constant", node, ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield "constant", node, ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            yield "constant", node, ast.Constant(2 * value or 0.5)
        case ast.Attribute(attr="mT" | "T"):
            yield "dropped", node, node.value
        case ast.Subscript(slice=ast.Name() | ast.BinOp()):
            yield "index", node.slice, ast.BinOp(node.slice, ast.Add(), ast.Constant(1))
        case ast.Slice():
            for end in filter(None, (node.lower, node.upper)):
                yield "index", end, ast.BinOp(end, ast.Add(), ast.Constant(1))


def of_statement(node, known):
    """(kind, node, what takes its place); known: names that have a value already."""
    for test in node.ifs if isinstance(node, ast.comprehension) else [getattr(node, "test", None)]:
        if test:
            yield "condition negated", test, ast.UnaryOp(ast.Not(), test)
    match node:
        case ast.Assign(targets=[ast.Name(id=name)]) if name in known:
            yield "line deleted", node, ast.Pass()
        case ast.AugAssign() | ast.Expr():
            yield "line deleted", node, ast.Pass()
    match node:
        case ast.Assign(value=ast.BinOp()) | ast.Return(value=ast.BinOp()):
            yield "negated", node.value, ast.UnaryOp(ast.USub(), node.value)


def walk(node):
    """A node and all below it, but messages, annotations, docstrings and decorators."""
    yield node
    match node:
        case ast.FunctionDef():
            children = [node.args, *node.body]
        case ast.arguments():
            children = filter(None, [*node.defaults, *node.kw_defaults])
        case ast.JoinedStr() | ast.Raise() | ast.Expr(value=ast.Constant()):
            children = []
        case _:
            children = ast.iter_child_nodes(node)
    for child in children:
        yield from walk(child)


def errors(function):
    known = {a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg)}
    for node in walk(function):
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not docstring:
            yield from of_call(node) if isinstance(node, ast.Call) else of_expression(node)
            yield from of_statement(node, known)
        known |= {t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)}


def carries_mathematics(file, *names):
    chosen = FILES[file]
    return not set(names) & NO_MATHEMATICS if chosen is None else names[0] in chosen


def functions(file):
    """(name, node) of the functions of a file that carry mathematics."""
    for node in ast.parse((HERE / file).read_text()).body:
        for f in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(f, ast.FunctionDef) and carries_mathematics(file, node.name, f.name):
                yield f.name if f is node else f"{node.name}.{f.name}", f


def told(file):
    """The source of a file, in which each of these functions adds itself to CALLED."""
    lines = (HERE / file).read_text().splitlines(keepends=True)
    for _, f in sorted(functions(file), key=lambda named: -named[1].lineno):
        has_docstring = ast.get_docstring(f) is not None and len(f.body) > 1
        first = f.body[has_docstring]
        start = min([first.lineno, *(d.lineno for d in getattr(first, "decorator_list", []))])
        indent = " " * first.col_offset
        lines.insert(start - 1, f'{indent}CALLED.add("{file}:{f.lineno}")\n')
    return "".join(lines)


def plant(file, name, function, kind, old, new):
    """The Mutant with new in the place of old; None if there it is no Python, or changes nothing.
    """
    source = (HERE / file).read_bytes()
    ends = [0]
    for line in source.splitlines(keepends=True):
        ends.append(ends[-1] + len(line))
    start = ends[old.lineno - 1] + old.col_offset
    end = ends[old.end_lineno - 1] + old.end_col_offset
    text = ast.unparse(ast.fix_missing_locations(new))
    meant = text if isinstance(new, ast.Pass) else f"({text})"       # whatever stands around it
    try:
        sources = [source[:start] + t.encode() + source[end:] for t in (text, meant)]
        plain, wanted = (ast.dump(ast.parse(s)) for s in sources)
    except SyntaxError:
        return None
    if wanted == ast.dump(ast.parse(source)):
        return None
    first = min([function.lineno, *(d.lineno for d in function.decorator_list)])
    text, planted = (text, sources[0]) if plain == wanted else (meant, sources[1])
    return Mutant(file, name, range(first, function.end_lineno + 1), kind, old.lineno,
                  source[start:end].decode(), text, planted.decode())


def draw(chosen, count, seed):
    """So many errors of the chosen functions ("FILE" or "FILE:NAME"; none: of all)."""
    kinds, generator, drawn = defaultdict(list), random.Random(seed), []
    for file in FILES:
        for name, function in functions(file):
            if not chosen or {file, f"{file}:{name}"} & set(chosen):
                for kind, old, new in errors(function):
                    kinds[kind].append((file, name, function, kind, old, new))
    while kinds and len(drawn) < count:
        kind = generator.choice(sorted(kinds))
        place = kinds[kind].pop(generator.randrange(len(kinds[kind])))
        kinds = {k: places for k, places in kinds.items() if places}
        drawn += filter(None, [plant(*place)])
    return drawn
