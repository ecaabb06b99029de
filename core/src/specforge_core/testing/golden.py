# SPDX-License-Identifier: Apache-2.0
"""Golden vectors: run a strategy on stored inputs and compare with stored losses, metrics and gradients.

``python -m specforge_core.testing.golden FILE…`` prints the largest relative error of every loss and metric and of
every parameter's gradient, and exits 1 above 1e-5 (losses, metrics) or 1e-4 (gradients), 2 where a file cannot be run.

A vector is a safetensors file with tensors ``weights.<checkpoint name>``, ``frozen.<name>``, ``inputs.<feature>``,
``expected.<metric>`` and ``grads.<checkpoint name>`` (of ``expected.loss``), and a metadata entry ``golden``: JSON with
``strategy``, ``draft_config`` and ``options``. The strategy's descriptor names the function that runs one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specforge_core.contracts import DataError, PluginError, SpecForgeError
from specforge_core.hooks.descriptors import StrategySpec, resolve

METRIC_LIMIT = 1e-5
GRADIENT_LIMIT = 1e-4


@dataclass(frozen=True, slots=True)
class GoldenVector:
    """One file, taken apart by the first word of its tensors' names."""

    path: Path
    strategy: str
    draft_config: Mapping[str, Any]
    options: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    frozen: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    expected: Mapping[str, Tensor]
    grads: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class GoldenResult:
    """What a strategy made of a vector: values by metric name, gradients by checkpoint name."""

    values: Mapping[str, Tensor]
    grads: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One compared tensor."""

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # false for NaN as well


GoldenRunner = Callable[[GoldenVector], GoldenResult]


def _header(path: Path, text: str | None) -> dict[str, Any]:
    try:
        header = json.loads(text or "")
    except json.JSONDecodeError as error:
        raise DataError("no readable 'golden' entry in the file's metadata", where=str(path)) from error
    if not isinstance(header, dict):
        raise DataError("the 'golden' metadata entry is not an object", where=str(path))
    for key, kind in (("strategy", str), ("draft_config", dict), ("options", dict)):
        if not isinstance(header.get(key), kind):
            raise DataError(f"the 'golden' metadata entry lacks {key!r}", where=str(path))
    return header


def load_vector(path: Path) -> GoldenVector:
    """:raises DataError: not a file of this format."""
    if not path.is_file():
        raise DataError("no such file", where=str(path))
    try:
        with safe_open(path, "pt") as stored:
            header = _header(path, (stored.metadata() or {}).get("golden"))
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DataError(f"not a readable safetensors file: {error}", where=str(path)) from error
    groups: dict[str, dict[str, Tensor]] = {g: {} for g in ("weights", "frozen", "inputs", "expected", "grads")}
    for key, tensor in tensors.items():
        group, _, name = key.partition(".")
        if group not in groups or not name:
            raise DataError(f"unexpected tensor {key!r}", where=str(path))
        groups[group][name] = tensor
    for group in ("weights", "inputs", "expected"):
        if not groups[group]:
            raise DataError(f"no tensor named '{group}.…'", where=str(path))
    return GoldenVector(path, header["strategy"], header["draft_config"], header["options"], **groups)


def require(tensors: Mapping[str, Tensor], name: str, *, group: str, path: Path) -> Tensor:
    """A tensor of a vector; for the functions that run one.

    :raises DataError: the file lacks it.
    """
    if name not in tensors:
        raise DataError(f"the tensor '{group}.{name}' is missing", where=str(path))
    return tensors[name]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected magnitude; absolute where nothing is expected but zero."""
    if actual.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    return difference / scale if scale > 0 else difference


def compare(vector: GoldenVector, result: GoldenResult) -> list[Comparison]:
    """Every expected tensor against what was computed.

    :raises DataError: the strategy computes no such metric, or has no such parameter.
    """
    rows = []
    groups = (
        ("expected", vector.expected, result.values, METRIC_LIMIT),
        ("grads", vector.grads, result.grads, GRADIENT_LIMIT),
    )
    for group, expected, actual, limit in groups:
        for name, value in sorted(expected.items()):
            if name not in actual:
                raise DataError(f"{vector.strategy} gives nothing for '{group}.{name}'", where=str(vector.path))
            rows.append(Comparison(f"{group}.{name}", relative_error(actual[name], value), limit))
    return rows


def find_runner(strategy: str) -> GoldenRunner:
    """The function that a discovered strategy names.

    :raises PluginError: no such strategy, or one without golden vectors.
    """
    from specforge_core.hooks.manager import PluginRegistry

    spec = PluginRegistry.discover().strategy(strategy)
    assert isinstance(spec, StrategySpec)
    if not spec.golden:
        raise PluginError(f"the strategy {strategy!r} runs no golden vectors", hint="its descriptor sets no 'golden'")
    runner: GoldenRunner = resolve(spec.golden)
    return runner


def run_vector(path: Path) -> list[Comparison]:
    """Load, run and compare one file.

    :raises SpecForgeError: the file cannot be run.
    """
    vector = load_vector(path)
    return compare(vector, find_runner(vector.strategy)(vector))


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 all within limits, 1 some above, 2 a file that could not be run."""
    if not arguments:
        print("usage: python -m specforge_core.testing.golden FILE…", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    failed = broken = False
    for argument in arguments:
        try:
            rows = run_vector(Path(argument))
        except SpecForgeError as error:
            print(f"error: {error}", file=sys.stderr)
            broken = True
            continue
        passed = all(row.passed for row in rows)
        failed |= not passed
        print(f"{argument}: {'ok' if passed else 'FAILED'}")
        for row in rows:
            print(f"  {row.name:<56} {row.error:9.2e}  limit {row.limit:.0e}{'' if row.passed else '  FAILED'}")
    return 2 if broken else int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
