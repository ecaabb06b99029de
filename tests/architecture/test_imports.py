# SPDX-License-Identifier: Apache-2.0
"""The import law: who may import whom when the code runs."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from source_tree import Module, core, plugins

STAGES = {
    "prompts",
    "channel",
    "capture",
    "features",
    "loading",
    "training",
    "checkpoint",
    "decoding",
    "export",
    "reporting",
}
# A part of core → the parts it may import, besides itself. "run" and "cli" connect, and may import all.
ALLOWED = {
    "contracts": set(),
    "modeling": {"contracts"},
    "config": {"contracts", "hooks"},
    "hooks": {"contracts"},
    "testing": {"contracts", "modeling", "config", "hooks", "VouchedStore"},  # the last as every plugin may
    **{stage: {"contracts", "modeling"} for stage in STAGES},
    # Its record files and locks are still those of the channel that it is to replace.
    "channel": {"contracts", "modeling", "features"},
}
CONNECT = {"run", "cli"}
OPEN_TO_PLUGINS = {"contracts", "modeling", "testing"}


def part(name: str) -> str:
    """``specforge_core.features.file_store`` → ``features``."""
    return [*name.split("."), ""][1]


def core_imports(module: Module) -> list[tuple[str, int]]:
    return [(name, line) for name, line in module.imports() if name.split(".")[0] == "specforge_core"]


def test_every_part_of_core_has_a_rule() -> None:
    parts = {module.parts[1] for module in core() if len(module.parts) > 1}
    assert parts - CONNECT == set(ALLOWED) & parts
    assert parts >= {"contracts", "hooks", "run", "features", "training"}


def test_core_parts_import_only_what_they_may() -> None:
    wrong = []
    for module in core():
        own = part(".".join(module.parts))
        if own in CONNECT or not own:
            continue
        for name, line in core_imports(module):
            if part(name) not in {own, "", *ALLOWED[own]}:
                wrong.append(f"{module.place}:{line} imports {name}")
    assert not wrong, "\n".join(["", *wrong])


def test_only_cli_imports_cli() -> None:
    wrong = [
        m.place for m in core() if part(".".join(m.parts)) != "cli" for n, _ in core_imports(m) if part(n) == "cli"
    ]
    assert not wrong, "\n".join(["", *wrong])


def test_contracts_import_the_standard_library_only() -> None:
    wrong = []
    for module in core():
        if module.parts[1:2] == ("contracts",):
            for name, line in module.imports():
                if name.split(".")[0] not in sys.stdlib_module_names and part(name) not in ("contracts", ""):
                    wrong.append(f"{module.place}:{line} imports {name}")
    assert not wrong, "\n".join(["", *wrong])


def test_core_imports_no_plugin_and_nothing_it_does_not_require() -> None:
    absent = {"transformers", "accelerate", "tokenizers"}
    own = {module.parts[0] for module in plugins()}
    wrong = [
        f"{m.place}:{line} imports {n}" for m in core() for n, line in m.imports() if n.split(".")[0] in absent | own
    ]
    assert not wrong, "\n".join(["", *wrong])


def test_only_the_test_kit_imports_pytest() -> None:
    for module in core():
        if module.parts[1:2] != ("testing",):
            assert "pytest" not in {name.split(".")[0] for name, _ in module.imports()}, module.place


def test_plugins_import_only_what_is_open_to_them() -> None:
    from specforge_core import __all__ as public

    wrong = []
    for module in plugins():
        for name, line in core_imports(module):
            if part(name) not in {"", *OPEN_TO_PLUGINS, *public}:
                wrong.append(f"{module.place}:{line} imports {name}")
    assert not wrong, "\n".join(["", *wrong])


def installed_plugin_modules() -> list[str]:
    groups = ("strategies", "target_engines", "feature_stores", "ref_channels", "observers")
    found = {point.value.split(":")[0] for group in groups for point in entry_points(group=f"specforge.{group}")}
    return sorted(name for name in found if name.split(".")[0].startswith("specforge"))


LIGHT = ["specforge_core", "specforge_core.contracts", "specforge_core.config.run_config", *installed_plugin_modules()]


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_without_torch(name: str) -> None:
    code = f"import sys, {name}; print(*sorted({{'torch', 'transformers', 'safetensors', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_every_plugin_of_this_repository_was_checked() -> None:
    assert {module.parts[0] for module in plugins()} <= {name.split(".")[0] for name in installed_plugin_modules()}
