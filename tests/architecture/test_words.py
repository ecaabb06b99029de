# SPDX-License-Identifier: Apache-2.0
"""Words and constructs that do not belong, and where the few that may stand are."""

from __future__ import annotations

import ast
import json
import re
import tomllib

from source_tree import CORE, ROOT, Module, core, python_files, shipped, text_files

NAMES = ("eagle", "dflash", "domino", "mooncake", "sglang", "vllm", "redis", "speculators", "medusa")
_NAME = re.compile(rf"(?<![a-z])({'|'.join(NAMES)})(?![a-z])", re.IGNORECASE)
_SERIALISERS = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
_SHAPELESS = {"utils", "util", "common", "helpers", "helper", "misc"}
_MACHINE_PATH = re.compile(r"""(?<![\w.])/(?:work|home|root|Users|mnt|workspace)/[\w.]""")
# Where a failure of any kind is handed on otherwise than by raising: processes, threads and plugins end here.
BROAD_EXCEPT = {
    "core/src/specforge_core/run",
    "core/src/specforge_core/cli",
    "core/src/specforge_core/hooks",
    "core/src/specforge_core/loading/prefetch.py",  # a thread: what it meets is raised where its result is taken
}
# The last tells a vendor's library, which reads nothing else, how long it may wait.
ENVIRONMENT = {
    "core/src/specforge_core/run",
    "core/src/specforge_core/cli",
    "plugins/mooncake-store/src/specforge_mooncake_store/vendor_environment.py",
}


# Which distributions are this project's own, as data: the only ones that a message may advise to install.
OFFICIAL_PARTS = "core/src/specforge_core/hooks/official_parts.json"


def in_any(module: Module, places: set[str]) -> bool:
    return any(module.place == place or module.place.startswith(place + "/") for place in places)


def test_core_names_no_algorithm_and_no_vendor() -> None:
    wrong = []
    for path in sorted(CORE.rglob("*")):
        if path.is_file() and path.suffix != ".pyc" and path != ROOT / OFFICIAL_PARTS:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                if _NAME.search(line) or _NAME.search(path.name):
                    wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not wrong, "\n".join(["", *wrong])


def test_the_official_parts_are_those_of_this_repository() -> None:
    kinds = {"strategies": "strategy", "target_engines": "target-engine"}
    kinds |= {"feature_stores": "feature-store", "ref_channels": "ref-channel"}
    offered: dict[str, dict[str, str]] = {kind: {} for kind in kinds.values()}
    for path in (*ROOT.glob("specforge_*/pyproject.toml"), *ROOT.glob("plugins/*/pyproject.toml")):
        project = tomllib.loads(path.read_text())["project"]
        for group, points in project.get("entry-points", {}).items():
            offered[kinds[group.removeprefix("specforge.")]] |= dict.fromkeys(points, project["name"])
    assert json.loads((ROOT / OFFICIAL_PARTS).read_text()) == offered


def test_nothing_that_is_read_can_run_code() -> None:
    """No format in which a value can be a call: pickle and its like, torch's own files, YAML's full loader."""
    calls = {"torch.load", "torch.save", "numpy.load", "np.load", "yaml.load", "yaml.unsafe_load", "eval", "exec"}
    wrong = [f"{m.place}:{line}" for m in shipped() for name, line in m.imports() if name.split(".")[0] in _SERIALISERS]
    for module in shipped():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in calls:
                wrong.append(f"{module.place}:{node.lineno}: {ast.unparse(node.func)}")
        if "pickle" in (ROOT / module.place).read_text(encoding="utf-8").lower():
            wrong.append(f"{module.place} speaks of it")
    assert not wrong, "\n".join(["", *wrong])


def test_the_environment_is_read_at_the_edge_only() -> None:
    readers = {"os.environ", "os.getenv", "os.putenv"}
    wrong = [
        f"{module.place}:{node.lineno}"
        for module in shipped()
        if not in_any(module, ENVIRONMENT)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in readers
    ]
    assert not wrong, "\n".join(["", *wrong])


def is_broad(handler: ast.ExceptHandler) -> bool:
    """Catches everything and does not raise it on."""
    types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    broad = any(t is None or ast.unparse(t) in ("Exception", "BaseException") for t in types)
    return broad and not (isinstance(handler.body[-1], ast.Raise))


def test_nothing_is_swallowed() -> None:
    wrong = []
    for module in shipped():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ExceptHandler) and is_broad(node) and not in_any(module, BROAD_EXCEPT):
                wrong.append(f"{module.place}:{node.lineno}")
            suppresses = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress")
            if suppresses and {ast.unparse(argument) for argument in node.args} & {"Exception", "BaseException"}:
                wrong.append(f"{module.place}:{node.lineno}")
    assert not wrong, "\n".join(["", *wrong])


def test_no_defaults_in_disguise() -> None:
    """``getattr(config, "name", default)`` hides a missing setting. (A plugin may ask a foreign one.)"""
    wrong = []
    for module in core():
        for node in ast.walk(module.tree):
            defaulted = isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) == 3
            if defaulted and re.search(r"config|cfg|settings|section", ast.unparse(node.args[0])):
                wrong.append(f"{module.place}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong, "\n".join(["", *wrong])


def test_modules_have_names_that_say_something() -> None:
    wrong = [m.place for m in python_files(".") if _SHAPELESS & {m.path.stem, m.path.parent.name}]
    assert not wrong, "\n".join(["", *wrong])


def test_every_file_begins_with_its_licence() -> None:
    first = "# SPDX-License-Identifier: Apache-2.0"
    wrong = [m.place for m in python_files(".") if m.text.splitlines()[:1] != [first]]
    assert not wrong, "\n".join(["", *wrong])


def test_every_module_says_what_it_is_for() -> None:
    wrong = [m.place for m in shipped() if m.path.name != "__init__.py" and not ast.get_docstring(m.tree)]
    assert not wrong, "\n".join(["", *wrong])


def test_no_paths_of_one_machine() -> None:
    wrong = []
    for path in text_files():
        if path == ROOT / "tests" / "architecture" / "test_words.py":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if _MACHINE_PATH.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not wrong, "\n".join(["", *wrong])


def test_nothing_is_mocked() -> None:
    wrong = []
    for module in python_files("core", "plugins", "tests", "benchmarks"):
        wrong += [f"{module.place}:{line}" for name, line in module.imports() if name.split(".")[-1] == "mock"]
        wrong += [f"{module.place}:{line}" for name, line in module.imports() if name == "unittest.mock"]
    assert not wrong, "\n".join(["", *wrong])


def test_core_modules_are_where_they_are_looked_for() -> None:
    assert len(core()) > 50
