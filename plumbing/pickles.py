"""Pickles of plain data, such as the batches of CIFAR-10: read, and nothing in them is called.

A pickle is a program for a small stack machine, which may import and call whatever it names. The
one below knows only the instructions that build numbers, strings, lists, tuples, dictionaries and
arrays. The few names that arrays are made with are words to it, with a meaning given here; any
other name, and any other instruction, is refused. It never takes much more memory than the file
has bytes: strings are parts of the file, arrays are views of strings, and steps are counted.
"""
import math
import pickletools

import numpy as np

MAX_STEPS = 10 ** 6          # instructions: a batch of CIFAR-10 needs 60,000
MARK = object()              # on the stack: where a list, tuple or dictionary began
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINSTRING", "BINSTRING",
            "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8", "SHORT_BINUNICODE",
            "BINUNICODE", "BINUNICODE8"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
NUMBERS = {"u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"}       # of arrays: integers of 1-8 bytes


NAMES = {"numpy ndarray", "numpy dtype", "numpy.core.multiarray _reconstruct",
         "numpy.core.numeric _frombuffer", "_codecs encode"}


class Name:
    """Of something to import: only its text, which is one of NAMES. numpy._core is what numpy 2
    calls numpy.core."""

    def __init__(self, module, name):
        self.text = f"{module} {name}".replace("numpy._core", "numpy.core")
        if self.text not in NAMES:
            raise ValueError(f"it names {self.text[:60]!r}, which is never imported")


class Type:
    """Of an array's numbers: one of NUMBERS, and, once it is built, their byte order."""

    def __init__(self, code):
        if code not in NUMBERS:
            raise ValueError("an array of something else than whole numbers")
        self.code, self.order = code, "|"

    def build(self, state):
        version, order, *_ = state
        self.order = as_text(order)
        if version not in (3, 4) or self.order not in ("<", ">", "|"):
            raise ValueError("an array of an unknown type")


class Array:
    """content: a read-only numpy array, once it is built."""
    content = None

    def build(self, state):
        version, shape, dtype, fortran, data = state
        if version != 1:
            raise ValueError("an array of an unknown version")
        self.fill(data, dtype, shape, "F" if fortran else "C")

    def fill(self, data, dtype, shape, order):
        """A view of data, if it has as many bytes as dtype and shape say."""
        if self.content is not None or not isinstance(dtype, Type):
            raise ValueError("an array that is built twice, or of no type")
        if not isinstance(data, bytes | bytearray) or not isinstance(shape, tuple):
            raise ValueError("an array without data or shape")
        if not all(type(n) is int and 0 <= n < 2 ** 40 for n in shape) or len(shape) > 4:
            raise ValueError("an array of an impossible shape")
        numbers = np.dtype(dtype.order + dtype.code)
        if math.prod(shape) * numbers.itemsize != len(data):
            raise ValueError("an array whose data has another size than its shape")
        self.content = np.frombuffer(data, numbers).reshape(shape, order=order)
        self.content.flags.writeable = False


def reduced(name, arguments):
    """What stands in a pickle as a call of a function, for the four that arrays need."""
    if name.text == "numpy dtype":
        code, *_ = arguments
        return Type(as_text(code))
    if name.text == "numpy.core.multiarray _reconstruct":
        kind, *_ = arguments
        if isinstance(kind, Name) and kind.text == "numpy ndarray":
            return Array()
    if name.text == "numpy.core.numeric _frombuffer":
        array = Array()
        array.fill(*arguments)
        return array
    if name.text == "_codecs encode":                    # how protocol 2 of Python 3 writes bytes
        text, encoding = arguments
        if encoding == "latin1":
            return text.encode("latin1")
    raise ValueError(f"an unusual call of {name.text}")


def as_text(value):
    return value.decode("latin1") if isinstance(value, bytes) else value


def read_pickle(file):
    """What an open binary file holds, Array standing for arrays. Strings of Python 2
    are bytes here, as with encoding="bytes". Raises ValueError for all that is not plain data."""
    content = file.read()                        # whole: a file would be asked for what it lacks
    try:
        return _run(content)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, StopIteration) as e:
        raise ValueError(f"its instructions do not fit together ({type(e).__name__})") from None


def _run(content):
    stack, memo, copied = [], {}, 0
    for step, (instruction, argument, place) in enumerate(pickletools.genops(content)):
        name = instruction.name
        if step >= MAX_STEPS:
            raise ValueError(f"more than {MAX_STEPS} instructions")
        if name in LITERALS:
            old = name.endswith("BINSTRING")
            stack.append(argument.encode("latin1") if old else argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name == "MARK":
            stack.append(MARK)
        elif name in TUPLES:
            stack.append(tuple(_popped(stack, TUPLES[name])))
        elif name == "TUPLE":
            stack.append(tuple(_since_mark(stack)))
        elif name in ("APPEND", "APPENDS"):
            _extend(stack, _popped(stack, 1) if name == "APPEND" else _since_mark(stack))
        elif name in ("SETITEM", "SETITEMS"):
            _update(stack, _popped(stack, 2) if name == "SETITEM" else _since_mark(stack))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(Name(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(Name(*_popped(stack, 2)))
        elif name == "REDUCE":
            function, arguments = _popped(stack, 2)
            stack.append(reduced(function, arguments))
            if isinstance(stack[-1], bytes):
                copied += len(stack[-1])
                if copied > len(content):                # one string, encoded again and again
                    raise ValueError("strings larger than the file")
        elif name == "BUILD":
            stack[-2].build(stack[-1])
            stack.pop()
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"the instruction {name}, which no plain data needs")
    if len(stack) != 1 or stack[0] is MARK or place != len(content) - 1:
        raise ValueError("it ends elsewhere than it should")
    return stack[0]


def _popped(stack, n):
    if len(stack) < n or any(value is MARK for value in stack[-n:]):
        raise ValueError("its instructions do not fit together")
    values = stack[-n:]
    del stack[-n:]
    return values


def _since_mark(stack):
    place = next(i for i in range(len(stack) - 1, -1, -1) if stack[i] is MARK)
    values = stack[place + 1:]
    del stack[place:]
    return values


def _extend(stack, values):
    if not isinstance(stack[-1], list):
        raise ValueError("a list that is none")
    stack[-1].extend(values)


def _update(stack, values):
    keys = [as_text(key) for key in values[::2]]
    if not isinstance(stack[-1], dict) or len(values) % 2 \
            or not all(isinstance(key, str) for key in keys):
        raise ValueError("a dictionary that is none, or whose keys are no strings")
    stack[-1].update(zip(keys, values[1::2]))
