"""The parameter types of the functions in a compiled library, so that a call from Python can be checked.

C++ symbols carry their types in the mangled name; those of ``extern "C"`` functions are read from the sources.
"""

import ctypes
import re
from dataclasses import dataclass

from .errors import LaunchError
from .toolchain import as_sources, run, strip_comments

_SCALARS = {
    ctypes.c_bool: ("bool",),
    ctypes.c_int8: ("char", "signed char", "int8_t"),
    ctypes.c_uint8: ("unsigned char", "uint8_t"),
    ctypes.c_int16: ("short", "int16_t"),
    ctypes.c_uint16: ("unsigned short", "uint16_t"),
    ctypes.c_int32: ("int", "int32_t"),
    ctypes.c_uint32: ("unsigned", "unsigned int", "uint32_t"),
    ctypes.c_int64: ("long", "long long", "int64_t", "ptrdiff_t"),
    ctypes.c_uint64: ("unsigned long", "unsigned long long", "uint64_t", "size_t", "uintptr_t"),
    ctypes.c_float: ("float",),
    ctypes.c_double: ("double",),
}
_CTYPE_OF = {name: ctype for ctype, names in _SCALARS.items() for name in names}
_ELEMENT_BYTES = {name: ctypes.sizeof(ctype) for name, ctype in _CTYPE_OF.items()}
_ELEMENT_BYTES.update({"__half": 2, "__nv_bfloat16": 2, "half": 2})
_STREAMS = ("CUstream_st*", "cudaStream_t", "void*")


@dataclass
class ParameterType:
    """A C or C++ type. ``ctype`` is None for a by-value type that is not known here (an enum or a struct)."""

    name: str
    is_pointer: bool
    may_be_stream: bool
    ctype: type | None
    element_bytes: int | None  # of what a pointer points to, where known

    @classmethod
    def parse(cls, text):
        """'float const*', 'const float *x', 'int n = 3' -> type; a parameter's name is dropped where there is one."""
        text = text.split("=")[0]
        words = re.findall(r"[\w:]+(?:<[^<>]*>)?|[*&]|\[\s*\w*\s*\]", text)
        pointers = sum(word in ("*", "&") or word.startswith("[") for word in words)
        qualifiers = ("const", "volatile", "restrict", "__restrict__", "struct", "enum")
        names = [w.removeprefix("std::") for w in words if w not in qualifiers and (w[0].isalnum() or w[0] == "_")]
        base = " ".join(names)
        if base not in _CTYPE_OF and len(names) > 1:  # the last word is the parameter's name
            base = " ".join(names[:-1])
        name = base + "*" * pointers
        stream = name in _STREAMS
        return cls(
            name=name,
            is_pointer=pointers > 0 or stream,
            may_be_stream=stream,
            ctype=_CTYPE_OF.get(base) if not pointers else None,
            element_bytes=_ELEMENT_BYTES.get(base) if pointers == 1 else None,
        )


@dataclass
class Signature:
    name: str
    symbol: str
    parameters: list[ParameterType]

    def __str__(self):
        return f"{self.name}({', '.join(p.name for p in self.parameters)})"


def _split_parameters(text):
    """Split at the commas outside brackets."""
    depth, parts = 0, [""]
    for character in text:
        depth += (character in "<([") - (character in ">)]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    parts = [part.strip() for part in parts]
    return [] if parts in ([""], ["void"]) else parts


class SignatureTable:
    """Functions that a shared library exports, found by qualified name or by the end of it."""

    def __init__(self, library, sources):
        listed = [run("nm", "--defined-only", "-D", *flags, library).splitlines() for flags in ((), ("-C",))]
        self._symbols = []  # (symbol, demangled)
        for mangled, demangled in zip(*listed, strict=True):
            if " T " in mangled:
                self._symbols.append((mangled.split(" T ")[1], demangled.split(" T ")[1]))
        self._text = "\n".join(strip_comments(source.read_text()) for source in as_sources(sources))

    def find(self, name, argument_count):
        """The function called ``name`` ("launch", "lowbit::launch"); overloads are told apart by argument count."""
        candidates = []
        for symbol, demangled in self._symbols:
            qualified, _, parameters = demangled.partition("(")
            if qualified != name and not qualified.endswith("::" + name):
                continue
            if symbol == demangled:
                candidates.append(self._from_source(symbol))
            else:
                types = [ParameterType.parse(p) for p in _split_parameters(parameters.rpartition(")")[0])]
                candidates.append(Signature(qualified, symbol, types))
        if not candidates:
            names = [demangled.partition("(")[0] for _, demangled in self._symbols]
            known = ", ".join(n for n in names if not n.startswith(("cuda", "__cuda", "stub_")))
            raise LaunchError(f"no function {name} in the library, which has {known}")
        fitting = [c for c in candidates if len(c.parameters) == argument_count]
        if len(fitting) != 1:
            declared = " or ".join(str(c) for c in candidates)
            raise LaunchError(f"{declared}: got {argument_count} arguments")
        return fitting[0]

    def _from_source(self, name):
        match = re.search(rf"\b{re.escape(name)}\s*\(([^()]*)\)\s*(?:noexcept\s*)?\{{", self._text)
        if not match:
            raise LaunchError(f'cannot find the definition of extern "C" {name} in the sources')
        parameters = [ParameterType.parse(p) for p in _split_parameters(match.group(1))]
        return Signature(name, name, parameters)
