"""A release of vLLM as source: what stands where in it, read without importing anything of it.

``python tools/vllm_tree.py FOLDER`` says whether it is the folder's vLLM that would be imported.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
import zipfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path


class VLLMTree:
    """An unpacked release, a wheel, or what is installed.

    Args:
        root: The folder that holds ``vllm/``, or a wheel.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._wheel = zipfile.ZipFile(root) if root.is_file() else None
        self._modules: dict[str, Module | None] = {}
        self._members: dict[str, dict[str, Found]] = {}

    @classmethod
    def installed(cls) -> VLLMTree:
        """That of this environment; finding it imports nothing.

        Raises:
            ModuleNotFoundError: there is none.
        """
        found = importlib.util.find_spec("vllm")
        if found is None or found.origin is None:
            raise ModuleNotFoundError("vLLM is not installed; give its folder, or a wheel")
        return cls(Path(found.origin).parents[1])

    def module(self, name: str) -> Module | None:
        """The module of that name; None if there is none."""
        if name not in self._modules:
            path = name.replace(".", "/")
            texts = ((each, self._text(each)) for each in (f"{path}.py", f"{path}/__init__.py"))
            found = next(((each, text) for each, text in texts if text is not None), None)
            self._modules[name] = None if found is None else Module(name, *found)
        return self._modules[name]

    def _text(self, path: str) -> str | None:
        if self._wheel is not None:
            return self._wheel.read(path).decode() if path in self._wheel.NameToInfo else None
        file = self.root / path
        return file.read_text() if file.is_file() else None

    def find(self, path: str) -> Found | None:
        """What a dotted path names, wherever it is defined: names that a module imports are followed to their home."""
        parts = path.split(".")
        for num_modules in range(len(parts) - 1, 0, -1):
            if (module := self.module(".".join(parts[:num_modules]))) is not None:
                return self._find_in(module, parts[num_modules:])
        return None

    def _find_in(self, module: Module, names: list[str]) -> Found | None:
        name, rest = names[0], names[1:]
        node, home = module.defined.get(name), module.imported.get(name)
        if home is not None and not isinstance(node, ast.ClassDef | ast.FunctionDef):
            node = None  # imported under a condition, and set to something else under another
        if node is None:
            if home is None and "__getattr__" in module.defined:  # names that are imported when they are asked for
                home = module.lazy.get(name)
            return None if home is None else self.find(".".join([home, *rest]))
        if not rest:
            return Found(module, node)
        if not isinstance(node, ast.ClassDef):
            return None
        return self.member(Found(module, node), rest[0]) if len(rest) == 1 else None

    def bases(self, found: Found) -> Iterator[Found]:
        """A class, and those that it derives from, as far as vLLM defines them."""
        yield found
        assert isinstance(found.node, ast.ClassDef)
        for base in found.node.bases:
            name = base.value if isinstance(base, ast.Subscript) else base
            home = self._find_in(found.module, ast.unparse(name).split("."))
            if home is not None and isinstance(home.node, ast.ClassDef):
                yield from self.bases(home)

    def member(self, found: Found, name: str) -> Found | None:
        """Where a class, or one that it derives from, defines this method, field or attribute of instances."""
        key = f"{found.module.name}.{getattr(found.node, 'name', '')}"
        if key not in self._members:
            self._members[key] = self._members_of(found)
        return self._members[key].get(name)

    def _members_of(self, found: Found) -> dict[str, Found]:
        bases = list(self.bases(found))
        members: dict[str, Found] = {}
        for base in bases:
            assert isinstance(base.node, ast.ClassDef)
            for node in base.node.body:
                for name in names_defined(node):
                    members.setdefault(name, Found(base.module, node))
        for base in bases:
            for node in ast.walk(base.node):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    members.setdefault(node.attr, Found(base.module, node))
        return members


class Found:
    """A definition, and the module that it stands in."""

    def __init__(self, module: Module, node: ast.AST) -> None:
        self.module = module
        self.node = node

    @property
    def where(self) -> str:
        """Path and line."""
        return f"{self.module.path}:{getattr(self.node, 'lineno', 1)}"

    @property
    def source(self) -> str:
        """Its text, without what does not change what it does: comments, layout and docstrings."""
        return ast.unparse(_without_docstrings(self.node))


class Module:
    """One module's source."""

    def __init__(self, name: str, path: str, text: str) -> None:
        self.name = name
        self.path = path
        self.tree = ast.parse(text)

    @cached_property
    def defined(self) -> dict[str, ast.AST]:
        """What it defines itself, also under a condition."""
        return {name: node for node in _statements(self.tree.body) for name in names_defined(node)}

    @cached_property
    def imported(self) -> dict[str, str]:
        """What it imports by name, and from where."""
        found: dict[str, str] = {}
        for node in _statements(self.tree.body):
            if isinstance(node, ast.ImportFrom):
                module = self._absolute(node)
                found.update({each.asname or each.name: f"{module}.{each.name}" for each in node.names})
        return found

    @cached_property
    def lazy(self) -> dict[str, str]:
        """Names that tables of strings say where to import from, as ``vllm/__init__.py`` has one."""
        found: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    texts = [each.value for each in (key, value) if isinstance(each, ast.Constant)]
                    if len(texts) == 2 and all(isinstance(text, str) for text in texts) and ":" in str(texts[1]):
                        place, _, name = str(texts[1]).partition(":")
                        found[str(texts[0])] = f"{self.name}{place}.{name}" if place[:1] == "." else f"{place}.{name}"
        return found

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = self.path.endswith("__init__.py")
        parts = self.name.split(".")[: None if is_package and node.level == 1 else -(node.level - is_package)]
        return ".".join([*parts, *([node.module] if node.module else [])])


def names_defined(node: ast.AST) -> list[str]:
    """Names that a statement defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.AnnAssign):
        return [node.target.id] if isinstance(node.target, ast.Name) else []
    if isinstance(node, ast.Assign):
        return [each.id for target in node.targets for each in ast.walk(target) if isinstance(each, ast.Name)]
    return []


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """A module's statements, those under conditions included."""
    for node in body:
        yield node
        for inner in ("body", "orelse", "finalbody"):
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _statements(getattr(node, inner, []))
        for handler in getattr(node, "handlers", []):
            yield from _statements(handler.body)


def _without_docstrings(node: ast.AST) -> ast.AST:
    for each in ast.walk(node):
        body = getattr(each, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                each.body = body[1:] or [ast.Pass()]  # type: ignore[attr-defined]
    return node


def main() -> int:
    """Whether the vLLM of a folder is the one that would be imported."""
    wanted, found = Path(sys.argv[1]).resolve(), VLLMTree.installed().root.resolve()
    if found != wanted:
        print(f"the vLLM that would be imported is in {found}, not in {wanted}", file=sys.stderr)
    return int(found != wanted)


if __name__ == "__main__":
    sys.exit(main())
