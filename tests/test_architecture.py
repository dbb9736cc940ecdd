"""The rules of the house, read off the source: floors, no global configuration, no surprises on import."""

import ast
import graphlib
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "upsnet"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = (
    ("structures",),
    ("operators",),
    ("config",),
    ("checkpoints",),
    ("models", "evaluation", "dataset", "visualize"),
    ("engine",),
    ("builders",),
    ("predict", "report"),
    ("commands",),
    ("cli",),
    ("upsnet_end2end_train", "upsnet_end2end_test", "__main__"),
)
"""From the street up, as in docs/architecture.md, with the order inside a floor."""

FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FACE = "__init__"
"""`upsnet/__init__.py` names what is above it, but imports it only when asked."""

KNOW_NO_RECIPE = ("structures", "operators", "models", "dataset", "evaluation", "engine", "visualize", "report")
ACT_ON_IMPORT = {
    "config/yaml_text.py",  # completes its own two classes
    "upsnet_end2end_train.py",
    "upsnet_end2end_test.py",
    "__main__.py",
}
FORBIDDEN_CALLS = ("eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "yaml.unsafe_load")
LONGEST_FILE, LONGEST_FUNCTION = 400, 70

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


@cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path):
    parts = ["upsnet", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imported(tree):
    """The modules of the package that a tree imports anywhere; `from a import b` counts as a.b where that exists."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "upsnet")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module and node.module.split(".")[0] == "upsnet":
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from (name if name in MODULES else node.module for name in inner)


def rooms_imported(path):
    return {name.split(".")[1] for name in imported(tree_of(path)) if "." in name} - {room_of(path)}


def test_every_room_has_a_floor():
    assert {room_of(path) for path in FILES} - {FACE} <= FLOOR_OF.keys()


@each_file
def test_imports_go_down(path):
    room = room_of(path)
    if room == FACE:
        return
    level = {r for r in rooms_imported(path) if FLOOR_OF[r] >= FLOOR_OF[room]}
    assert not level, f"{room} lies below or beside {sorted(level)}"


@pytest.mark.parametrize("room", KNOW_NO_RECIPE)
def test_recipes_stay_upstairs(room):
    assert not [path for path in FILES if room_of(path) == room and "config" in rooms_imported(path)]


def test_no_import_cycles():
    graph = {}
    for name, path in MODULES.items():
        lazy = {id(inner) for node in ast.walk(tree_of(path)) if _is_deferred(node) for inner in ast.walk(node)}
        at_once = [node for node in ast.walk(tree_of(path)) if id(node) not in lazy]
        graph[name] = {
            target
            for node in at_once
            if isinstance(node, ast.Import | ast.ImportFrom)
            for target in imported(node)
            if target != name
        }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def _is_deferred(node):
    checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return checking or isinstance(node, ast.FunctionDef)


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@each_file
def test_nothing_is_evaluated_or_loaded_unsafely(path):
    for name, call in calls(tree_of(path)):
        where = f"{path.name}:{call.lineno}"
        assert name not in FORBIDDEN_CALLS, where
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name in ("yaml.load", "yaml.load_all"):
            loader = arguments.get("Loader") or ast.unparse(call.args[1])
            assert _is_safe_loader(tree_of(path), loader), where
        if name == "torch.load":
            assert arguments.get("weights_only") == "True", where
        if name in ("np.load", "numpy.load"):
            assert arguments.get("allow_pickle", "False") == "False", where


def _is_safe_loader(tree, name):
    bases = [ast.unparse(b) for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == name for b in n.bases]
    return any(loader.split(".")[-1] in ("SafeLoader", "CSafeLoader") for loader in [name, *bases])


@each_file
def test_no_error_is_swallowed_unseen(path):
    """`except Exception` and the like hide bugs; a clean-up may catch everything if it raises it again."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            again = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            assert again or caught not in ("everything", "Exception", "BaseException"), f"{path.name}:{node.lineno}"


@each_file
def test_importing_only_defines(path):
    if str(path.relative_to(PACKAGE)) in ACT_ON_IMPORT:
        return
    definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for node in tree_of(path).body:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_rule = isinstance(node, ast.Expr) and ast.unparse(node).startswith("library.register(")
        is_guard = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")
        assert is_text or is_rule or is_guard or isinstance(node, definitions), f"{path.name}:{node.lineno}"


@each_file
def test_no_global_state(path):
    assert not [node.lineno for node in ast.walk(tree_of(path)) if isinstance(node, ast.Global)]


@each_file
def test_files_are_short(path):
    length = len(path.read_text(encoding="utf-8").splitlines())
    assert length <= LONGEST_FILE, f"{path.name} has {length} lines: give one of its ideas a file of its own"


@each_file
def test_functions_are_short(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{path.name}: {node.name} has {length} lines: give a part of it a name"


def public_functions(tree):
    """Functions and methods that others may call, with whether they are methods of a public class."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node, False
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            yield from ((n, True) for n in methods if not n.name.startswith("_"))


@each_file
def test_public_functions_are_annotated(path):
    for function, is_method in public_functions(tree_of(path)):
        decorators = {ast.unparse(d) for d in function.decorator_list}
        given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        named = given[1:] if is_method and "staticmethod" not in decorators else given
        named += [a for a in (function.args.vararg, function.args.kwarg) if a]
        bare = [a.arg for a in named if a.annotation is None]
        assert not bare and function.returns is not None, f"{path.name}:{function.lineno}: {function.name} {bare}"


@each_file
def test_public_functions_say_what_they_do(path):
    """A docstring for every public function; methods whose class says it all may go without."""
    assert ast.get_docstring(tree_of(path)) or not path.read_text().strip(), f"{path.name} does not say what it is for"
    for node in tree_of(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}:{node.lineno}: {node.name} has no docstring"
