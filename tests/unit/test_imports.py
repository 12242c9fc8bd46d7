"""Imports go one way. The graph is drawn from the sources with `ast`, imports inside functions included."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_amd"

LAYERS = (
    {"__init__", "errors"},
    {"config_yaml", "config_checks", "program"},
    {"config", "batch"},
    {"objectives", "data", "distributed"},
    {"models"},
    {"rollout", "checkpoint"},
    {"training", "evaluation"},
    {"train"},
)
"""The parts of the package, each allowed to import its own layer and those before it."""

HEIGHT = {part: height for height, parts in enumerate(LAYERS) for part in parts}


def imported_modules(source: str, package: tuple[str, ...] = ()) -> Iterator[str]:
    """Dotted names that a source imports; for `from a import b` both `a` and `a.b`, as b may be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*parents, *([node.module] if node.module else [])))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def part_of(module: str) -> str | None:
    """The part of megatron_amd that a dotted name lies in, if any."""
    names = module.split(".")
    if names[0] != "megatron_amd" or len(names) < 2:
        return None
    return names[1]


def sources() -> list[tuple[str, Path]]:
    """(part, file) of every module of the package."""
    files = sorted(PACKAGE.rglob("*.py"))
    return [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in files]


def arrows() -> Iterator[tuple[str, str, Path]]:
    """(importing part, imported part, importing file)."""
    for part, path in sources():
        package = path.relative_to(ROOT).parent.parts
        for module in imported_modules(path.read_text(encoding="utf-8"), package):
            imported = part_of(module)
            if imported in HEIGHT and imported != part:
                yield part, imported, path


def test_every_part_has_its_layer():
    assert {part for part, _ in sources()} <= set(HEIGHT)


def test_no_arrow_points_upward():
    upward = [
        f"{path.relative_to(ROOT)} imports {target}" for part, target, path in arrows() if HEIGHT[target] > HEIGHT[part]
    ]
    assert not upward


def test_modules_do_not_import_each_other_in_a_circle():
    """Within a layer too, and not even where an import inside a function would hide it."""
    modules = {}
    for _, path in sources():
        names = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    graph = {}
    for name, path in modules.items():
        package = path.relative_to(ROOT).parent.parts
        graph[name] = set(imported_modules(path.read_text(encoding="utf-8"), package)) & set(modules) - {name}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_objectives_are_pure_torch():
    allowed = {"megatron_amd.objectives", "megatron_amd.errors", "megatron_amd.batch", "megatron_amd.config"}
    for part, path in sources():
        if part == "objectives":
            for module in imported_modules(path.read_text(encoding="utf-8"), path.relative_to(ROOT).parent.parts):
                ours = any(module == name or module.startswith(f"{name}.") for name in allowed)
                assert ours or module.split(".")[0] not in ("megatron", "megatron_amd", "transformers"), (path, module)


@pytest.mark.parametrize("folder", ["megatron_amd", "tools", "examples", "tests", "benchmarks"])
def test_nothing_imports_megatron_training(folder):
    """Megatron-LM's training package and its 400 flags; megatron.core alone is a library."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        modules = list(imported_modules(path.read_text(encoding="utf-8")))
        assert not [m for m in modules if m == "megatron.training" or m.startswith("megatron.training.")], path


def test_the_package_does_not_need_what_is_not_installed_with_it():
    """Tools, tests and examples stay in the checkout, so nothing in the wheel may import them."""
    for _, path in sources():
        modules = imported_modules(path.read_text(encoding="utf-8"))
        assert not {m.split(".")[0] for m in modules} & {"tools", "tests", "examples", "benchmarks"}, path


def test_process_wide_state_is_changed_in_distributed_alone():
    for part, path in sources():
        if part != "distributed":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                match node:
                    case ast.Assign(targets=[ast.Subscript(value=ast.Attribute(attr="environ"))]):
                        pytest.fail(f"{path}:{node.lineno} writes to os.environ")
                    case ast.Call(func=ast.Attribute(attr="init_process_group" | "initialize_model_parallel")):
                        pytest.fail(f"{path}:{node.lineno} makes process groups")


def test_the_graph_is_not_empty():
    """Guards the guards: the arrows that everyone knows are there are found."""
    found = {(part, target) for part, target, _ in arrows()}
    assert {("config", "errors"), ("models", "distributed"), ("train", "config")} <= found


def test_relative_and_nested_imports_are_seen():
    source = "from . import gpt\nfrom ..data.loader import x\ndef f():\n    import megatron_amd.train\n"
    assert set(imported_modules(source, ("megatron_amd", "models"))) == {
        "megatron_amd.models",
        "megatron_amd.models.gpt",
        "megatron_amd.data.loader",
        "megatron_amd.data.loader.x",
        "megatron_amd.train",
    }
