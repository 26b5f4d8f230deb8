"""What only tests reach: modules, functions, classes, methods and constants of the five rooms.

``python tests/arch/reach.py`` prints them and ends with 1 if one has no reason in reach.toml, or a reason is stale.

Roots are what a user starts: the entry points of pyproject.toml, the table of sub-commands in common/cli.py,
``python -m fedveil``, what ``import fedveil`` offers (the table ``_LAZY`` of its __init__; its classes' public methods
too), and modules that scripts and unit files of ``deploy/`` name. Reach goes on through what reached
code names. A name that only its own definition, or only unreached code, speaks of is not reached. In doubt a name is
reached: a method is reached with its class if reached code anywhere says its name as an attribute or a string, if a
template says it, if a base class from elsewhere may call it, or if a decorator may have registered it. Tests and
benches are not read.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_suffix(".toml")
ROOMS = ("common", "privacy", "client", "server", "deploy")
PACKAGE = "fedveil"
# Decorators that hand their function to nobody. Any other one may register it.
INERT = {
    "abstractmethod", "cache", "cached_property", "classmethod", "contextmanager", "dataclass", "final", "lru_cache",
    "no_grad", "overload", "override", "property", "runtime_checkable", "setter", "staticmethod", "total_ordering",
    "wraps",
}  # fmt: skip
# Base classes from elsewhere that call no method which a subclass adds.
PLAIN_BASES = {
    "ABC", "BaseModel", "Enum", "Exception", "Generic", "IntEnum", "NamedTuple", "Protocol", "RootModel", "StrEnum",
    "ValueError", "object",
}  # fmt: skip
IDENTIFIER = re.compile(r"[A-Za-z_]\w*\Z")
DOTTED = re.compile(rf"{PACKAGE}(?:\.\w+)+(?::\w+)?")
Function = (ast.FunctionDef, ast.AsyncFunctionDef)
Scope = dict[str, str | None]  # a bound name, and the dotted name that it was imported from


@dataclass
class Item:
    """A definition: what it names, and what makes it live beside being named."""

    where: str
    kind: str
    names: set[str] = field(default_factory=set)  # dotted names, as far as imports tell
    asked: set[str] = field(default_factory=set)  # those that only isinstance takes
    says: set[str] = field(default_factory=set)  # attributes and strings
    bases: list[str] = field(default_factory=list)
    registered: bool = False  # by a decorator, or called by Python itself
    owner: str = ""  # of a method: its class; of all others: their module


class Names(ast.NodeVisitor):
    """Collects into an item what a piece of code names."""

    def __init__(self, item: Item, module: Scope, own: str) -> None:
        self.item, self.scopes, self.own = item, [module], own

    def lookup(self, name: str) -> str | None:
        """The dotted name behind a bare one; None for a local variable or a builtin."""
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return None

    def visit_Name(self, node: ast.Name) -> None:
        """A bare name, where it is read."""
        if isinstance(node.ctx, ast.Load) and (target := self.lookup(node.id)):
            self.item.names.add(target)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """A chain of attributes: a dotted name if it starts at an import, words otherwise."""
        chain: list[str] = []
        at: ast.expr = node
        while isinstance(at, ast.Attribute):
            chain.insert(0, at.attr)
            at = at.value
        target = self.lookup(at.id) if isinstance(at, ast.Name) else None
        if target and target.split(".")[0] == PACKAGE:
            self.item.names.add(".".join([target, *chain]))
        else:
            self.item.says.update(chain)
            self.visit(at)

    def visit_Call(self, node: ast.Call) -> None:
        """To ask whether something is of a class does not reach the class; a constant that lists classes is reached."""
        if not (isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass")):
            self.generic_visit(node)
            return
        self.visit(node.args[0])
        asked = Names(Item("", ""), {}, self.own)
        asked.scopes = self.scopes
        asked.visit(node.args[1])
        self.item.asked |= asked.item.names

    def visit_Constant(self, node: ast.Constant) -> None:
        """A string that is an identifier, or names a module."""
        if isinstance(node.value, str):
            if IDENTIFIER.match(node.value):
                self.item.says.add(node.value)
            self.item.names.update(x.replace(":", ".") for x in DOTTED.findall(node.value))

    def visit_Expr(self, node: ast.Expr) -> None:
        """A statement that is a string is a docstring: it reaches nothing."""
        if not (isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        """A module is reached where it is imported."""
        self.item.names.update(f"{a.name}." for a in node.names)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """So is that which a name is taken from, but not the name."""
        self.item.names.update({f"{node.module}.", *(f"{node.module}.{a.name}." for a in node.names)})

    def annotation(self, node: ast.expr | None) -> None:
        """An annotation, in quotes or not."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.parse(node.value, mode="eval").body
        if node is not None:
            self.visit(node)

    def visit_arg(self, node: ast.arg) -> None:
        """A parameter's annotation."""
        self.annotation(node.annotation)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        """A function has a scope of its own."""
        for outside in (*node.decorator_list, *node.args.defaults, *(d for d in node.args.kw_defaults if d)):
            self.visit(outside)
        self.annotation(node.returns)
        self.scopes.append(_local(node))
        for arg in _arguments(node.args):
            self.visit(arg)
        for statement in node.body:
            self.visit(statement)
        self.scopes.pop()

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815 - the visitor's name

    def visit_Lambda(self, node: ast.Lambda) -> None:
        """So has a lambda."""
        self.scopes.append({a.arg: None for a in _arguments(node.args)})
        self.generic_visit(node)
        self.scopes.pop()


def _arguments(a: ast.arguments) -> list[ast.arg]:
    return [*a.posonlyargs, *a.args, *a.kwonlyargs, *(x for x in (a.vararg, a.kwarg) if x)]


def _local(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Scope:
    """What a function binds: imports to their source, all else to nothing."""
    scope: Scope = {a.arg: None for a in _arguments(function.args)}
    away: set[str] = set()
    todo: list[ast.AST] = list(function.body)
    while todo:
        node = todo.pop()
        if isinstance(node, (*Function, ast.ClassDef)):
            scope[node.name] = None
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            scope.update(_imported(node))
        elif isinstance(node, ast.Global):
            away.update(node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            scope.setdefault(node.id, None)
        todo.extend(ast.iter_child_nodes(node))
    return {k: v for k, v in scope.items() if k not in away}


def _imported(node: ast.Import | ast.ImportFrom) -> Scope:
    if isinstance(node, ast.ImportFrom):
        return {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return {a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names}


def _word(node: ast.expr) -> str:
    """The last word of a decorator or base class: ``dataclass`` of ``@dataclasses.dataclass(frozen=True)``."""
    while isinstance(node, (ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


class Source:
    """Every definition of a tree, by its dotted name, and the names that modules import."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root, self.items, self.imports = root, dict[str, Item](), dict[str, Scope]()
        for base, room in ((root, r) for r in (*ROOMS, f"src/{PACKAGE}")):
            for path in sorted((base / room).rglob("*.py")):
                if path.is_symlink() or "__pycache__" in path.parts:
                    continue
                inside = path.relative_to(root / "src" / PACKAGE if room.startswith("src") else root).with_suffix("")
                parts = [p for p in inside.parts if p != "__init__"]
                self._module(".".join([PACKAGE, *parts]), path)

    def _module(self, name: str, path: Path) -> None:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        scope: Scope = {}
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)) and node.col_offset == 0:
                scope.update(_imported(node))
        self.imports[name] = dict(scope)
        where = path.relative_to(self.root).as_posix()
        statements = list(_flat(tree.body))
        for node in statements:
            scope.update({own: f"{name}.{own}" for own in _defined(node)})
        body = self.items[name] = Item(where, "module")
        for node in statements:
            if not (defined := _defined(node)):
                Names(body, scope, name).visit(node)
            for own in defined:
                self._definition(f"{name}.{own}", node, scope, f"{where}:{node.lineno}", name)

    def _definition(self, name: str, node: ast.stmt, scope: Scope, where: str, owner: str) -> None:
        kind = "function" if isinstance(node, Function) else "class" if isinstance(node, ast.ClassDef) else "constant"
        item = self.items.setdefault(name, Item(where, kind, owner=owner))
        if isinstance(node, (*Function, ast.ClassDef)):
            item.registered |= any(_word(d) not in INERT for d in node.decorator_list)
            item.registered |= node.name in ("__getattr__", "__dir__")  # of a module: Python calls them
        if not isinstance(node, ast.ClassDef):
            Names(item, scope, name).visit(node)
            return
        seen = Names(item, scope, name)
        for part in (*node.decorator_list, *node.bases, *node.keywords):
            seen.visit(part)
        item.bases = [seen.lookup(_word(b)) or _word(b) for b in node.bases]
        for inner in node.body:
            if isinstance(inner, Function):
                at = f"{where.rsplit(':', 1)[0]}:{inner.lineno}"
                method = self.items.setdefault(f"{name}.{inner.name}", Item(at, "method", owner=name))
                method.registered |= inner.name.startswith("__") and inner.name.endswith("__")
                method.registered |= inner.name == "_repr_html_"  # notebooks call it
                method.registered |= any(_word(d) not in INERT for d in inner.decorator_list)
                Names(method, scope, name).visit(inner)
            elif isinstance(inner, ast.AnnAssign):
                seen.annotation(inner.annotation)
                if inner.value is not None:
                    seen.visit(inner.value)
            else:
                seen.visit(inner)

    def resolve(self, dotted: str) -> Iterator[tuple[str, str]]:
        """(item or module, words left over) that a dotted name stands for, through every import on the way."""
        whole, parts = dotted.endswith("."), dotted.rstrip(".").split(".")
        for length in range(len(parts), 0, -1):
            head, rest = ".".join(parts[:length]), parts[length:]
            if head not in self.items:
                continue
            if whole and self.items[head].kind != "module":
                continue
            source = self.imports.get(head, {}).get(rest[0]) if rest and not whole else None
            if source and source.split(".")[0] == PACKAGE and source != f"{head}.{rest[0]}":
                yield from self.resolve(".".join([source, *rest[1:]]))
            for above in range(1, length + 1):  # importing a module runs its packages
                yield ".".join(parts[:above]), ""
            yield head, " ".join(rest)
            return

    def foreign(self, name: str) -> bool:
        """Whether a base class from elsewhere may call this class's methods."""
        bases = [next(self.resolve(b), None) and b or b for b in self.items[name].bases]
        return any(self.foreign(b) if b in self.items else b.split(".")[-1] not in PLAIN_BASES for b in bases)

    def roots(self) -> set[str]:
        """What a user starts."""
        project = tomllib.loads((self.root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        groups = [project.get("scripts", {}), *project.get("entry-points", {}).values()]
        found = {target.replace(":", ".") for group in groups for target in group.values()}
        for path in (self.root / "deploy").rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc", ".j2"):
                found |= set(DOTTED.findall(path.read_text(encoding="utf-8")))
        for name in self.commands():
            found |= {f"{PACKAGE}.deploy.cli.{name}.{held}" for held in ("app", name)}
        return {PACKAGE, f"{PACKAGE}.__main__", *found, *self.offered()}

    def offered(self) -> set[str]:
        """The dotted names behind the package's lazy ones."""
        path = self.root / "src" / PACKAGE / "__init__.py"
        for node in ast.parse(path.read_text(encoding="utf-8")).body if path.exists() else ():
            if isinstance(node, ast.Assign) and "_LAZY" in {getattr(t, "id", "") for t in node.targets}:
                return {f"{module}.{name}" for name, module in ast.literal_eval(node.value).items()}
        return set()

    def commands(self) -> list[str]:
        """The names in the table of sub-commands, whose modules are imported by name."""
        path = self.root / "common" / "cli.py"
        for node in ast.parse(path.read_text(encoding="utf-8")).body if path.exists() else ():
            if isinstance(node, ast.Assign) and "COMMANDS" in {getattr(t, "id", "") for t in node.targets}:
                return list(ast.literal_eval(node.value))
        return []

    def said(self) -> set[str]:
        """Words inside the expressions of templates."""
        pieces = (re.findall(r"\{[{%].*?[%}]\}", p.read_text(encoding="utf-8"), re.DOTALL)
                  for room in ROOMS for p in (self.root / room).rglob("*.j2"))  # fmt: skip
        return set(re.findall(r"\w+", " ".join(x for piece in pieces for x in piece)))

    def reached(self, extra: Iterable[str] = ()) -> set[str]:
        """Every item that the roots and ``extra`` lead to."""
        live: set[str] = set()
        said = self.said()
        methods = [(n, i, self.foreign(i.owner)) for n, i in self.items.items() if i.kind == "method"]
        offered = self.offered()
        others = [(n, i) for n, i in self.items.items() if i.registered and i.kind != "method"]
        todo = [name for dotted in (*self.roots(), *extra) for name, _ in self.resolve(dotted)]
        while todo:
            while todo:
                name = todo.pop()
                if name in live or name not in self.items:
                    continue
                live.add(name)
                item = self.items[name]
                said |= item.says
                todo += [item.owner] if item.owner else []
                for dotted in item.names | item.asked:
                    for target, rest in self.resolve(dotted):
                        if dotted in item.names or self.items[target].kind != "class":
                            todo.append(target)
                            said.update(rest.split())
            todo += [n for n, i, foreign in methods if n not in live and i.owner in live
                     and (i.registered or foreign or (word := n.rsplit(".", 1)[1]) in said
                          or (i.owner in offered and word[0] != "_"))]  # fmt: skip
            todo += [n for n, i in others if n not in live and i.owner in live]
        return live


def _flat(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, those under if and try included; imports under ``if TYPE_CHECKING`` too."""
    for node in body:
        if isinstance(node, (ast.If, ast.Try)):
            if isinstance(node, ast.If):
                yield ast.copy_location(ast.Expr(node.test), node)
            yield from _flat(node.body)
            yield from _flat(node.orelse)
            for handler in getattr(node, "handlers", []):
                yield from _flat(handler.body)
        else:
            yield node


def _defined(node: ast.stmt) -> list[str]:
    """The names that a module's statement defines."""
    if isinstance(node, (*Function, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    return [n for n in names if n != "__all__"]


@dataclass(frozen=True)
class Report:
    """Names without ``fedveil.``: unreached and unexplained with their place, and reasons that explain nothing."""

    unexplained: Mapping[str, str]
    stale: tuple[str, ...]


def report(source: Source, table: Mapping[str, Iterable[str]]) -> Report:
    """Compare what is reached with the reasons, ``table``: a reason, and the names that it keeps."""
    kept = [f"{PACKAGE}.{name}" for names in table.values() for name in names]
    live = source.reached(kept)
    dead = {n: i for n, i in source.items.items() if n not in live}
    modules = {n for n, i in source.items.items() if i.kind == "module" and "__init__" not in i.where}
    for name in modules:  # imported, but none of its definitions is used
        inside = [n for n, i in source.items.items() if i.owner == name]
        if inside and all(n in dead for n in inside):
            dead.setdefault(name, source.items[name])
    shown = {n.removeprefix(f"{PACKAGE}."): f"{i.where} {i.kind}" for n, i in dead.items() if i.owner not in dead}
    stale = [k for k in kept if k not in source.items or k in source.reached(x for x in kept if x != k)]
    return Report(shown, tuple(k.removeprefix(f"{PACKAGE}.") for k in stale))


def main() -> int:
    """Print the report; 1 if there is something in it."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    found = report(Source(), table.get("kept", {}))
    for name, where in sorted(found.unexplained.items()):
        print(f"{where} {name}: nothing but a test reaches it")
    for name in found.stale:
        print(f"{TABLE.name}: {name} is reached, or does not exist: take it out of the table")
    return 1 if found.unexplained or found.stale else 0


if __name__ == "__main__":
    sys.exit(main())
