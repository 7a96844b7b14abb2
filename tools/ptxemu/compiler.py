"""Instructions -> Python closures, once per function; what every handler in instructions/ uses to read operands.

A handler ``handler(build, ins)`` is registered with `instruction` under the first part of the opcode. It returns
``run(batch, mask)``, which computes on all lanes of a batch at once and writes the lanes of ``mask`` (None: all).
"""

import enum
import re

import numpy as np

from .errors import EmulatorError, UnsupportedInstruction
from .numerics import flush_subnormals, relu, saturate
from .parser import parse_constant
from .ptx_types import B32, PRED, SIGNED, TYPES, U32, UNSIGNED, decoder, encoder


class Kind(enum.Enum):
    """How the engine treats an instruction."""

    PLAIN = enum.auto()
    BRANCH = enum.auto()
    INDEXED_BRANCH = enum.auto()
    WARP_SYNC = enum.auto()
    BARRIER = enum.auto()
    RETURN = enum.auto()
    CALL = enum.auto()


# What ``members`` of a warp-synchronous instruction may be instead of a function giving each lane's membermask.
WHOLE_WARP = "warp"
WHOLE_WARPGROUP = "warpgroup"

HANDLERS = {}


def instruction(*names):
    """Register a handler for opcodes whose first part is one of ``names``."""

    def register(handler):
        for name in names:
            HANDLERS[name] = handler
        return handler

    return register


def warp_synchronous(ins, members):
    """Every lane named by ``members`` must arrive before ``ins`` runs."""
    ins.kind, ins.members = Kind.WARP_SYNC, members


def compile_function(function):
    """Fill in kind and run of every instruction. An unknown instruction is an error only when executed."""
    if function.compiled:
        return
    build = Builder(function)
    for ins in function.code:
        build.start(ins)
        try:
            handler = HANDLERS.get(ins.parts[0])
            if handler is None:
                raise UnsupportedInstruction(f"instruction {ins.opcode}")
            ins.kind = Kind.PLAIN
            ins.run = handler(build, ins)
        except UnsupportedInstruction as error:
            ins.kind, ins.unsupported = Kind.PLAIN, str(error)
            ins.run = _raise_unsupported(f"{error} is not supported by the emulator: {ins.where}")
        except (StopIteration, LookupError, AttributeError, ValueError, TypeError) as error:
            raise EmulatorError(f"cannot make sense of {ins.where} ({error!r})") from error
    function.never_written = build.registers_never_written()
    function.compiled = True


def _raise_unsupported(message):
    def run(batch, mask):
        raise UnsupportedInstruction(message)

    return run


class Builder:
    """Reads the operands of one instruction after another."""

    def __init__(self, function):
        self.function = function
        self.ins = None
        self._written = set()
        self._seen = {}  # register index -> (name, an instruction that uses it)

    def start(self, ins):
        self.ins = ins
        if ins.guard:
            name, negated = ins.guard
            guard = self.register(name)
            if guard is None:
                raise EmulatorError(f"unknown guard predicate: {ins.where}")
            ins.guard = (guard.index, negated)

    def registers_never_written(self):
        return [
            (ins, f"register {name} is read but never written")
            for index, (name, ins) in self._seen.items()
            if index not in self._written and ins.unsupported is None
        ]

    def unsupported(self):
        """The error for a form of the instruction that the handler does not know."""
        return UnsupportedInstruction(f"instruction {self.ins.opcode}")

    # ---- modifiers

    def types(self):
        return [TYPES[part] for part in self.ins.parts[1:] if part in TYPES]

    def has(self, modifier):
        return modifier in self.ins.parts

    def one_of(self, choices, default=None):
        """The modifier that is one of ``choices``."""
        return next((part for part in self.ins.parts[1:] if part in choices), default)

    def rounding(self):
        return self.one_of(("rn", "rz", "rm", "rp"), "rn")

    def space(self):
        """State space of a memory instruction: global, shared, local, const, param or generic."""
        for part in self.ins.parts[1:]:
            name = part.split("::")[0]
            if name in ("global", "shared", "local", "const", "param"):
                return name
        return "generic"

    def vector_length(self):
        return next((int(part[1:]) for part in self.ins.parts if re.fullmatch(r"v[248]", part)), 1)

    # ---- names

    def register(self, name):
        """Register visible from the instruction's scope, or None."""
        function = self.function
        for scope in reversed(self.ins.scopes):
            register = function.registers.get((name, scope))
            if register is None:
                numbered = re.match(r"^(.*?)(\d+)$", name)
                t = function.register_ranges.get((numbered.group(1), scope)) if numbered else None
                if t is None:
                    continue
                register = function.registers[name, scope] = function.new_register(t)
            self._seen[register.index] = (name, self.ins)
            return register
        return None

    def label(self, name):
        for scope in reversed(self.ins.scopes):
            if (name, scope) in self.function.labels:
                return self.function.labels[name, scope]
        raise EmulatorError(f"unknown label {name}: {self.ins.where}")

    @staticmethod
    def names(text):
        """'{a, b}' or 'a' -> list of operand texts."""
        text = text.strip()
        return [item.strip() for item in text[1:-1].split(",")] if text.startswith("{") else [text]

    @staticmethod
    def pair(text):
        """'d|p' -> ['d', 'p']."""
        return [item.strip() for item in text.split("|")]

    # ---- reading

    def source(self, text, t):
        """Return a function of the batch that gives the operand as an array (or scalar) to compute on."""
        text = text.strip()
        register = self.register(text)
        if register is not None:
            return self._register_source(register, t)
        constant = parse_constant(text)
        if constant is not None:
            return self._constant_source(constant, t)
        if text.startswith("%"):
            return self._special_register_source(text, t)
        match = re.fullmatch(r"([\w$.%]+)\s*(?:\+\s*(\d+))?", text)
        if not match:
            raise UnsupportedInstruction(f"operand {text}")
        symbol, offset = match.group(1), int(match.group(2) or 0)
        unsigned, bit_mask = UNSIGNED[t.bits], (1 << t.bits) - 1
        return lambda batch: unsigned((batch.symbol_address(symbol) + offset) & bit_mask)

    def _register_source(self, register, t):
        index, decode = register.index, decoder(t)
        if t.kind == "p":
            return lambda batch: batch.registers[index]
        if register.bits != t.bits:  # a wider register: its low bits
            unsigned = UNSIGNED[t.bits]
            return lambda batch: decode(batch.registers[index].astype(unsigned))
        if t.kind in "ub" and not t.packed:
            return lambda batch: batch.registers[index]
        if t.name not in ("bf16", "bf16x2", "tf32"):
            dtype = t.dtype
            return lambda batch: batch.registers[index].view(dtype)
        return lambda batch: decode(batch.registers[index])

    def _constant_source(self, constant, t):
        value = constant.value
        if t.kind == "p":
            value = np.bool_(value)
            return lambda batch: value
        if t.name in ("f32", "f64", "tf32") and constant.kind != ("f64" if t.bits == 64 else "f32"):
            value = int(t.dtype(constant.as_float()).view(UNSIGNED[t.bits]))
        elif not t.is_float and t.bits == 32 and constant.kind == "f64":
            value = int(np.float32(constant.as_float()).view(np.uint32))
        raw = np.array([value & ((1 << t.bits) - 1)], dtype=UNSIGNED[t.bits])
        decode = decoder(t)
        if t.packed:
            return lambda batch: decode(np.repeat(raw, batch.lanes))
        scalar = decode(raw)[0]
        return lambda batch: scalar

    @staticmethod
    def _special_register_source(name, t):
        dtype = t.dtype if t.kind in "us" else UNSIGNED[t.bits]
        if t.is_float:
            decode = decoder(t)
            return lambda batch: decode(batch.special_register(name, dtype))
        return lambda batch: batch.special_register(name, dtype)

    def predicate(self, text):
        """Like `source` for a predicate operand, which may be negated with '!'."""
        text = text.strip()
        if text.startswith("!"):
            read = self.source(text[1:], PRED)
            return lambda batch: ~read(batch)
        return self.source(text, PRED)

    def all_lanes(self, text, t):
        """Like `source`, but always one element per lane."""
        read = self.source(text, t)
        return lambda batch: np.broadcast_to(read(batch), (batch.lanes,))

    # ---- writing

    def destination(self, text, t):
        """Return put(batch, mask, values), which rounds to t and writes the lanes of mask."""
        text = text.strip()
        if text == "_":
            return lambda batch, mask, values: None
        register = self.register(text)
        if register is None:
            raise EmulatorError(f"unknown destination {text}: {self.ins.where}")
        self._written.add(register.index)
        index, encode = register.index, _encoder_to_width(t, register.bits)

        def put(batch, mask, values):
            bits = encode(values)
            if mask is not None:
                bits = np.where(mask, bits, batch.registers[index])
            elif bits.ndim == 0:
                bits = np.full(batch.lanes, bits)
            batch.registers[index] = bits

        return put

    # ---- memory operands

    def address(self, text):
        """Of '[base+offset]' return (function of the batch giving the addresses, symbol name or None, offset)."""
        text = text.strip()
        match = re.fullmatch(r"\[\s*([\w$.%]+)\s*(?:([+-])\s*(-?\w+))?\s*\]", text)
        if not match:
            raise UnsupportedInstruction(f"address {text}")
        base, sign = match.group(1), match.group(2)
        offset = int(match.group(3), 0) if sign else 0
        if sign == "-":
            offset = -offset
        register = self.register(base)
        if register is not None:
            index = register.index
            if offset == 0:
                return (lambda batch: batch.registers[index]), None, 0
            addend = UNSIGNED[register.bits](offset & ((1 << register.bits) - 1))
            return (lambda batch: batch.registers[index] + addend), None, offset
        constant = parse_constant(base)
        if constant is not None:
            return (lambda batch: np.full(batch.lanes, constant.value + offset, np.uint64)), None, 0
        return (lambda batch: np.full(batch.lanes, batch.symbol_address(base) + offset, np.uint64)), base, offset

    # ---- the common shape

    def elementwise(self, compute, t, count, result_type=None, source_types=None):
        """Instruction ``d = compute(a, b, ...)`` of ``count`` sources, with .ftz, .sat and .relu where written."""
        operands = self.ins.operands
        result_type = result_type or t
        source_types = source_types or [t] * count
        sources = [self.source(text, s) for text, s in zip(operands[1 : 1 + count], source_types, strict=True)]
        put = self.destination(operands[0], result_type)
        if t.is_float:
            if self.has("ftz") and t.name == "f32":
                sources = [_flushed(read) for read in sources]
            compute = self._with_modifiers(compute, result_type)
        if count == 1:
            (a,) = sources
            return lambda batch, mask: put(batch, mask, compute(a(batch)))
        if count == 2:
            a, b = sources
            return lambda batch, mask: put(batch, mask, compute(a(batch), b(batch)))
        if count == 3:
            a, b, c = sources
            return lambda batch, mask: put(batch, mask, compute(a(batch), b(batch), c(batch)))
        return lambda batch, mask: put(batch, mask, compute(*[read(batch) for read in sources]))

    def _with_modifiers(self, compute, t):
        steps = []
        if self.has("ftz") and t.name == "f32":
            steps.append(flush_subnormals)
        if self.has("sat"):
            steps.append(saturate)
        if self.has("relu"):
            steps.append(relu)
        if not steps:
            return compute

        def computed(*arguments):
            values = compute(*arguments)
            for step in steps:
                values = step(values)
            return values

        return computed

    def warp_members(self, operand_index):
        """membermask operand of a warp-synchronous instruction; without one every live lane of the warp takes part."""
        if len(self.ins.operands) <= operand_index:
            return WHOLE_WARP
        return self.source(self.ins.operands[operand_index], U32)

    def register_file(self, names, t=B32):
        """Return a function of the batch that gives a list of registers as a [lanes, len(names)] array."""
        sources = [self.source(name, t) for name in names]
        dtype = t.dtype

        def gather(batch):
            values = np.empty((batch.lanes, len(sources)), dtype)
            for column, read in enumerate(sources):
                values[:, column] = read(batch)
            return values

        return gather


def _flushed(read):
    return lambda batch: flush_subnormals(read(batch))


def _encoder_to_width(t, register_bits):
    """Encoder for a register that may be wider than t: signed values are sign-extended."""
    encode = encoder(t)
    if register_bits == t.bits:
        return encode
    wide = UNSIGNED[register_bits]
    if t.is_signed and register_bits > t.bits:
        narrow_signed, wide_signed = SIGNED[t.bits], SIGNED[register_bits]
        return lambda values: encode(values).view(narrow_signed).astype(wide_signed).view(wide)
    return lambda values: encode(values).astype(wide)
