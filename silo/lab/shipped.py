"""The recipes that come with fedrt: a lab.yaml each, in the directory `recipes`, with a title in its first line."""

import difflib
from importlib.resources import files
from importlib.resources.abc import Traversable

from fedrt.errors import ConfigurationError


def recipe_titles() -> dict[str, str]:
    """The recipes by name, each with what its first line says."""
    found = {
        entry.name.removesuffix(".yaml"): entry.read_text("utf-8").splitlines()[0].removeprefix("# ")
        for entry in _directory().iterdir()
        if entry.name.endswith(".yaml")
    }
    return dict(sorted(found.items()))


def recipe_text(name: str) -> str:
    """The YAML of a recipe. Raises `ConfigurationError` for a name that there is not, with the closest one."""
    names = list(recipe_titles())
    if name not in names:
        close = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}"
        raise ConfigurationError(f"there is no recipe {name!r}; {hint}")
    return (_directory() / f"{name}.yaml").read_text("utf-8")


def _directory() -> Traversable:
    return files("silo.lab") / "recipes"
