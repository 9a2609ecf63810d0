"""Recipes by name: every public function annotated `-> Run` in a file of this folder is one.

Listing them reads the files as text, so that `pithwood recipes` and error messages need no torch; only the recipe that
is asked for gets imported. A recipe outside the package is named by `path/to/file.py:function`.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pithwood.run import Run

_FOLDER = Path(__file__).parent


def list_recipes() -> list[tuple[str, str]]:
    """Name and first docstring line of each recipe of the package, in the order of files and of lines in them."""
    return [(node.name, _summary(node)) for _, node in _own_recipes()]


def load_recipe(name: str) -> Run:
    """The run that a recipe describes.

    name    a recipe of this package, or `path/to/file.py:function`. Such a file is imported as a module under its own
            name, with its folder at the end of the import path, so that it may import neighbours.
    raises  ValueError, with the nearest name or what the file has, if there is no such recipe or it returns no Run
    """
    recipe = _function_of_file(name) if ":" in name or name.endswith(".py") else _function_of_package(name)
    from pithwood.run import Run  # imports torch: only once a recipe is really wanted

    try:
        run = recipe()
    except Exception as error:
        raise ValueError(f"recipe {name!r} failed: {_of_user(error)}") from error
    if not isinstance(run, Run):
        raise ValueError(f"recipe {name!r} returned a {type(run).__name__}; it must return a pithwood.run.Run")
    return run


def _recipe_functions(path: Path) -> list[ast.FunctionDef]:
    """The functions of a file that are recipes, by its text alone."""
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8"), str(path)).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.returns is not None:
            returns = node.returns.value if isinstance(node.returns, ast.Constant) else ast.unparse(node.returns)
            if str(returns).rpartition(".")[2] == "Run":
                found.append(node)
    return found


def _own_recipes() -> list[tuple[Path, ast.FunctionDef]]:
    paths = sorted(path for path in _FOLDER.glob("*.py") if not path.name.startswith("_"))
    return [(path, node) for path in paths for node in _recipe_functions(path)]


def _summary(node: ast.FunctionDef) -> str:
    return (ast.get_docstring(node) or "").partition("\n")[0]


def _function_of_package(name: str):
    found = {node.name: path for path, node in _own_recipes()}
    if name not in found:
        close = difflib.get_close_matches(name, found, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(
            f"unknown recipe {name!r}; {hint}recipes are {', '.join(found)}; "
            "one of your own is path/to/file.py:function"
        )
    return getattr(importlib.import_module(f"pithwood.recipes.{found[name].stem}"), name)


def _function_of_file(name: str):
    file, _, function = name.rpartition(":") if ":" in name else (name, "", "")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"recipe file {file!r} does not exist; give path/to/file.py:function")
    try:
        recipes = [node.name for node in _recipe_functions(path)]
    except (SyntaxError, ValueError) as error:  # ValueError: no UTF-8, or a NUL
        raise ValueError(f"recipe file {file!r} is not valid Python: {error}") from error
    if not function:
        raise ValueError(f"{name!r} names no function; write {file}:{recipes[0] if recipes else 'function'}")
    recipe = getattr(import_file(path), function, None)
    if not callable(recipe):
        have = (
            f"functions annotated -> Run: {', '.join(recipes)}" if recipes else "no function there is annotated -> Run"
        )
        raise ValueError(f"{file} has no function {function!r}; {have}")
    return recipe


def import_file(path: Path) -> ModuleType:
    """A module made of one file and known under its name, by which saved configurations call its classes.

    raises ValueError if the file is not there, or its name cannot be a module's or is another module's
    """
    given, path = path, path.resolve()
    if not path.is_file():
        raise ValueError(f"{given} does not exist; give a Python file")
    name = path.stem
    if not name.isidentifier():
        raise ValueError(f"{path.name} cannot be imported; its name must be a Python identifier")
    if name in sys.modules:
        module = sys.modules[name]
        if getattr(module, "__file__", None) != str(path):
            raise ValueError(f"{given} has the name of another module that is loaded; rename the file")
        return module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or Path(spec.origin).resolve() != path:
        raise ValueError(f"{given} has the name of another module ({spec.origin if spec else None}); rename the file")
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ValueError(f"{given} cannot be imported: {_of_user(error)}") from error


def _of_user(error: Exception) -> str:
    """An error in somebody's own file: what and where; PITHWOOD_TRACEBACK=1 shows the rest."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith("<") and frame.filename != __file__]
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{where}"
