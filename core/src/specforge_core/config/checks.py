# SPDX-License-Identifier: Apache-2.0
"""What must hold between a run file's parts. Each check returns what is wrong and what to change; none stops at one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from glob import has_magic, iglob
from pathlib import Path

from specforge_core.config.document import Keys
from specforge_core.config.load import LoadedConfig
from specforge_core.config.topologies import TOPOLOGIES
from specforge_core.contracts import DTYPE_BYTES, CaptureRequest, TargetInfo
from specforge_core.hooks.descriptors import FeatureStoreSpec, RefChannelSpec, TargetEngineSpec
from specforge_core.hooks.sections import StrategyConfig

_DEVICE = re.compile(r"cpu|cuda(:\d+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """What could be resolved of a run; a part that could not is None, and what depends on it is not checked."""

    loaded: LoadedConfig
    engine: TargetEngineSpec | None
    store: FeatureStoreSpec | None
    channel: RefChannelSpec | None
    strategy_section: StrategyConfig | None
    info: TargetInfo | None
    request: CaptureRequest | None

    def at(self, *keys: str) -> str:
        """Where keys stand in the run file."""
        located: Keys = keys
        return self.loaded.locate(located)


def find_mismatches(parts: Composition) -> list[str]:
    """Everything that does not fit together, in the order of the run file's sections."""
    checks = (
        _check_paths,
        _check_target,
        _check_capture,
        _check_wires,
        _check_watermarks,
        _check_training,
    )
    return [mismatch for check in checks for mismatch in check(parts)]


def _check_paths(parts: Composition) -> Iterator[str]:
    config = parts.loaded.config
    for key, paths in (("train", config.data.train), ("eval", config.data.eval)):
        for path in paths:
            if isinstance(path, Path) and not path.exists() and not any(iglob(str(path), recursive=True)):
                yield f"{parts.at('data', key)}: {_missing(path)} {Path.cwd()}"
    if config.run.directory.exists() and not config.run.directory.is_dir():
        yield f"{parts.at('run', 'directory')}: {config.run.directory} is a file; name a directory"
    token = config.run.token_file
    if token is not None and (token.is_dir() or not token.exists()):
        make = f"(umask 077; openssl rand -hex 32 > {token})"
        yield f"{parts.at('run', 'token_file')}: {token} is no file; make one: {make}"
    features = config.data.features
    if features is not None and config.topology != "offline":
        yield f"{parts.at('data', 'features')}: only `topology: offline` keeps features; leave it out or change that"
    if features is not None and features.exists() and not features.is_dir():
        yield f"{parts.at('data', 'features')}: {features} is a file; name a directory"


def _missing(path: Path) -> str:
    if not has_magic(str(path)):
        return f"{path} does not exist; paths are relative to"
    return f"no file matches {path}; patterns are relative to"


def _check_target(parts: Composition) -> Iterator[str]:
    config, info = parts.loaded.config, parts.info
    if info is None:
        return
    if config.data.max_length > info.max_position_embeddings:
        yield (
            f"{parts.at('data', 'max_length')}: {config.data.max_length} is more than the target's "
            f"{info.max_position_embeddings} positions; set data.max_length to at most that"
        )
    if parts.strategy_section is not None:
        for problem in parts.strategy_section.check(info):
            yield f"{parts.at('strategy')}: {problem}"


def _check_capture(parts: Composition) -> Iterator[str]:
    request, info = parts.request, parts.info
    if request is None or info is None:
        return
    where = parts.at("strategy")
    layers = request.aux_layer_ids
    outside = [layer for layer in layers if not 0 <= layer < info.num_layers]
    if outside:
        yield f"{where}: aux_layer_ids {outside} are outside the target's layers 0 to {info.num_layers - 1}"
    if len(set(layers)) < len(layers):
        yield f"{where}: aux_layer_ids {list(layers)} name a layer twice; name each once"
    if request.dtype not in DTYPE_BYTES:
        yield f"{where}: captured dtype {request.dtype!r} is not one of {', '.join(DTYPE_BYTES)}"
    if parts.engine is None:
        return
    name, offered = parts.engine.name, parts.engine.capabilities
    if layers and not offered.aux_layers:
        yield f"{where}: needs layers {list(layers)}, but target engine {name!r} captures none; choose another engine"
    if request.last_hidden_norm is not None and request.last_hidden_norm not in offered.norms:
        yield (
            f"{where}: needs last hidden states with norm {request.last_hidden_norm!r}, but target engine {name!r} "
            f"captures {' or '.join(offered.norms) or 'none'}; change the strategy's norm or the engine"
        )
    if request.dtype in DTYPE_BYTES and request.dtype not in offered.dtypes:
        yield (
            f"{where}: needs features in {request.dtype}, but target engine {name!r} gives "
            f"{', '.join(offered.dtypes)}; change the captured dtype or the engine"
        )


def _check_wires(parts: Composition) -> Iterator[str]:
    topology = parts.loaded.config.topology
    needs = TOPOLOGIES[topology]
    wires = (
        ("store", parts.store, needs.store, needs.default_store),
        ("channel", parts.channel, needs.channel, needs.default_channel),
    )
    for key, spec, needed, default in wires:
        lacking = [item for item in needed if spec is not None and not getattr(spec.capabilities, item)]
        if lacking and spec is not None:
            listed = " and ".join(item.replace("_", "-") for item in lacking)
            yield (
                f"{parts.at(key, 'name')}: {key} {spec.name!r} is not {listed}, which `topology: {topology}` needs; "
                f"use {key}: {{name: {default}}} or another topology"
            )


def _check_watermarks(parts: Composition) -> Iterator[str]:
    config = parts.loaded.config
    capture, window = config.capture, config.training.global_batch_size
    if config.topology == "offline":
        return
    low = capture.low_watermark_windows * window
    if capture.high_watermark_windows * window < low + capture.batch_size:
        yield (
            f"{parts.at('capture', 'high_watermark_windows')}: {capture.high_watermark_windows} windows of {window} "
            f"hold less than the low watermark's {low} samples and a capture batch of {capture.batch_size}; "
            "raise it, or lower capture.batch_size"
        )
    if config.loading.retain == "checkpoint" and parts.store is not None and not parts.store.capabilities.cross_process:
        yield (
            f"{parts.at('loading', 'retain')}: store {parts.store.name!r} ends with its process, so nothing it keeps "
            "until a checkpoint outlives a crash; leave it out"
        )
    limit = capture.high_watermark_bytes
    if limit is None or parts.request is None or parts.info is None or parts.request.dtype not in DTYPE_BYTES:
        return
    sample = sum(spec.nbytes for spec in parts.request.specs(config.data.max_length, parts.info.hidden_size))
    least = sample * (2 * window + capture.batch_size)
    if limit < least:
        yield (
            f"{parts.at('capture', 'high_watermark_bytes')}: {limit} bytes hold less than two windows and a capture "
            f"batch of {config.data.max_length}-token samples ({least} bytes); raise it to that, or lower "
            "data.max_length, training.global_batch_size or capture.batch_size"
        )


def _check_training(parts: Composition) -> Iterator[str]:
    config = parts.loaded.config
    training, evaluation = config.training, config.evaluation
    if training.micro_batch_size > training.global_batch_size:
        yield (
            f"{parts.at('training', 'micro_batch_size')}: {training.micro_batch_size} is more than the "
            f"{training.global_batch_size} samples of a window; lower it or raise training.global_batch_size"
        )
    if not _DEVICE.fullmatch(training.device):
        yield f"{parts.at('training', 'device')}: {training.device!r} is not cpu, cuda or cuda:N"
    if evaluation.every_steps is not None and not config.data.eval:
        yield (
            f"{parts.at('evaluation', 'every_steps')}: nothing to evaluate on; name held-out prompts in data.eval, "
            "or leave it out"
        )
