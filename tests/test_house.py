"""The order of the house: no circle of files or rooms, no arrow up, no framework in the rules."""

import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("shared_specs", "psa_torch", "psa_jax")


def files_of(package, root=ROOT):
    """Module name -> file."""
    found = {}
    for path in (root / package).rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(package, root=ROOT):
    """Module -> the modules of the package that it imports, wherever in the file it does so."""
    files = files_of(package, root)
    graph = {}
    for module, path in files.items():
        graph[module] = set()
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path} imports by a relative name"
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                named = [name if name in files else node.module for name in inner]
            else:
                continue
            graph[module] |= {name for name in named if name in files} - {module}
    return graph


def room(module):
    """The file or folder of a package that a module is in; None for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def rooms_of(graph):
    """Room -> the other rooms that it imports from."""
    rooms = {room(module): set() for module in graph}
    for module, others in graph.items():
        rooms[room(module)] |= {room(other) for other in others} - {room(module)}
    return rooms


def circle(graph):
    """Some circle of the graph, or None."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def floors_of(package):
    """Room -> floor, from the table of docs/design.md, whose last row is the ground."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = text.partition("## The order of the rooms")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("|")]
    column = next(i for i, cell in enumerate(rows[0]) if f"`{package}`" in cell)
    floors = {}
    for floor, cells in enumerate(reversed(rows[2:])):
        for name in re.findall(r"`(\w+)`", cells[column]):
            assert name not in floors, f"{name} is on two floors"
            floors[name] = floor
    return floors


def arrows_up(graph, floors):
    """Imports of a room on a higher floor."""
    return [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if room(module) and room(other) and floors[room(other)] > floors[room(module)]
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_files_and_no_rooms_need_each_other(package):
    graph = imports_of(package)
    assert circle(graph) is None
    assert circle(rooms_of(graph)) is None


@pytest.mark.parametrize("package", PACKAGES)
def test_no_arrow_goes_up(package):
    floors, graph = floors_of(package), imports_of(package)
    rooms = set(rooms_of(graph)) - {None}
    assert rooms == set(floors), "docs/design.md, The order of the rooms: one floor for each room"
    assert not arrows_up(graph, floors)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a": "from house import b", "b": "def f():\n    from house.a import x"}, True),
        ({"a": "import house.b", "b": "from house.c import x", "c": "import house.a"}, True),
        ({"a": "from house.b import x", "b": "from house import c", "c": "import ast"}, False),
    ],
)
def test_a_circle_is_found(files, said, tmp_path):
    (tmp_path / "house").mkdir()
    for name, text in files.items():
        (tmp_path / "house" / f"{name}.py").write_text(text)
    assert (circle(imports_of("house", tmp_path)) is not None) == said


def test_an_arrow_up_is_found(tmp_path):
    files = {"low.py": "", "high/__init__.py": "", "high/a.py": "def f():\n    import house.low"}
    (tmp_path / "house" / "high").mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / "house" / name).write_text(text)
    floors = {"low": 0, "high": 1}
    assert not arrows_up(imports_of("house", tmp_path), floors)
    (tmp_path / "house" / "other.py").write_text("from house.high.a import f")
    assert arrows_up(imports_of("house", tmp_path), floors | {"other": 0}) == [
        "house.other imports house.high.a"
    ]
    assert not arrows_up(imports_of("house", tmp_path), floors | {"other": 1})


def names_in(tree):
    """Every name and every text of the code, without docstrings."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        for field in ("id", "attr", "name", "module", "arg"):
            if isinstance(getattr(node, field, None), str):
                yield getattr(node, field)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in prose:
                yield node.value


def test_the_rules_name_no_framework():
    for module, path in files_of("shared_specs").items():
        if room(module) == "tools":
            continue
        found = set(names_in(tree_of(path)))
        assert not [name for name in found if re.search("torch|jax", name)], path


def test_nothing_below_knows_the_tools():
    for package in PACKAGES:
        for module, path in files_of(package).items():
            if (package, room(module)) != ("shared_specs", "tools"):
                found = names_in(tree_of(path))
                assert not [name for name in found if name.startswith("shared_specs.tools")], path
