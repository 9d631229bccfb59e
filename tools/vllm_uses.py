"""What layerkv uses of vLLM, read from its own source: names that it imports, members of vLLM's objects that it reads,
sets, calls or overrides, parameters that it passes, and what its overrides take.

``python tools/vllm_uses.py --write`` writes ``layerkv/vllm_plugin/surfaces.py``, which is checked when an engine
starts; without the flag it says whether that is what is used. vLLM need not be importable: its source is read for one
thing, what of our classes is vLLM's too (``--vllm`` names another release's).

What a name is follows from annotations, from assignments, loops and calls, and from the table :data:`TYPES` of what
vLLM's own attributes are. What cannot be followed is not seen: give it an annotation, or a row there.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from layerkv.vllm_plugin.compat import NOT_IN_ALL
from tools.vllm_tree import VLLMTree

PLUGIN = Path(__file__).parents[1] / "layerkv" / "vllm_plugin"
SURFACES = "surfaces.py"
WIDTH = 120

MIXED_INTO = {
    "LayerKVSchedulerMixin": "vllm.v1.core.sched.scheduler.Scheduler",
    "LayerKVWorkerMixin": "vllm.v1.worker.gpu_worker.Worker",
    "SchedulerView": "vllm.v1.core.sched.scheduler.Scheduler",
    "SegmentQueue": "vllm.v1.core.kv_cache_utils.FreeKVCacheBlockQueue",
    "ZonePool": "vllm.v1.core.block_pool.BlockPool",
}
"""Classes of ours that stand for one of vLLM's, and do not say so by a base."""

HOMES = {
    "LoRAConfig": "vllm.config",
    "ModelConfig": "vllm.config",
    "ParallelConfig": "vllm.config",
    "SchedulerConfig": "vllm.config",
    "CacheConfig": "vllm.config",
    "DeviceConfig": "vllm.config",
    "CompilationConfig": "vllm.config",
    "AuxOutputConfig": "vllm.config",
    "Attention": "vllm.model_executor.layers.attention.attention",
    "KVTransferConfig": "vllm.config",
    "LoRARequest": "vllm.lora.request",
    "KVCacheManager": "vllm.v1.core.kv_cache_manager",
    "KVCacheCoordinator": "vllm.v1.core.kv_cache_coordinator",
    "BlockPool": "vllm.v1.core.block_pool",
    "FreeKVCacheBlockQueue": "vllm.v1.core.kv_cache_utils",
    "KVCacheBlock": "vllm.v1.core.kv_cache_utils",
    "RequestQueue": "vllm.v1.core.sched.request_queue",
    "Request": "vllm.v1.request",
    "SamplingParams": "vllm.sampling_params",
    "SchedulerStats": "vllm.v1.metrics.stats",
    "EngineCoreOutput": "vllm.v1.engine",
    "KVConnectorOutput": "vllm.v1.outputs",
    "KVConnectorStats": "vllm.distributed.kv_transfer.kv_connector.v1.metrics",
    "KVConnectorBlockState": "vllm.v1.core.sched.output",
    "KVCacheGroupSpec": "vllm.v1.kv_cache_interface",
    "KVCacheTensor": "vllm.v1.kv_cache_interface",
    "StructuredOutputRequest": "vllm.v1.structured_output.request",
}
"""Where the classes of :data:`TYPES` are."""

TYPES = {
    "VllmConfig": "parallel_config=ParallelConfig model_config=ModelConfig scheduler_config=SchedulerConfig "
    "cache_config=CacheConfig device_config=DeviceConfig kv_transfer_config=KVTransferConfig "
    "lora_config=LoRAConfig "
    "compilation_config=CompilationConfig aux_output_config=AuxOutputConfig",
    "Scheduler": "vllm_config=VllmConfig scheduler_config=SchedulerConfig cache_config=CacheConfig "
    "lora_config=LoRAConfig "
    "kv_cache_manager=KVCacheManager waiting=RequestQueue kv_holding_waiting=RequestQueue deferred_waiting=*Request "
    "_inflight_prefills=*Request running=*Request requests=*Request",
    "CompilationConfig": "static_forward_context=*Attention",
    "Worker": "vllm_config=VllmConfig",
    "KVCacheManager": "block_pool=BlockPool coordinator=KVCacheCoordinator",
    "FullAttentionManager": "block_pool=BlockPool req_to_blocks=**KVCacheBlock",
    "BlockPool": "blocks=*KVCacheBlock free_block_queue=FreeKVCacheBlockQueue",
    "Request": "sampling_params=SamplingParams lora_request=LoRARequest "
    "structured_output_request=StructuredOutputRequest",
    "EngineCoreOutputs": "outputs=*EngineCoreOutput scheduler_stats=SchedulerStats",
    "ModelRunnerOutput": "kv_connector_output=KVConnectorOutput",
    "KVConnectorOutput": "kv_connector_stats=KVConnectorStats",
    "SchedulerOutput": "kv_connector_block_state=KVConnectorBlockState",
    "KVCacheConfig": "kv_cache_groups=*KVCacheGroupSpec kv_cache_tensors=*KVCacheTensor",
}
"""What vLLM's attributes are; a star for each level of list, mapping or queue around it."""

ITEMS = {"RequestQueue": "Request"}
"""Classes of vLLM's that are iterated over, and what they hold."""

SAME = ("list", "tuple", "sorted", "reversed", "set", "iter", "frozenset")
"""Calls of which the result holds what the argument holds."""

CONTAINERS = ("list", "set", "deque", "tuple", "Iterable", "Sequence", "Collection", "Iterator", "frozenset")
MAPPINGS = ("dict", "Mapping", "defaultdict")


class Uses:
    """What was found, by dotted path."""

    def __init__(self) -> None:
        self.names: defaultdict[str, set[str]] = defaultdict(set)
        self.members: defaultdict[str, set[str]] = defaultdict(set)
        self.parameters: defaultdict[str, set[str]] = defaultdict(set)
        self.overrides: dict[str, list[str]] = {}

    def tables(self) -> dict[str, dict[str, list[str]]]:
        """What is written, without what only some releases have."""
        found: dict[str, dict[str, list[str]]] = {}
        for title, table in (("NAMES", self.names), ("MEMBERS", self.members), ("PARAMETERS", self.parameters)):
            kept = {path: sorted(n for n in names if f"{path}.{n}" not in NOT_IN_ALL) for path, names in table.items()}
            found[title] = {path: kept[path] for path in sorted(kept) if kept[path] and path not in NOT_IN_ALL}
        found["OVERRIDES"] = {path: self.overrides[path] for path in sorted(self.overrides) if path not in NOT_IN_ALL}
        return found


class _Class:
    """A class of ours."""

    def __init__(self, node: ast.ClassDef) -> None:
        self.name = node.name
        self.node = node
        self.vllm_bases: list[str] = []
        self.our_bases: list[str] = []
        self.own: dict[str, str | None] = {}  # attribute -> type, None where it is not known


class Reader:
    """Reads the modules of a folder. A type is the dotted path of a class of vLLM's; ``*`` before it: many of them;
    ``@``: the class itself; ``:`` and a name: an instance of a class of ours."""

    def __init__(self, sources: Iterable[tuple[str, str]], vllm: VLLMTree | None) -> None:
        self.uses = Uses()
        self.classes: dict[str, _Class] = {}
        self._vllm = vllm
        trees = [(name, ast.parse(text)) for name, text in sources]
        self._imports = {name: dict(_imports(tree)) for name, tree in trees}
        self._imported: dict[str, str] = {}
        for name, tree in trees:
            self._imported = self._imports[name]
            self._find_classes(tree)
        self._leave_to_vllm()
        for record in (False, True):  # what attributes of ours are is known after the first reading
            for name, tree in trees:
                self._imported = self._imports[name]
                self._records = record
                if record:
                    self._note_imports(tree)
                _Scope(self, {}, None).statements(tree.body)
        self._note_overrides()

    def _find_classes(self, tree: ast.Module) -> None:
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef):
                continue
            found = self.classes[node.name] = _Class(node)
            for base in node.bases:
                if isinstance(base, ast.Name) and (path := self._imported.get(base.id, "")).startswith("vllm."):
                    found.vllm_bases.append(path)
                elif isinstance(base, ast.Name):
                    found.our_bases.append(base.id)
            if node.name in MIXED_INTO:
                found.vllm_bases.append(MIXED_INTO[node.name])
            for each in node.body:
                if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
                    found.own[each.name] = None
                elif isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
                    found.own[each.target.id] = self.type_of_annotation(each.annotation)
                elif isinstance(each, ast.Assign):
                    found.own.update({n.id: None for t in each.targets for n in ast.walk(t) if isinstance(n, ast.Name)})

    def _leave_to_vllm(self) -> None:
        """What a class declares and does not define is vLLM's, where that has it."""
        for found in self.classes.values():
            for each in found.node.body:
                name = None
                if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and each.value is None:
                    name = each.target.id
                elif isinstance(each, ast.FunctionDef) and _is_declared_only(each):
                    name = each.name
                is_theirs = found.name in MIXED_INTO or any(self._has(b, name or "") for b in self.vllm_bases_of(found))
                if name is not None and is_theirs:
                    del found.own[name]

    def _note_imports(self, tree: ast.Module) -> None:
        for path in _runtime_imports(tree):
            module, _, name = path.rpartition(".")
            self.uses.names[module].add(name)

    def _note_overrides(self) -> None:
        if self._vllm is None:
            return
        for each in self.classes.values():
            for base in self.vllm_bases_of(each):
                found = self._vllm.find(base)
                if found is None:
                    continue
                for node in each.node.body:
                    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("__"):
                        continue
                    if (theirs := self._vllm.member(found, node.name)) is not None:
                        self.uses.members[base].add(node.name)
                        path = f"{base}.{node.name}"
                        self._pass(path, set(_parameters(node)) & set(_parameters(theirs.node)))
                        if not _is_declared_only(node) and not _is_property(node):
                            self._override(path, node)

    def _override(self, path: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        """Of several that override one method, what all of them take."""
        takes, others = _signature(node), self.uses.overrides.get(path)
        if others is None or _takes_less(takes, others):
            self.uses.overrides[path] = takes

    def vllm_bases_of(self, each: _Class) -> list[str]:
        """Of a class of ours and of those of ours that it derives from."""
        ours = (self.vllm_bases_of(self.classes[base]) for base in each.our_bases if base in self.classes)
        return [*each.vllm_bases, *(path for paths in ours for path in paths)]

    def own_of(self, each: _Class) -> dict[str, str | None]:
        """Attributes that are ours."""
        found: dict[str, str | None] = {}
        for base in each.our_bases:
            if base in self.classes:
                found.update(self.own_of(self.classes[base]))
        return {**found, **each.own}

    def type_of_annotation(self, node: ast.expr | None) -> str | None:
        """What an annotation names."""
        match node:
            case ast.BinOp(left=left, right=right):
                return self.type_of_annotation(left) or self.type_of_annotation(right)
            case ast.Constant(value=str(text)):
                return self.type_of_annotation(ast.parse(text, mode="eval").body)
            case ast.Subscript(value=ast.Name(id=name), slice=inner):
                parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
                if name == "type":
                    found = self.type_of_annotation(parts[0])
                    return f"@{found}" if found else None
                if name not in (*CONTAINERS, *MAPPINGS):
                    return None
                found = self.type_of_annotation(parts[1 if name in MAPPINGS and len(parts) > 1 else 0])
                return f"*{found}" if found else None
            case ast.Name(id=name):
                if (path := self._imported.get(name, "")).startswith("vllm."):
                    return path
                return f":{name}" if name in self.classes else None
        return None

    def owner(self, of: str | None, name: str) -> str | None:
        """Of which class of vLLM's this attribute is; None if it is ours, or of nobody known."""
        if of is None or of.startswith(("*", "@:")) or name.startswith("__"):
            return None
        if not of.startswith(":"):
            return of.removeprefix("@")
        its = self.classes[of[1:]]
        bases = () if name in self.own_of(its) else self.vllm_bases_of(its)
        return next((base for base in bases if self._has(base, name)), bases[0] if bases else None)

    def attribute(self, of: str | None, name: str) -> str | None:
        """The type of an attribute; noted as a use if it is one of vLLM's."""
        if (owner := self.owner(of, name)) is None:
            is_ours = of is not None and of.startswith(":")
            return self.own_of(self.classes[of[1:]]).get(name) if is_ours and of is not None else None
        if self._records:
            self.uses.members[owner].add(name)
        return _type_of_attribute(owner, name)

    def _has(self, path: str, name: str) -> bool:
        found = None if self._vllm is None else self._vllm.find(path)
        return found is not None and self._vllm is not None and self._vllm.member(found, name) is not None

    def passes(self, of: str, node: ast.Call) -> None:
        """A function, method or class of vLLM's is called: what it is passed, by name or at a place."""
        self._pass(of, (each.arg for each in node.keywords if each.arg is not None))
        found = None if self._vllm is None else self._vllm.find(of)
        if found is not None:
            is_star = [isinstance(each, ast.Starred) for each in node.args]
            num_places = is_star.index(True) if True in is_star else len(is_star)
            self._pass(of, _places(found.node)[:num_places])

    def _pass(self, of: str, names: Iterable[str]) -> None:
        if self._records and (given := set(names)):
            self.uses.parameters[of].update(given)


class _Scope:
    """One function's names, or a module's."""

    def __init__(self, reader: Reader, names: dict[str, str | None], owner: _Class | None) -> None:
        self._reader = reader
        self._names = names
        self._owner = owner

    def statements(self, body: Iterable[ast.AST]) -> None:
        for node in body:
            self._statement(node)

    def _statement(self, node: ast.AST) -> None:
        match node:
            case ast.ClassDef():
                for each in node.decorator_list:
                    self.type_of(each)
                _Scope(self._reader, dict(self._names), self._reader.classes[node.name]).statements(node.body)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self._function(node)
            case ast.Assign(targets=targets, value=value):
                found = self.type_of(value)
                for target in targets:
                    self._bind(target, found, value)
            case ast.AnnAssign(target=target, annotation=annotation, value=value):
                if value is not None:
                    self.type_of(value)
                self._bind(target, self._reader.type_of_annotation(annotation), None)
            case ast.For(target=target, iter=items) | ast.AsyncFor(target=target, iter=items):
                self._loop(target, items)
                self.statements([*node.body, *node.orelse])
            case ast.ImportFrom() | ast.Import():
                pass
            case ast.Assert(test=test):
                self.type_of(test)
                self._names.update(self._narrowed(test))
            case ast.If(test=test, body=body, orelse=orelse):
                self.type_of(test)
                inner = self._inner(self._narrowed(test))
                inner.statements(body)
                names = {**inner._names, **{name: self._names.get(name) for name in self._narrowed(test)}}
                self._names.update(names)  # what is bound inside goes on
                self.statements(orelse)
            case _:
                for each in ast.iter_child_nodes(node):
                    if isinstance(each, ast.expr):
                        self.type_of(each)
                    else:
                        self._statement(each)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        names = dict(self._names)
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for arg in every:
            names[arg.arg] = self._reader.type_of_annotation(arg.annotation)
        is_static = any(isinstance(each, ast.Name) and each.id == "staticmethod" for each in node.decorator_list)
        if self._owner is not None and every and not is_static:
            names[every[0].arg] = f":{self._owner.name}"
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.type_of(default)
        inner = _Scope(self._reader, names, None)
        inner._of_class = self._owner or self._of_class
        inner.statements(node.body)

    _of_class: _Class | None = None

    def _bind(self, target: ast.expr, found: str | None, value: ast.expr | None) -> None:
        match target:
            case ast.Name(id=name):
                self._names[name] = found
            case ast.Tuple(elts=parts):
                values = value.elts if isinstance(value, ast.Tuple) and len(value.elts) == len(parts) else None
                for i, part in enumerate(parts):
                    self._bind(part, self.type_of(values[i]) if values else _item(found), values[i] if values else None)
            case ast.Attribute(value=ast.Name(id=name), attr=attr) if self._is_self(name):
                owner = self._of_class
                assert owner is not None
                own = self._reader.own_of(owner)
                its_own = attr in own or not any(self._reader._has(b, attr) for b in self._reader.vllm_bases_of(owner))
                if its_own:
                    owner.own[attr] = owner.own.get(attr) or found or own.get(attr)
                else:
                    self._reader.attribute(f":{owner.name}", attr)
            case _:
                self.type_of(target)

    def _is_self(self, name: str) -> bool:
        return self._of_class is not None and self._names.get(name) == f":{self._of_class.name}"

    def _loop(self, target: ast.expr, items: ast.expr) -> None:
        found = self.type_of(items)
        match items, target:
            case ast.Call(func=ast.Attribute(value=mapping, attr="items")), ast.Tuple(elts=[_, held]):
                self._bind(held, _item(self.type_of(mapping)), None)
                return
        self._bind(target, _item(found), None)

    def type_of(self, node: ast.AST) -> str | None:
        """What an expression is; uses in it are noted."""
        reader = self._reader
        match node:
            case ast.Name(id=name):
                if name in self._names:
                    return self._names[name]
                path = reader._imported.get(name, "")
                if path.startswith("vllm."):
                    return f"@{path}"
                return f"@:{name}" if name in reader.classes else None
            case ast.Attribute(value=value, attr=attr):
                return reader.attribute(self.type_of(value), attr)
            case ast.Call():
                return self._call(node)
            case ast.Subscript(value=value, slice=inner):
                self.type_of(inner)
                of = self.type_of(value)
                return of if isinstance(inner, ast.Slice) else _item(of)
            case ast.NamedExpr(target=target, value=value):
                found = self.type_of(value)
                self._bind(target, found, value)
                return found
            case ast.BoolOp(values=values):
                return next((found for found in [self.type_of(each) for each in values] if found), None)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                self.type_of(test)
                found, other = self._inner(self._narrowed(test)).type_of(body), self.type_of(orelse)
                return found or other
            case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
                found = [self.type_of(each.value if isinstance(each, ast.Starred) else each) for each in parts]
                kinds = [
                    f if isinstance(each, ast.Starred) else f"*{f}" for each, f in zip(parts, found, strict=True) if f
                ]
                return kinds[0] if kinds else None
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp():
                inner = self._comprehension(node.generators)
                found = inner.type_of(node.elt)
                return f"*{found}" if found else None
            case ast.DictComp():
                inner = self._comprehension(node.generators)
                inner.type_of(node.key)
                found = inner.type_of(node.value)
                return f"*{found}" if found else None
            case ast.Lambda(args=args, body=body):
                inner = self._inner({each.arg: None for each in args.args})
                inner.type_of(body)
                return None
            case ast.BinOp(left=left, right=right):
                found, other = self.type_of(left), self.type_of(right)
                return found or other
        for each in ast.iter_child_nodes(node):
            self.type_of(each)
        return None

    def _narrowed(self, test: ast.expr) -> dict[str, str | None]:
        """What a name is where this holds."""
        match test:
            case ast.Call(func=ast.Name(id="isinstance"), args=[ast.Name(id=name), kind]):
                found = self.type_of(kind)
                return {name: found.removeprefix("@") if found is not None and found[:1] == "@" else None}
        return {}

    def _inner(self, names: dict[str, str | None]) -> _Scope:
        inner = _Scope(self._reader, {**self._names, **names}, None)
        inner._of_class = self._of_class
        return inner

    def _comprehension(self, generators: list[ast.comprehension]) -> _Scope:
        inner = self._inner({})
        for each in generators:
            inner._loop(each.target, each.iter)
            for test in each.ifs:
                inner.type_of(test)
        return inner

    def _call(self, node: ast.Call) -> str | None:
        args = [self.type_of(each) for each in node.args]
        for each in node.keywords:
            self.type_of(each.value)
        reader = self._reader
        if isinstance(node.func, ast.Name) and node.func.id not in self._names:
            name = node.func.id
            path = reader._imported.get(name, "")
            if path.startswith("vllm."):
                reader.passes(path, node)
                return path if name[:1].isupper() else None
            if name == "super" and self._of_class is not None:
                bases = reader.vllm_bases_of(self._of_class)
                return bases[0] if bases else None
            if name in SAME:
                return args[0] if args else None
            if name in ("next", "min", "max"):
                return _item(args[0]) if args else None
            if name == "getattr" and isinstance(node.args[1], ast.Constant):  # also one with a default: it would hide
                return reader.attribute(args[0], str(node.args[1].value))
            if name == "replace" and args:
                for each in node.keywords:
                    if each.arg is not None:
                        reader.attribute(args[0], each.arg)
                return args[0]
            return f":{name}" if name in reader.classes else None
        if not isinstance(node.func, ast.Attribute):
            self.type_of(node.func)
            return None
        of, method = self.type_of(node.func.value), node.func.attr
        if of is not None and of.startswith("*"):
            if method in ("values", "copy"):
                return of
            return _item(of) if method in ("get", "pop", "popleft", "setdefault") else None
        reader.attribute(of, method)
        if (owner := reader.owner(of, method)) is not None:
            reader.passes(f"{owner}.{method}", node)
        return None


def _item(found: str | None) -> str | None:
    """What something holds."""
    if found is None:
        return None
    if found.startswith("*"):
        return found[1:]
    item = ITEMS.get(found.rpartition(".")[2])
    return None if item is None else f"{HOMES[item]}.{item}"


def _type_of_attribute(path: str, name: str) -> str | None:
    row = TYPES.get(path.rpartition(".")[2], "")
    for pair in row.split():
        attribute, _, kind = pair.partition("=")
        if attribute == name:
            stars, cls = re.fullmatch(r"(\**)(\w+)", kind).groups()  # type: ignore[union-attr]
            home = HOMES.get(cls, "vllm.config")
            return f"{stars}{home}.{cls}"
    return None


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from ((each.asname or each.name, f"{node.module}.{each.name}") for each in node.names)


def _runtime_imports(tree: ast.Module) -> Iterator[str]:
    """Names of vLLM's that are imported when the program runs."""
    only_checked = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for each in node.body
        for inner in ast.walk(each)
    }
    for node in ast.walk(tree):
        is_run = isinstance(node, ast.ImportFrom) and id(node) not in only_checked
        if is_run and (node.module or "").split(".")[0] == "vllm":
            yield from (f"{node.module}.{each.name}" for each in node.names)


def _parameters(node: ast.AST) -> list[str]:
    """Names of what a function takes, but for itself."""
    by_name = node.args.kwonlyargs if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else []
    return [*_places(node), *(each.arg for each in by_name)]


def _places(node: ast.AST) -> list[str]:
    """Names of what a function takes by its place, but for itself."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return []
    return [each.arg for each in (*node.args.posonlyargs, *node.args.args) if each.arg not in ("self", "cls")]


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """What a function takes, as it is written: ``a b * c **more``."""
    args = node.args
    star = f"*{args.vararg.arg}" if args.vararg else "*" if args.kwonlyargs else None
    names = [*_places(node), *([star] if star else []), *(each.arg for each in args.kwonlyargs)]
    return [*names, *([f"**{args.kwarg.arg}"] if args.kwarg else [])]


def _takes_less(one: list[str], other: list[str]) -> bool:
    """Whether of two that override a method the first is the one to look at."""
    return sum(each.startswith("*") for each in one) < sum(each.startswith("*") for each in other) or (
        len(one) < len(other)
    )


def _is_declared_only(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return ast.unparse(node.body[-1]) == "..."


def _is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("property" in ast.unparse(each) for each in node.decorator_list)


def uses_of_plugin(vllm: VLLMTree | None) -> Uses:
    """What the adapter uses."""
    files = [path for path in sorted(PLUGIN.glob("*.py")) if path.name != SURFACES]
    return Reader([(path.stem, path.read_text()) for path in files], vllm).uses


def text_of(uses: Uses) -> str:
    """The module that lists them."""
    lines = [
        '"""What layerkv uses of vLLM. Written by ``tools/vllm_uses.py --write``: change that, or what uses it.',
        "",
        "NAMES: what is imported, by module. MEMBERS: what is read, set, called or overridden, by class. PARAMETERS:",
        "what is passed, by function or class. OVERRIDES: what ours takes, by the method of vLLM's that it overrides,",
        "in order; those only by name behind a star.",
        '"""',
    ]
    for title, table in uses.tables().items():
        lines += ["", f"{title}: dict[str, str] = {{"]
        for path, names in table.items():
            row = f'    "{path}": "{" ".join(names)}",'
            if len(row) <= WIDTH:
                lines.append(row)
                continue
            lines += [f'    "{path}": (', *_wrapped(names), "    ),"]
        lines.append("}")
    return "\n".join(lines) + "\n"


def _wrapped(names: list[str]) -> Iterator[str]:
    row = ""
    for i, name in enumerate(names):
        word = name if i == len(names) - 1 else f"{name} "
        if len(row) + len(word) > WIDTH - 10:
            yield f'        "{row}"'
            row = ""
        row += word
    yield f'        "{row}"'


def main() -> int:
    """Write the list, or compare it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="write layerkv/vllm_plugin/surfaces.py")
    parser.add_argument("--vllm", type=Path, help="folder that holds vllm/, or a wheel; default: what is installed")
    options = parser.parse_args()
    vllm = VLLMTree.installed() if options.vllm is None else VLLMTree(options.vllm)
    text, file = text_of(uses_of_plugin(vllm)), PLUGIN / SURFACES
    if options.write:
        file.write_text(text)
        return 0
    if file.read_text() != text:
        print(f"{file} does not list what is used; run: python tools/vllm_uses.py --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
