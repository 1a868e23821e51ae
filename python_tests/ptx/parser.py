"""PTX text to a list of instructions.

Only what a kernel needs: one `.entry`, its parameters, registers, shared and local variables, module constants, labels.
Names declared in an inner `{ }` scope are renamed apart, as inline assembly declares the same name in many scopes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

from .errors import ParseError
from .scalars import BITS

_NAME = r"[%\w$]+"


@dataclasses.dataclass
class Instruction:
    """One instruction: `@!guard opcode.modifiers operands`."""

    text: str
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None
    negated: bool
    index: int
    scopes: tuple[int, ...]
    target: int = -1  # where a branch goes

    @functools.cached_property
    def type(self) -> str:
        """The last modifier: the type for all but a few instructions."""
        return self.modifiers[-1] if self.modifiers else ""

    @functools.cached_property
    def is_control(self) -> bool:
        """What the executor itself performs: branches and barriers of CTAs and clusters."""
        return self.opcode in {"bra", "ret", "exit", "bar", "barrier"} and not self.has("warp")

    def has(self, *names: str) -> bool:
        """Whether any of these is among the modifiers."""
        return not set(names).isdisjoint(self.modifiers)


@dataclasses.dataclass
class Parameter:
    """A kernel parameter's place in the parameter buffer, in bytes."""

    name: str
    type: str
    offset: int
    size: int


@dataclasses.dataclass
class Kernel:
    """One parsed entry point."""

    name: str
    parameters: dict[str, Parameter]
    parameter_bytes: int
    cluster: tuple[int, int, int]
    threads: int | None  # .reqntid, where given
    registers: dict[str, int] = dataclasses.field(default_factory=dict)  # width in bits
    shared: dict[str, int] = dataclasses.field(default_factory=dict)  # offset
    shared_bytes: int = 0
    local: dict[str, int] = dataclasses.field(default_factory=dict)
    local_bytes: int = 0
    dynamic: tuple[str, ...] = ()  # names of `.extern .shared`
    dynamic_alignment: int = 16
    constants: dict[str, bytes] = dataclasses.field(default_factory=dict)
    labels: dict[tuple[int, str], int] = dataclasses.field(default_factory=dict)
    instructions: list[Instruction] = dataclasses.field(default_factory=list)
    checked: bool = False  # whether every instruction is one that the emulator knows

    @functools.cached_property
    def has_mbarriers(self) -> bool:
        return any(i.opcode == "mbarrier" for i in self.instructions)

    @functools.cached_property
    def copies_in_bulk(self) -> bool:
        return any(i.has("bulk") for i in self.instructions)

    @functools.cached_property
    def smallest_shared_access(self) -> int:
        """Bytes of the smallest access that may reach shared memory: the granule of the race check."""
        smallest = 16
        for instruction in self.instructions:
            if instruction.opcode in {"ld", "st", "atom", "red"} and not instruction.has(
                "global", "param", "local", "const"
            ):
                vector = next((int(m[1]) for m in instruction.modifiers if m in {"v2", "v4"}), 1)
                smallest = min(smallest, BITS.get(instruction.type, 64) // 8 * vector)
            elif instruction.opcode == "cp":
                smallest = min(smallest, 4)
        return smallest


def split(text: str) -> list[str]:
    """Parts between commas that stand outside brackets."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    return [*parts, text[start:].strip()] if text[start:].strip() else parts


def members(operand: str) -> list[str]:
    """The registers of `{a, b}`, or the one operand itself."""
    return split(operand[1:-1]) if operand.startswith("{") else [operand]


def address(operand: str) -> tuple[str, int]:
    """`[base+offset]` as its two parts."""
    match = re.fullmatch(rf"\[\s*({_NAME})\s*(?:\+\s*(-?\w+))?\s*\]", operand)
    if not match:
        raise ParseError(f"address {operand}")
    return match[1], int(match[2] or "0", 0)


def entries(text: str) -> list[str]:
    """Names of the kernels in a module."""
    return re.findall(r"\.entry\s+([\w$]+)", text)


def parse(text: str, name: str | None = None) -> Kernel:
    """The kernel `name` of a PTX module, or its only one."""
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"^\s*\.(loc|file)\b[^\n]*$", "", text, flags=re.MULTILINE)
    found = [m for m in re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", text) if name in {None, m[1]}]
    if len(found) != 1:
        raise ParseError(f"{len(found)} kernels called {name}; the module has {entries(text)}")
    head = found[0]
    cluster = _numbers(r"\.reqnctapercluster\s+([\d,\s]+)", head[3])
    threads = _numbers(r"\.reqntid\s+([\d,\s]+)", head[3])
    parameters, size = _parameters(head[2])
    kernel = Kernel(head[1], parameters, size, (*cluster, 1, 1, 1)[:3], math.prod(threads) if threads else None)
    _module_variables(kernel, text[: head.start()])
    _Body(kernel).read(_braced(text, head.end()))
    for instruction in kernel.instructions:
        if instruction.opcode == "bra":
            instruction.target = _label(kernel, instruction)
    return kernel


def _numbers(pattern: str, text: str) -> tuple[int, ...]:
    match = re.search(pattern, text)
    return tuple(int(part) for part in match[1].split(",")) if match else ()


def _parameters(text: str) -> tuple[dict[str, Parameter], int]:
    parameters, offset = {}, 0
    for part in split(text):
        plain = re.sub(r"\.ptr(\s+\.(global|shared|const|local|generic))?(\s+\.align\s+\d+)?", "", part)
        match = re.fullmatch(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?", plain.strip())
        if not match:
            raise ParseError(f"parameter {part}")
        width = max(BITS[match[2]] // 8, 1)
        alignment = int(match[1] or width)
        offset = -(-offset // alignment) * alignment
        size = width * int(match[4] or 1)
        parameters[match[3]] = Parameter(match[3], match[2], offset, size)
        offset += size
    return parameters, offset


def _braced(text: str, start: int) -> str:
    """Text up to the brace that closes the one before `start`."""
    depth = 1
    for match in re.finditer(r"[{}]", text[start:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return text[start : start + match.start()]
    raise ParseError("a brace is never closed")


def _module_variables(kernel: Kernel, text: str) -> None:
    for match in re.finditer(r"\.extern\s+\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[\s*\]", text):
        kernel.dynamic = (*kernel.dynamic, match[2])
        kernel.dynamic_alignment = max(kernel.dynamic_alignment, int(match[1]))
    for match in re.finditer(r"(?:^|(?<=[;\n]))\s*(?:\.visible\s+|\.weak\s+)?(\.shared\s[^;]*)(?=;)", text):
        _variable(kernel, match[1])
    pattern = r"\.(?:global|const)\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?\s*=\s*\{?([^;}]*)\}?\s*;"
    for match in re.finditer(pattern, text):
        width = BITS[match[1]] // 8
        values = [int(value, 0) % (1 << 8 * width) for value in split(match[4])]
        data = b"".join(value.to_bytes(width, "little") for value in values)
        kernel.constants[match[2]] = data.ljust(width * int(match[3] or 1), b"\0")


def _variable(kernel: Kernel, statement: str) -> str:
    """Places a `.shared` or `.local` variable; its name."""
    pattern = r"\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)((?:\[\d+\])*)"
    match = re.fullmatch(pattern, statement.strip())
    if not match:
        raise ParseError(f"variable {statement}")
    width = max(BITS[match[3]] // 8, 1)
    size = width * math.prod(int(n) for n in re.findall(r"\d+", match[5]))
    alignment = int(match[2] or width)
    table, total = (kernel.shared, "shared_bytes") if match[1] == "shared" else (kernel.local, "local_bytes")
    table[match[4]] = -(-getattr(kernel, total) // alignment) * alignment
    setattr(kernel, total, table[match[4]] + size)
    return match[4]


def _label(kernel: Kernel, instruction: Instruction) -> int:
    for scope in reversed(instruction.scopes):
        if (scope, instruction.operands[0]) in kernel.labels:
            return kernel.labels[scope, instruction.operands[0]]
    raise ParseError(f"no label for `{instruction.text}`")


class _Body:
    """Reads the statements of a kernel's body, keeping track of scopes."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.scopes: list[tuple[int, dict[str, str]]] = [(0, {})]
        self.opened = 0

    def read(self, body: str) -> None:
        for kind, text in _statements(body):
            if kind == "{":
                self.opened += 1
                self.scopes.append((self.opened, {}))
            elif kind == "}":
                self.scopes.pop()
            elif kind == ":":
                self.kernel.labels[self.scopes[-1][0], text] = len(self.kernel.instructions)
            else:
                self._statement(text)

    def _statement(self, text: str) -> None:
        if match := re.match(r"\.reg\s*(?:\.v[24]\s*)?\.(\w+)\s+(.*)$", text):
            for declared in split(match[2]):
                many = re.fullmatch(r"([%\w$]+)<(\d+)>", declared)
                names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [declared]
                for name in names:
                    self.kernel.registers[self._declare(name)] = BITS[match[1]]
        elif text.startswith((".shared", ".local")):
            _variable(self.kernel, text)
        elif text.startswith(".param") or not text:
            pass  # the outgoing parameters of a call, which is refused when reached
        elif text.startswith("."):
            if not text.startswith(".pragma"):
                raise ParseError(f"directive {text}")
        else:
            self._instruction(text)

    def _declare(self, name: str) -> str:
        scope, names = self.scopes[-1]
        unique = name if scope == 0 else f"{name}${scope}"
        names[name] = unique
        return unique

    def _rename(self, operand: str) -> str:
        for _, names in self.scopes[1:]:
            if names:
                operand = re.sub(_NAME, lambda match, names=names: names.get(match[0], match[0]), operand)
        return operand

    def _instruction(self, text: str) -> None:
        match = re.fullmatch(r"(?:@(!?)([%\w$]+)\s+)?([a-z_]\w*)((?:\.[\w:]+)*)\s*(.*)", text)
        if not match:
            raise ParseError(f"statement {text}")
        operands = tuple(self._rename(part) for part in split(match[5]))
        modifiers = tuple(part for part in match[4].split(".") if part)
        guard = self._rename(match[2]) if match[2] else None
        scopes = tuple(scope for scope, _ in self.scopes)
        instructions = self.kernel.instructions
        number = len(instructions)
        instructions.append(Instruction(text, match[3], modifiers, operands, guard, match[1] == "!", number, scopes))


def _statements(body: str) -> Iterator[tuple[str, str]]:
    """(kind, text) with kind ';' statement, ':' label, '{' or '}' scope. A brace inside a statement is an operand."""
    current = ""
    for piece in re.findall(r"[{};]|(?<!:):(?!:)|[^{};:]+|::", body):
        blank = not current.strip()
        if piece in "{}" and blank:
            yield piece, ""
            current = ""
        elif piece == ";":
            yield ";", " ".join(current.split())
            current = ""
        elif piece == ":" and re.fullmatch(r"\s*[\w$]+\s*", current):
            yield ":", current.strip()
            current = ""
        else:
            current += piece
    if current.strip():
        raise ParseError(f"text after the last statement: {current.strip()[:80]}")
