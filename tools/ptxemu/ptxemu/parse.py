"""PTX text to a `Program`: symbols, registers and a list of instructions, each with its line here and in the source."""

import re
from dataclasses import dataclass, field

from ptxemu.fault import Unknown

NAME = r"[A-Za-z_$%][\w$]*"
TYPE_BITS = {"pred": 1, "bf16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8}


def bits(type: str) -> int:
    """Width of a PTX type: `bits("f32") == 32`, `bits("bf16x2") == 32`."""
    base, _, pair = type.partition("x")
    width = TYPE_BITS.get(base)
    return (width or int(base[1:])) * (int(pair) if pair else 1)


def found(m: re.Match | None) -> re.Match:
    """A match that cannot fail."""
    assert m is not None
    return m


@dataclass
class Instruction:
    index: int
    line: int
    source: str  # file:line of the language above, or ""
    text: str
    guard: tuple[str, bool] | None  # predicate register, negated
    name: str
    mods: tuple[str, ...]
    operands: list[str]

    @property
    def type(self) -> str:
        return self.mods[-1]

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}" + (f"   ({self.source})" if self.source else "")


@dataclass
class Variable:
    """A module variable: its space, size and first bytes."""

    space: str
    align: int
    size: int
    data: bytes


@dataclass
class Program:
    name: str
    params: dict[str, tuple[int, int, int]] = field(
        default_factory=dict
    )  # name: offset, bytes, array length (0: scalar)
    registers: dict[str, tuple[int, int]] = field(default_factory=dict)  # name: index, bits
    variables: dict[str, Variable] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)  # shared and local variables: offset in their space
    labels: dict[str, int] = field(default_factory=dict)
    targets: dict[str, list[str]] = field(default_factory=dict)  # .branchtargets
    code: list[Instruction] = field(default_factory=list)
    shared: int = 0  # bytes of the variables of fixed size
    local: int = 0
    threads: int | None = None  # .reqntid
    target: int = 0


def split(text: str) -> list[str]:
    """Operands at the commas that are outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "{[(":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def parse(text: str, entry: str | None = None) -> Program:
    """Read one kernel of a PTX module.

    Args:
        text: the module.
        entry: name of the kernel; None if there is one.

    Raises:
        ValueError: no such kernel, or more than one and no name.
    """
    files = {
        m[1]: (m[3] or m[2]).rsplit("/")[-1] for m in re.finditer(r'\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?', text)
    }
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"^([ \t]*\.loc[^\n;]*)$", r"\1;", text, flags=re.M)
    heads = {m[1]: m for m in re.finditer(rf"\.entry\s+({NAME})\s*(?:\((.*?)\))?\s*([^{{;]*)\{{", text, re.S)}
    if (entry is None and len(heads) != 1) or (entry is not None and entry not in heads):
        raise ValueError(f"entry must be one of {sorted(heads)}, got {entry}")
    head = heads[entry or next(iter(heads))]
    program = Program(head[1], target=int(found(re.search(r"\.target\s+sm_(\d+)", text))[1]))
    parse_params(program, head[2] or "")
    if ".explicitcluster" in head[3] or re.search(r"\.reqnctapercluster\s+(?!1\b(?:\s*,\s*1\b)*\s*(?:\.|$))", head[3]):
        raise Unknown(f"clusters of blocks are not emulated: {' '.join(head[3].split())}")
    if m := re.search(r"\.reqntid\s+([\d,\s]+)", head[3]):
        program.threads = 1
        for n in m[1].split(","):
            program.threads *= int(n)
    for statement in text[: min(m.start() for m in heads.values())].split(";"):
        if re.search(rf"\.(const|global|shared)\b[^(]*?\.[busf]\d+\s+{NAME}", statement) and ".func" not in statement:
            declare(program, statement[statement.index(".") :])
    Body(program, files).read(text, head.end())
    return program


def parse_params(program: Program, text: str) -> None:
    offset = 0
    for part in split(text):
        m = re.search(rf"\.(b|u|s|f)(\d+)\b.*?({NAME})\s*(?:\[(\d+)\])?$", part, re.S)
        assert m, part
        size, length = int(m[2]) // 8, int(m[4] or 0)
        align = max(size, int(a[1]) if length and (a := re.search(r"\.align\s+(\d+)", part)) else 1)
        offset = -(-offset // align) * align
        program.params[m[3]] = (offset, size * (length or 1), length)
        offset += size * (length or 1)


def declare(program: Program, statement: str) -> None:
    """A variable: `.shared .align 4 .b8 name[128]`, `.const .align 4 .f32 name[2] = {...}`."""
    m = re.search(
        rf"\.(const|global|shared|local)\b(.*?)\.([busf]\d+)\s+({NAME})\s*((?:\[\d*\])*)\s*(?:=\s*(.*))?$",
        statement,
        re.S,
    )
    if not m:
        raise ValueError(f"declaration not understood: {' '.join(statement.split())}")
    space, attributes, type, name, dims, init = m.groups()
    size = bits(type) // 8
    align = int(a[1]) if (a := re.search(r"\.align\s+(\d+)", attributes)) else size
    lengths = [int(n or 0) for n in re.findall(r"\[(\d*)\]", dims)]
    total = size
    for n in lengths:
        total *= n
    data = b""
    for item in re.findall(r"[\w.+-]+", init or ""):
        value = int(item[2:], 16) if item[:2] in ("0f", "0d") else int(item, 0)
        data += (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    program.variables[name] = Variable(space, align, total, data)
    if space in ("shared", "local") and "extern" not in statement.split("." + space)[0]:
        start = -(-getattr(program, space) // align) * align
        program.offsets[name] = start
        setattr(program, space, start + total)


class Body:
    """Reads the statements of a kernel; names declared between braces live until the closing brace."""

    def __init__(self, program: Program, files: dict[str, str]):
        self.program, self.files = program, files
        self.scopes: list[dict[str, str]] = [{}]
        self.opened, self.source = 0, ""

    def read(self, text: str, start: int) -> None:
        pos, line = start, text.count("\n", 0, start) + 1
        depth = 1
        while depth:
            m = found(re.compile(r"\s*").match(text, pos))
            line += m[0].count("\n")
            pos = m.end()
            if text[pos] == "{":
                depth, pos = depth + 1, pos + 1
                self.opened += 1
                self.scopes.append({})
                self.find_labels(text, pos)
            elif text[pos] == "}":
                depth, pos = depth - 1, pos + 1
                self.scopes.pop() if depth else None
            elif m := re.compile(rf"({NAME})\s*:(?!:)").match(text, pos):
                self.program.labels[self.rename(m[1])] = len(self.program.code)
                pos = text.index(":", pos) + 1
            else:
                end = text.index(";", pos)
                self.statement(" ".join(text[pos:end].split()), line)
                line += text.count("\n", pos, end)
                pos = end + 1

    def find_labels(self, text: str, pos: int) -> None:
        """Labels of a scope are known before its first branch."""
        end, depth = pos, 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        for m in re.finditer(rf"(?:^|[;{{}}])\s*({NAME})\s*:(?!:)", text[pos:end], re.M):
            self.scopes[-1].setdefault(m[1], f"{m[1]}@{self.opened}")

    def rename(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), name)

    def declare(self, name: str) -> str:
        if len(self.scopes) == 1:
            return name
        self.scopes[-1][name] = f"{name}@{self.opened}"
        return self.scopes[-1][name]

    def statement(self, text: str, line: int) -> None:
        program = self.program
        if text.startswith(".loc "):
            _, file, number = text.split()[:3]
            self.source = f"{self.files.get(file, '?')}:{number}"
        elif text.startswith(".reg"):
            type, names = found(re.match(r"\.reg\s*\.(\w+)\s+(.*)", text)).groups()
            for name in names.split(","):
                m = found(re.fullmatch(rf"\s*({NAME})\s*(?:<(\d+)>)?\s*", name))
                for full in [f"{m[1]}{i}" for i in range(int(m[2]))] if m[2] else [m[1]]:
                    program.registers[self.declare(full)] = (len(program.registers), bits(type))
        elif text.startswith((".shared", ".local")):
            declare(program, text)
        elif text.startswith(".param"):
            program.registers[self.declare(text.split()[-1].partition("[")[0])] = (len(program.registers), 64)
        elif text.startswith(".branchtargets"):
            label = max(program.labels, key=lambda name: program.labels[name])
            program.targets[label] = [self.rename(name) for name in split(text[len(".branchtargets") :])]
        elif text.startswith(".pragma") or not text:
            pass
        elif text.startswith("."):
            raise ValueError(f"line {line}: declaration not understood: {text}")
        else:
            self.instruction(text, line)

    def instruction(self, text: str, line: int) -> None:
        m = re.fullmatch(rf"(?:@(!?)({NAME})\s+)?([\w.:]+)\s*(.*)", text)
        if not m:
            raise ValueError(f"line {line}: statement not understood: {text}")
        negated, guard, op, rest = m.groups()
        if len(self.scopes) > 1:
            rest = re.sub(NAME, lambda m: self.rename(m[0]), rest)
        name, *mods = op.split(".")
        self.program.code.append(
            Instruction(
                len(self.program.code), line, self.source, text,
                (self.rename(guard), negated == "!") if guard else None, name, tuple(mods), split(rest),
            )
        )  # fmt: skip
