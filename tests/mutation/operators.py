"""Small wrong versions of a module: one changed operator, constant, function, bound or lost statement at a time.

A test suite that lets such a version pass does not hold the rule that the changed place stands for. Left alone are
docstrings, annotations, `__all__`, decorators, `strict=` and the texts of errors: none of them computes a number.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

__all__ = ["Mutant", "apply", "difference", "mutants"]

_COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
_ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
}
_PAIRS = (
    ("min", "max"),
    ("minimum", "maximum"),
    ("argmin", "argmax"),
    ("any", "all"),
    ("zeros", "ones"),
    ("add", "subtract"),
    ("logical_or", "logical_and"),
    ("isfinite", "isnan"),
    ("floor", "ceil"),
)
_FUNCTIONS = dict(_PAIRS) | {second: first for first, second in _PAIRS}
#: Calls that are replaced by what they are called with, or on.
_UNWRAPPED_FUNCTIONS = frozenset({"abs", "sorted", "unique"})
_UNWRAPPED_METHODS = frozenset({"copy"})


@dataclass(frozen=True, slots=True)
class Mutant:
    """The bytes [start, end) of the source (UTF-8) become `replacement`; `line` counts from 1."""

    kind: str
    line: int
    start: int
    end: int
    replacement: str


def apply(source: str, mutant: Mutant) -> str:
    """The source with the change made."""
    data = source.encode()
    return (data[: mutant.start] + mutant.replacement.encode() + data[mutant.end :]).decode()


def difference(source: str, mutant: Mutant) -> tuple[str, str]:
    """(lines before, lines after) that the mutant changes, without indentation: how people and `equivalents.toml` name
    it, so that a name outlives a move to another line."""
    data, replacement = source.encode(), mutant.replacement.encode()
    begin = data.rfind(b"\n", 0, mutant.start) + 1
    finish = data.find(b"\n", mutant.end)
    finish = len(data) if finish < 0 else finish
    changed = data[begin : mutant.start] + replacement + data[mutant.end : finish]
    return _flat(data[begin:finish]), _flat(changed)


def _flat(lines: bytes) -> str:
    return " ".join(line.strip() for line in lines.decode().splitlines())


def mutants(source: str) -> list[Mutant]:
    """All mutants of a module that are still Python, in the order of the source, each text once."""
    finder = _Finder(source)
    finder.visit(ast.parse(source))
    unique = {(m.start, m.end, m.replacement): m for m in finder.found}
    return sorted((m for m in unique.values() if _parses(source, m)), key=lambda m: (m.start, m.end, m.replacement))


def _parses(source: str, mutant: Mutant) -> bool:
    try:
        ast.parse(apply(source, mutant))
    except SyntaxError:
        return False
    return True


class _Finder(ast.NodeVisitor):
    def __init__(self, source: str) -> None:
        self.data = source.encode()
        self.lines = [0]
        for line in self.data.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        self.found: list[Mutant] = []
        self.known: set[str] = set()

    # ------------------------------------------------------------------------------------------- text

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.lines[node.lineno - 1] + node.col_offset, self.lines[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.expr | ast.stmt) -> str:
        start, end = self.span(node)
        return self.data[start:end].decode()

    def add(self, kind: str, node: ast.expr | ast.stmt, replacement: str, at: tuple[int, int] | None = None) -> None:
        start, end = at or self.span(node)
        line = self.data.count(b"\n", 0, start) + 1
        self.found.append(Mutant(kind, line, start, end, replacement))

    def swap_token(self, kind: str, node: ast.expr, left: ast.expr, right: ast.expr, was: str, becomes: str) -> None:
        """Replaces the operator between two operands, and sets parentheses so that only the operator changes."""
        start, end = self.span(node)
        low, high = self.span(left)[1], self.span(right)[0]
        token = re.compile(r"\s+".join(map(re.escape, was.split())))
        match = token.search(self.data[low:high].decode())
        assert match is not None, (self.text(node), was)
        before, after = self.data[start : low + match.start()], self.data[low + match.end() : end]
        self.add(kind, node, f"({before.decode()}{becomes}{after.decode()})")

    # ------------------------------------------------------------------------------------------- what is left alone

    def body(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
                self.visit(statement)

    def visit_Module(self, node: ast.Module) -> None:
        self.body(node.body)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.body(node.body)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self.known = self.known, {argument.arg for argument in node.args.args}
        for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
            self.visit(default)
        self.body(node.body)
        self.known = outer

    def visit_Import(self, node: ast.Import) -> None: ...

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None: ...

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None: ...

    # ------------------------------------------------------------------------------------------- statements

    def visit_Raise(self, node: ast.Raise) -> None:
        self.add("statement", node, "pass")

    def visit_Expr(self, node: ast.Expr) -> None:
        self.add("statement", node, "pass")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        names = {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        if "__all__" in names:
            return
        if isinstance(node.targets[0], ast.Subscript) or names & self.known:
            self.add("statement", node, "pass")
        self.known |= names
        if not (isinstance(node.value, ast.Call) and self.text(node.value).startswith("TypeVar(")):
            self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        was, becomes = _ARITHMETIC[type(node.op)]
        self.add("statement", node, "pass")
        target, value = self.text(node.target), self.text(node.value)
        end = self.span(node.value)[0]
        # The value may stand in parentheses that belong to no node: the text up to the value's start is kept.
        between = self.data[self.span(node.target)[1] : end].decode()
        assert f"{was}=" in between
        tail = self.data[self.span(node.value)[1] : self.span(node)[1]].decode()
        self.add("arithmetic", node, target + between.replace(f"{was}=", f"{becomes}=", 1) + value + tail)
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        self.condition(node.test)
        self.generic_visit(node)

    def condition(self, test: ast.expr) -> None:
        if not isinstance(test, ast.Compare | ast.BoolOp | ast.UnaryOp):
            self.add("condition", test, f"not ({self.text(test)})")

    def visit_Continue(self, node: ast.Continue) -> None:
        self.add("statement", node, "break")

    def visit_Break(self, node: ast.Break) -> None:
        self.add("statement", node, "continue")

    # ------------------------------------------------------------------------------------------- expressions

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, operator, right in zip(operands, node.ops, operands[1:], strict=False):
            was, becomes = _COMPARISONS[type(operator)]
            self.swap_token("comparison", node, left, right, was, becomes)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in _ARITHMETIC:
            was, becomes = _ARITHMETIC[type(node.op)]
            self.swap_token("arithmetic", node, node.left, node.right, was, becomes)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        was, becomes = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.swap_token("boolean", node, left, right, was, becomes)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if not isinstance(node.op, ast.UAdd):
            self.add("unary", node, f"({self.text(node.operand)})")
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.add("condition", node, f"({self.text(node.orelse)} if {self.text(node.test)} else {self.text(node.body)})")
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self.condition(test)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.add("constant", node, str(not value))
        elif isinstance(value, int | float):
            self.add("constant", node, repr(value + 1))
            self.add("constant", node, repr(value - 1) if value >= 1 else f"({value - 1!r})")
        elif isinstance(value, str):
            swapped = {"left": "right", "right": "left"}.get(value, f"XX{value}")
            self.add("constant", node, f'"{swapped}"')

    def visit_Subscript(self, node: ast.Subscript) -> None:
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        for part in parts:
            if isinstance(part, ast.Slice):
                for bound in (part.lower, part.upper):
                    if bound is not None:
                        self.add("slice", bound, "")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        if isinstance(function, ast.Attribute):
            self.method(node, function)
        elif isinstance(function, ast.Name):
            if function.id in _FUNCTIONS:
                self.add("function", function, _FUNCTIONS[function.id])
            elif function.id in _UNWRAPPED_FUNCTIONS:
                self.add("function", node, f"({self.text(node.args[0])})")
        for part in (function, *node.args, *(k.value for k in node.keywords if k.arg != "strict")):
            self.visit(part)

    def method(self, node: ast.Call, function: ast.Attribute) -> None:
        name, arguments = function.attr, node.args
        if name in _UNWRAPPED_METHODS:
            self.add("function", node, self.text(function.value))
        elif name in _UNWRAPPED_FUNCTIONS and arguments and not node.keywords:
            self.add("function", node, f"({self.text(arguments[0])})")
        elif name == "where" and len(arguments) == 3:
            condition, yes, no = (self.text(argument) for argument in arguments)
            self.add("function", node, f"{self.text(function)}({condition}, {no}, {yes})")
        elif name == "searchsorted" and not any(keyword.arg == "side" for keyword in node.keywords):
            self.add("function", node, f'{self.text(node)[:-1].rstrip().rstrip(",")}, side="right")')
        elif name == "lexsort" and arguments and isinstance(arguments[0], ast.Tuple):
            keys = [self.text(key) for key in arguments[0].elts]
            for n in range(len(keys)):
                kept = "".join(f"{key}, " for k, key in enumerate(keys) if k != n)
                self.add("function", node, f"{self.text(function)}(({kept}))")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in _FUNCTIONS:
            _, end = self.span(node)
            self.add("function", node, _FUNCTIONS[node.attr], (end - len(node.attr), end))
        self.visit(node.value)
