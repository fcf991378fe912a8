"""Unpickle data and tensors and nothing else: no name in a pickle is imported, and nothing that it names is called.

A pickle names classes and functions. The few that state dicts need stand for functions of `pickled.py`; names that
could act are refused; every other name becomes an `Inert` object.
"""

import _compat_pickle
import argparse
import pickle
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from dvit_infer.models.pickled import DTYPES, KNOWN, Inert, Known, NumpyType, Refused, Storage, set_array

# Of Python's own modules, those whose classes lie beside weights; all others are refused.
_HARMLESS = re.compile(
    r"(abc|argparse|array|calendar|collections|contextlib|copyreg|dataclasses|datetime|decimal|enum|fractions|functools|inspect"
    r"|ipaddress|itertools|logging|numbers|pathlib|queue|random|re|statistics|string|time|typing|uuid|weakref|zoneinfo)\..*"
    r"|types\.(SimpleNamespace|MappingProxyType)"
    r"|builtins\.(bool|bytearray|complex|dict|float|int|list|object|range|slice|str|tuple|type)"
)
# Of other packages, what acts; modules of older Pythons; and Python's modules reached through another.
_REFUSED = re.compile(
    r"(IPython|asynchat|asyncore|cffi|cgi|cloudpickle|commands|dill|distutils|fabric|httpx|imp|joblib|lib2to3|paramiko|pexpect"
    r"|pip|pipes|pkg_resources|popen2|psutil|pytest|requests|setuptools|sh|smtpd|telnetlib|urllib2|urllib3"
    r"|numpy\.(ctypeslib|distutils|f2py|fromfile|lib|load|memmap|testing)"
    r"|torch\.(_dynamo|_inductor|compile|fx|hub|jit|load|multiprocessing|package|save|serialization)"
    r"|torch\.(storage\._load_from_bytes|utils\.cpp_extension|utils\.model_zoo)"
    r"|(.*\.)?_?(os|posix|nt|sys|subprocess|importlib|runpy|ctypes|socket|shutil))(\..*)?"
)
# What needs no note: containers and types, as parts of what is named or read.
_UNNAMED = re.compile(r"(builtins|collections|copyreg|typing)\..*|numpy\.ndarray|torch\.(device|Tensor|.*Storage)")


class Unpickler(pickle._Unpickler):
    """Reads one pickle.

    Args:
        file: has `read(n)` and `readline()`.
        storage: returns the `Storage` of a persistent id.
    """

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[Any] = defaultdict(lambda: Unpickler.load_unknown, pickle._Unpickler.dispatch)

    def __init__(self, file: Any, storage: Callable[[tuple[Any, ...]], Storage] | None = None) -> None:
        super().__init__(file, encoding="latin1")
        self.skipped: dict[str, None] = {}  # the classes that became inert, in their order
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        full = f"{module}.{name}"
        if full in DTYPES:
            return DTYPES[full]
        if full in KNOWN:
            return Known(full, KNOWN[full])
        is_pythons = module.partition(".")[0] in sys.stdlib_module_names
        if _REFUSED.fullmatch(full) or (is_pythons and not _HARMLESS.fullmatch(full)):
            raise Refused(full)
        if not _UNNAMED.fullmatch(full):
            self.skipped[full] = None
        return Inert(full)

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and pid[:1] == ("module",) and len(pid) > 1:  # a class with its source, in old files
            return pid[1]
        is_storage = isinstance(pid, tuple) and len(pid) > 4 and isinstance(pid[2], str | int)
        if self._storage is None or not is_storage or pid[0] != "storage":
            raise pickle.UnpicklingError("an unknown persistent id")
        return self._storage(pid)

    def load_unknown(self) -> None:
        raise pickle.UnpicklingError("Unsupported operand")

    def load_reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(args, tuple):
            raise pickle.UnpicklingError("arguments that are no tuple")
        if isinstance(function, Known):
            self.append(function.make(*args))
        elif isinstance(function, Inert):
            makes_its_first = function.name in ("copyreg._reconstructor", "copyreg.__newobj__")
            of = args[0] if makes_its_first and args and isinstance(args[0], Inert) else function
            self.append(Inert(of.name))
        else:
            raise pickle.UnpicklingError("Unsupported operand: a call of what is no function")

    def load_newobj(self) -> None:
        self.load_reduce()

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # arguments by name: of known classes none takes them
        self.load_reduce()

    def load_build(self) -> None:
        """Set an object's state: that of a Namespace and of NumPy's arrays and types; that of others is dropped."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Inert):
            target.is_module = isinstance(state, dict) and {"_modules", "_parameters"} <= state.keys()
        elif isinstance(target, argparse.Namespace) and isinstance(state, dict):
            vars(target).update({key: value for key, value in state.items() if isinstance(key, str)})
        elif isinstance(target, NumpyType) and isinstance(state, tuple):
            if len(state) > 1 and state[1] in ("<", ">"):
                target.dtype = target.dtype.newbyteorder(state[1])
        elif isinstance(target, np.ndarray) and isinstance(state, tuple):
            if not set_array(target, *state):
                self.skipped["numpy.ndarray"] = None
        elif not isinstance(target, dict):
            raise pickle.UnpicklingError("Unsupported operand: a state for what has none")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set(items)

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Inert):
            return
        if type(target) is not dict or len(items) % 2:
            raise pickle.UnpicklingError("Unsupported operand: an item for what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a tuple of tuples of tuples ... can overflow the stack.
            if isinstance(key, tuple) and any(isinstance(part, tuple) for part in key):
                raise pickle.UnpicklingError("Unsupported operand: a nested key")
            target[key] = value

    def load_append(self) -> None:
        value = self.stack.pop()
        self._extend([value])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Inert):
            return
        if type(target) is not list:
            raise pickle.UnpicklingError("Unsupported operand: an element for what is no list")
        target.extend(items)

    def load_empty_set(self) -> None:
        self.append([])

    def load_frozenset(self) -> None:
        self.append(self.pop_mark())

    dispatch.update(
        {
            pickle.REDUCE[0]: load_reduce,
            pickle.NEWOBJ[0]: load_newobj,
            pickle.NEWOBJ_EX[0]: load_newobj_ex,
            pickle.BUILD[0]: load_build,
            pickle.SETITEM[0]: load_setitem,
            pickle.SETITEMS[0]: load_setitems,
            pickle.DICT[0]: load_dict,
            pickle.APPEND[0]: load_append,
            pickle.APPENDS[0]: load_appends,
            pickle.ADDITEMS[0]: load_appends,
            pickle.EMPTY_SET[0]: load_empty_set,
            pickle.FROZENSET[0]: load_frozenset,
        }
    )
    # Classes by their registered number, objects by their class's constructor, buffers of any claimed size.
    for _code in (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ, pickle.PERSID):
        del dispatch[_code[0]]
    for _code in (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER):
        del dispatch[_code[0]]
