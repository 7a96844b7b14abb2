"""PTX text -> functions made of instructions, and the variables they use (PTX ISA 4, "Syntax").

Nothing is checked here that the assembler checks: the input is what nvcc or Triton wrote.
"""

import os
import re
import struct
from dataclasses import dataclass, field

from .errors import EmulatorError
from .ptx_types import TYPES, PtxType


class Instruction:
    """One instruction as written, and what the compiler makes of it.

    As written: ``opcode`` ("ld.global.f32"), ``parts`` (split at the dots), ``operands``, ``guard`` (predicate name
    and whether negated, or None), ``line`` in the PTX, ``text``, ``location`` ((file, line) of the source or None),
    ``function`` and ``scopes`` (the nested { } blocks it stands in).
    Compiled: ``kind`` says how the engine treats it, ``run(batch, mask)`` executes it, ``target`` is a branch's
    destination, ``members`` gives the membermask of a warp-synchronous instruction, ``barrier`` the fields of a bar.
    """

    __slots__ = (
        "opcode",
        "parts",
        "operands",
        "guard",
        "line",
        "text",
        "location",
        "function",
        "scopes",
        "index",
        "kind",
        "run",
        "target",
        "members",
        "barrier",
        "unsupported",
    )

    def __init__(self, function, opcode, operands, guard, line, text, location, scopes):
        self.function, self.opcode, self.operands, self.guard = function, opcode, operands, guard
        self.parts = opcode.split(".")
        self.line, self.text, self.location, self.scopes = line, text, location, scopes
        self.index = len(function.code)
        self.kind = self.run = self.target = self.members = self.barrier = self.unsupported = None

    @property
    def where(self):
        """Kernel, PTX line, source line and text: the end of every error message."""
        what = "kernel" if self.function.is_kernel else "function"
        source = " ({}:{})".format(*self.location) if self.location else ""
        return f"{what} {self.function.name}, PTX line {self.line}{source}: {self.text}"


@dataclass
class Parameter:
    name: str
    type: PtxType
    size: int
    align: int
    is_array: bool  # a struct passed by value


@dataclass
class Variable:
    """A module-scope or shared variable. ``initial`` is None except for .global and .const."""

    name: str
    space: str
    size: int
    align: int
    initial: bytes | None = None


@dataclass
class Register:
    index: int
    bits: int


class Function:
    """A kernel (.entry) or a device function (.func)."""

    def __init__(self, name, is_kernel):
        self.name, self.is_kernel = name, is_kernel
        self.parameters: list[Parameter] = []
        self.returns: list[Parameter] = []
        self.code: list[Instruction] = []
        self.labels: dict[tuple[str, int], int] = {}  # (label, scope) -> index into code
        self.branch_targets: dict[str, list[str]] = {}
        self.registers: dict[tuple[str, int], Register] = {}  # (name, scope)
        self.register_ranges: dict[tuple[str, int], PtxType] = {}  # ("%r", scope) for ".reg .b32 %r<38>"
        self.register_bits: list[int] = []
        self.shared: dict[str, Variable] = {}
        self.local_offsets: dict[str, int] = {}
        self.local_size = 0
        self.required_block: tuple[int, int, int] | None = None  # .reqntid
        self.max_threads: int | None = None  # .maxntid: __launch_bounds__
        self.compiled = False
        self.never_written: list[tuple[Instruction, str]] = []

    def new_register(self, t):
        self.register_bits.append(t.bits)
        return Register(len(self.register_bits) - 1, t.bits)


@dataclass
class ParsedModule:
    functions: dict[str, Function] = field(default_factory=dict)
    globals: dict[str, Variable] = field(default_factory=dict)
    shared: dict[str, Variable] = field(default_factory=dict)
    dynamic_shared: dict[str, int] = field(default_factory=dict)  # name -> alignment


# ---- text -> statements


def split_operands(text):
    """Split at the commas outside brackets."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    if current.strip():
        parts.append(current.strip())
    return parts


@dataclass
class Statement:
    kind: str  # statement, {, }, label or header
    text: str
    line: int
    location: tuple[str, int] | None


_IGNORED_DIRECTIVES = (".version", ".target", ".address_size")
_LABEL = re.compile(r"[A-Za-z_$%][\w$]*")
_FUNCTION_HEADER = re.compile(r"\.(entry|func)\b")


def _source_files(text):
    """.file directives: number -> file name without its folder."""
    return {int(n): os.path.basename(path) for n, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M)}


def statements(text):
    """Yield the statements of a PTX text in order, each with its line and the source line last named by .loc."""
    files = _source_files(text)
    text = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m.group(0)), text, flags=re.S)
    pending, start, depth, location = "", 0, 0, None
    section_depth = None  # inside a debug .section { }, which is skipped
    for number, line in enumerate(text.split("\n"), 1):
        line = line.split("//", 1)[0].rstrip()
        stripped = line.strip()
        if section_depth is not None or (not pending.strip() and stripped.startswith(".section")):
            section_depth = (section_depth or 0) + stripped.count("{") - stripped.count("}")
            if section_depth <= 0 and ("}" in stripped or "{" in stripped):
                section_depth = None
            continue
        if not pending.strip():
            if re.match(r"\.loc\b", stripped):
                fields = stripped.replace(",", " ").split()
                location = (files.get(int(fields[1]), f"file {fields[1]}"), int(fields[2]))
                continue
            if stripped.startswith(_IGNORED_DIRECTIVES) or re.match(r"\.file\b", stripped):
                continue
        for position, character in enumerate(line):
            nothing_pending = not pending.strip()
            if depth == 0 and character in "{}" and nothing_pending:
                yield Statement(character, character, number, location)
                pending = ""
            elif depth == 0 and character == "{" and _FUNCTION_HEADER.search(pending) and "=" not in pending:
                yield Statement("header", pending.strip(), start, location)
                yield Statement("{", "{", number, location)
                pending = ""
            elif depth == 0 and character == ";":
                if not nothing_pending:
                    yield Statement("statement", re.sub(r"\s+", " ", pending.strip()), start, location)
                pending = ""
            elif (
                depth == 0
                and character == ":"
                and line[position + 1 : position + 2] != ":"
                and _LABEL.fullmatch(pending.strip())
            ):
                yield Statement("label", pending.strip(), start, location)
                pending = ""
            else:
                if nothing_pending and not character.isspace():
                    start = number
                depth += (character in "{[(") - (character in "}])")
                pending += character
        pending += " "


# ---- constants and declarations


@dataclass
class Constant:
    """An immediate operand. ``kind`` is "int", or "f32"/"f64" with ``value`` the bits of the float."""

    kind: str
    value: int

    def as_float(self):
        if self.kind == "int":
            return float(self.value)
        if self.kind == "f32":
            return struct.unpack("<f", struct.pack("<I", self.value))[0]
        return struct.unpack("<d", struct.pack("<Q", self.value))[0]


def parse_constant(text):
    """Return the Constant of an immediate operand, or None if the text is none (PTX ISA 4.5, "Constants")."""
    body = text.strip()
    negative = body.startswith("-")
    if negative:
        body = body[1:].strip()
    for prefix, digits, kind in (("0[fF]", 8, "f32"), ("0[dD]", 16, "f64")):
        if re.fullmatch(prefix + f"[0-9a-fA-F]{{{digits}}}", body):
            sign_bit = 1 << (4 * digits - 1)
            return Constant(kind, int(body[2:], 16) ^ (sign_bit if negative else 0))
    integer = re.fullmatch(r"(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?L?L?", body)
    if integer:
        digits = integer.group(1)
        value = int(digits, 8) if re.fullmatch(r"0[0-7]+", digits) else int(digits, 0)
        return Constant("int", -value if negative else value)
    if re.fullmatch(r"\d+\.\d*([eE][+-]?\d+)?|\d+[eE][+-]?\d+", body):
        value = -float(body) if negative else float(body)
        return Constant("f64", struct.unpack("<Q", struct.pack("<d", value))[0])
    if body == "WARP_SZ":
        return Constant("int", 32)
    return None


@dataclass
class Declaration:
    name: str
    type: PtxType
    count: int | None  # elements of an array; None for a scalar, 0 for "name[]"
    align: int

    @property
    def size(self):
        return self.type.bytes * (1 if self.count is None else self.count)


def parse_declaration(text):
    """'.align 4 .b8 name[64]' -> Declaration."""
    text = text.strip()
    # ".param .u64 .ptr .global .align 16 name": that alignment is the pointee's.
    own_attributes = re.sub(r"\.ptr.*?(\.align \d+)", "", text)
    align = re.search(r"\.align (\d+)", own_attributes)
    match = re.search(r"([\w$.%]+)\s*((?:\[\s*\w*\s*\]\s*)*)$", text)
    element = next(TYPES[word] for word in re.findall(r"\.(\w+)", text[: match.start()]) if word in TYPES)
    dimensions = re.findall(r"\[\s*(\w*)\s*\]", match.group(2))
    count = 1
    for dimension in dimensions:
        count *= int(dimension, 0) if dimension else 0
    return Declaration(
        name=match.group(1),
        type=element,
        count=count if dimensions else None,
        align=int(align.group(1)) if align else element.bytes,
    )


def _initial_bytes(declaration, initialiser):
    """Contents of a module-scope variable."""
    if initialiser is None:
        return bytes(declaration.size)
    element = declaration.type
    data = bytearray()
    for word in re.split(r"[\s,{}]+", initialiser.strip()):
        if not word:
            continue
        constant = parse_constant(word)
        if constant is None:
            raise EmulatorError(f"cannot read initialiser {word} of variable {declaration.name}")
        if constant.kind == "f64" and element.name == "f32":
            data += struct.pack("<f", constant.as_float())
        else:
            data += (constant.value & ((1 << element.bits) - 1)).to_bytes(element.bytes, "little")
    return bytes(data) + bytes(max(0, declaration.size - len(data)))


# ---- statements -> module


def parse(text):
    """PTX text -> ParsedModule."""
    module = ParsedModule()
    function, scopes, scope_count = None, [], 0
    for statement in statements(text):
        if not scopes:
            if statement.kind == "header":
                function = _parse_header(statement.text)
                module.functions[function.name] = function
            elif statement.kind == "{":
                scopes = [0]
            elif statement.kind == "statement":
                _parse_module_variable(module, statement.text)
        elif statement.kind == "{":
            scope_count += 1
            scopes.append(scope_count)
        elif statement.kind == "}":
            scopes.pop()
        elif statement.kind == "label":
            function.labels[statement.text, scopes[-1]] = len(function.code)
        else:
            _parse_body(function, statement, tuple(scopes))
    return module


def _parse_header(text):
    text = re.sub(r"\s+", " ", text)
    match = re.search(r"\.(entry|func)\s*(\(([^)]*)\))?\s*([\w$.]+)\s*(?:\(([^)]*)\))?", text)
    function = Function(match.group(4), match.group(1) == "entry")
    for parameters, declarations in ((function.returns, match.group(3)), (function.parameters, match.group(5))):
        for item in split_operands(declarations or ""):
            d = parse_declaration(re.sub(r"^\.(param|reg)\b", "", item))
            parameters.append(Parameter(d.name, d.type, d.size, d.align, d.count is not None))
    for directive in ("reqntid", "maxntid"):
        match = re.search(rf"\.{directive} (\d+)(?:, ?(\d+))?(?:, ?(\d+))?", text)
        if match:
            x, y, z = (int(size) if size else 1 for size in match.groups())
            if directive == "reqntid":
                function.required_block = (x, y, z)
            else:
                function.max_threads = x * y * z
    return function


def _parse_module_variable(module, text):
    match = re.match(r"((?:\.(?:visible|weak|extern|common) )*)\.(global|const|shared)\b(.*)$", text)
    if not match:
        return  # a prototype, .pragma or .alias
    space, rest = match.group(2), match.group(3)
    rest, _, initialiser = rest.partition("=")
    declaration = parse_declaration(re.sub(r"\.attribute\([^)]*\)", "", rest))
    if space != "shared":
        initial = _initial_bytes(declaration, initialiser or None)
        variable = Variable(declaration.name, space, len(initial), declaration.align, initial)
        module.globals[declaration.name] = variable
    elif declaration.count == 0:
        module.dynamic_shared[declaration.name] = declaration.align
    else:
        module.shared[declaration.name] = Variable(declaration.name, space, declaration.size, declaration.align)


def _parse_body(function, statement, scopes):
    text = statement.text
    if text.startswith(".reg"):
        _parse_registers(function, text, scopes[-1])
    elif text.startswith((".local", ".shared")):
        space, rest = text.split(" ", 1)
        d = parse_declaration(rest)
        if space == ".shared":
            function.shared[d.name] = Variable(d.name, "shared", d.size, d.align)
        else:
            function.local_size = align_up(function.local_size, d.align)
            function.local_offsets[d.name] = function.local_size
            function.local_size += d.size
    elif text.startswith(".branchtargets"):
        targets = split_operands(text[len(".branchtargets") :])
        for (label, _), index in function.labels.items():
            if index == len(function.code):
                function.branch_targets[label] = targets
    elif not text.startswith("."):  # .param of a call, .pragma and .callprototype need nothing
        match = re.match(r"(?:@(!?)\s*([\w$%]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text, re.S)
        if not match:
            raise EmulatorError(f"cannot parse PTX line {statement.line} of {function.name}: {text}")
        guard = (match.group(2), match.group(1) == "!") if match.group(2) else None
        operands = split_operands(match.group(4))
        function.code.append(
            Instruction(function, match.group(3), operands, guard, statement.line, text, statement.location, scopes)
        )


def _parse_registers(function, text, scope):
    match = re.match(r"\.reg\s*(?:\.align \d+\s*)?\.(\w+)\s+(.*)$", text)
    t = TYPES[match.group(1)]
    for name in split_operands(match.group(2)):
        numbered = re.fullmatch(r"([\w$%]+?)<(\d+)>", name)
        if numbered:
            function.register_ranges[numbered.group(1), scope] = t
        else:
            function.registers[name, scope] = function.new_register(t)


def align_up(offset, alignment):
    return -(-offset // alignment) * alignment
