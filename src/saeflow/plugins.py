"""Functions of the user's own, named in the parameters as `package.module:function`."""

import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from saeflow.errors import UserError


def module_file(name: str, where: str) -> Path:
    """The file that a function's module is in, found without running it.

    Args:
        name: `package.module:function`; the module is looked for in the working directory, then where Python does.
        where: the parameter that names it.

    Raises:
        UserError: there is no such module.
    """
    parts = name.partition(":")[0].split(".")
    below = Path(*parts)
    for place in (Path.cwd(), *map(Path, sys.path), *_installed(parts[0])):
        for path in (place / below / "__init__.py", place / below.with_suffix(".py")):
            if path.is_file():
                return path
    raise UserError(
        f"{where}: no such module: {'.'.join(parts)}. Put it into the working directory ({below.with_suffix('.py')}), "
        "install it, or fix the name."
    )


def _installed(package: str) -> list[Path]:
    """Return the folders of a package that Python finds by other means than its path."""
    try:
        spec = find_spec(package)
    except ValueError:  # `__main__` may have none
        spec = None
    return [Path(place).parent for place in (spec and spec.submodule_search_locations) or ()]


def load_function(name: str, where: str) -> Callable[..., Any]:
    """Import a function.

    Args:
        name: `package.module:function`.
        where: the parameter that names it.

    Raises:
        UserError: its module cannot be found or imported, or has no such function.
    """
    file = module_file(name, where)
    module_name, _, function = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's own code raises
        raise UserError(
            f"{where}: {file}: the module cannot be imported ({type(error).__name__}: {' '.join(str(error).split())}). "
            "Fix it."
        ) from error
    if Path(module.__file__ or "").resolve() != file.resolve():
        raise UserError(
            f"{where}: {file}: another module has the name {module_name} ({module.__file__}). Rename yours."
        )
    found: Any = getattr(module, function, None)
    if not callable(found):
        what = "nothing" if found is None else f"a {type(found).__name__}"
        raise UserError(
            f"{where}: {file}: expected a function {function}, found {what} of that name. Fix the name."
        )
    result: Callable[..., Any] = found
    return result
