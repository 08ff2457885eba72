"""Pickles of plain data are read as Python reads them; everything else is refused, uncalled."""
import io
import os
import pickle
import pickletools
import resource

import numpy as np
import pytest

from plumbing.for_tests import mutations, python2_pickle
from plumbing.pickles import Array
from plumbing.pickles import read_pickle as read_file

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (5, 3072)).astype(np.uint8)
PLAIN = {"data": PIXELS, "labels": [1, 2, 3, 0, 9], "more": np.arange(5), "text": "a\xe9",
         "shape": (1, -2, 10 ** 9, 2 ** 40), "nested": [[], (), {"x": None, "y": [True, False]}],
         "columns": np.asfortranarray(PIXELS), "large": np.arange(70000, dtype=">i4")}


def read_pickle(content):
    return read_file(io.BytesIO(content))


def same(value, expected):
    if isinstance(value, Array):
        assert value.content.dtype == expected.dtype
        return np.array_equal(value.content, expected)
    if isinstance(value, dict):
        return value.keys() == expected.keys() and all(same(value[k], expected[k]) for k in value)
    if isinstance(value, list | tuple):
        return len(value) == len(expected) and all(map(same, value, expected))
    return type(value) is type(expected) and value == expected


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_is_read_as_python_reads_it(protocol):
    assert same(read_pickle(pickle.dumps(PLAIN, protocol)), PLAIN)


def test_a_batch_of_python_2_is_read_as_python_reads_it():
    content = python2_pickle(PIXELS, [3, 1, 4, 1, 5])
    expected = pickle.loads(content, encoding="bytes")
    assert np.array_equal(expected[b"data"], PIXELS)
    assert same(read_pickle(content), {k.decode(): v for k, v in expected.items()})


class Calls:
    """Pickled, it stands for a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


HUGE = b"X" + (10 ** 6).to_bytes(4, "little") + b"a" * 10 ** 6
REFUSED = {
    "a call of the system": pickle.dumps([Calls(os.system, "touch harm")], 4),
    "a call in protocol 2": pickle.dumps([Calls(os.system, "touch harm")], 2),
    "a call by an old instruction": b"(S'touch harm'\nios\nsystem\n.",
    "numpy's own functions": b"\x80\x02cnumpy\nempty\n(J\xff\xff\xff\x7f\x85tR.",
    "numpy.load": b"\x80\x02cnumpy\nload\nX\x04\x00\x00\x00harm\x85R.",
    "another reconstruct": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n"
                           b"cnumpy\nmemmap\nK\x00\x85U\x01b\x87R.",
    "objects": pickle.dumps(np.array([{}, []], object), 2),
    "structured types": pickle.dumps(np.zeros(2, "i4,f8"), 2),
    "a persistent name": b"\x80\x02U\x01aQ.", "an extension": b"\x80\x02\x82\x01.",
    "a class of one's own": pickle.dumps(Calls(Calls, 1), 2),
    "attributes for a list": b"\x80\x02]}U\x01aK\x01sb.",
    "an array of a terabyte": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
                              b"K\x00\x85U\x01b\x87R(K\x01\x8a\x06\0\0\0\0\0\x01\x85cnumpy\ndtype\n"
                              b"U\x02u1K\0K\1\x87R(K\3U\1|NNNK\0K\0K\0tb\x89U\x01atb.",
    "a string of a terabyte": b"\x80\x04\x8e\0\0\0\0\0\x01\0\0abc.",
    "a string copied again and again": b"\x80\x02(" + HUGE + b"q\x000" + b"c_codecs\nencode\nh\x00"
                                       b"X\x06\x00\x00\x00latin1\x86R" * 1000 + b"l.",
    "ten million lists": b"\x80\x02(" + b"]" * 10 ** 7 + b"l.",
    "a dictionary with tuples for keys": pickle.dumps({(1, 2): 3}, 2),
    "nothing": b"", "no end": pickle.dumps([1, 2], 2)[:-1], "more than one": b"\x80\x02]].",
    "more after its end": pickle.dumps([1, 2], 2) + b"x", "no beginning": b"\x80\x02e.",
    "a mark alone": b"\x80\x02(.", "an append to nothing": b"\x80\x02K\x01a.",
    "a name too few": b"\x80\x02h\x07.", "a text number": b"\x80\x02I" + b"9" * 10 ** 5 + b"\n."}


@pytest.mark.parametrize("what", REFUSED)
def test_anything_else_is_refused_before_it_takes_memory(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError):
        read_pickle(REFUSED[what])
    assert not list(tmp_path.iterdir())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024      # KiB


def kinds(value, seen):
    """The types of all that a value holds."""
    if id(value) in seen:
        return set()
    seen.add(id(value))
    parts = value.items() if isinstance(value, dict) else value
    inner = [kinds(part, seen) for part in parts] if isinstance(value, dict | list | tuple) else []
    return {type(value)}.union(*inner)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")             # of text in instructions
@pytest.mark.parametrize("content", [
    python2_pickle(PIXELS[:1, :], [7]), pickle.dumps({"data": PIXELS[:1], "labels": [3]}, 4),
    pickle.dumps(PLAIN | {"large": None}, 2)])
def test_fuzzed_pickles_hold_plain_data_only(content, monkeypatch):
    def never(*_):
        raise AssertionError("Python's own machine was used")
    monkeypatch.setattr(pickle, "loads", never)
    monkeypatch.setattr(pickle, "Unpickler", never)
    plain = {dict, list, tuple, str, bytes, bytearray, int, bool, type(None), Array}
    instructions = pickletools.optimize(content)                     # few pixels: much is structure
    for damaged in mutations(instructions, 2000):
        try:
            value = read_pickle(damaged)
        except ValueError:
            continue
        assert kinds(value, set()) <= plain
