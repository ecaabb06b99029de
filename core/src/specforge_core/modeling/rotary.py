# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding (RoPE, arXiv 2104.09864), rotate-half layout, with the scalings targets use.

A draft inherits its target's RoPE, so the parameters are those of a model's own configuration (``rope_parameters``).
Tables are fp32 and plain attributes, not buffers: casting a draft to bf16 must not touch angles.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from specforge_core.contracts import ConfigError

RopeValue = float | int | str | Sequence[float]

_LEAST, _MOST = 1e-6, 1e12
"""Between these lies every setting of every model by a wide margin; beyond them fp32 angles are no numbers any more."""


def _number(
    parameters: Mapping[str, RopeValue], key: str, default: float | None = None, *, least: float = _LEAST
) -> float:
    value = parameters.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _refused(f"RoPE parameter {key!r} is missing or not a number")
    if not least <= value <= _MOST:
        raise _refused(f"RoPE parameter {key!r} is not between {least:g} and {_MOST:g}")
    return float(value)


def _refused(reason: str) -> ConfigError:
    return ConfigError(reason, where="rope_parameters", hint="see the target's config.json")


def _llama3(frequency: Tensor, parameters: Mapping[str, RopeValue]) -> Tensor:
    factor = _number(parameters, "factor")
    low, high = _number(parameters, "low_freq_factor"), _number(parameters, "high_freq_factor")
    original = _number(parameters, "original_max_position_embeddings")
    if low >= high:
        raise _refused("RoPE parameter 'low_freq_factor' is not below 'high_freq_factor'")
    wavelength = 2 * math.pi / frequency
    smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * frequency / factor + smooth * frequency


def _yarn(frequency: Tensor, parameters: Mapping[str, RopeValue]) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071 §3.2 to §3.4): interpolate slow dimensions, keep fast ones, scale attention."""
    factor, theta = _number(parameters, "factor"), _number(parameters, "rope_theta")
    original = _number(parameters, "original_max_position_embeddings")
    half = frequency.shape[0]

    def dimension(rotations: float) -> float:
        return half * math.log(original / (rotations * 2 * math.pi)) / math.log(theta)

    low = max(math.floor(dimension(_number(parameters, "beta_fast", 32.0))), 0)
    high = min(math.ceil(dimension(_number(parameters, "beta_slow", 1.0))), 2 * half - 1)
    ramp = ((torch.arange(half, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    scale = _number(parameters, "attention_factor", 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return frequency / factor * ramp + frequency * (1 - ramp), scale


class RotaryEmbedding:
    """Angles for positions, computed once and kept per device.

    :param parameters: ``rope_theta``, ``rope_type`` (default, linear, llama3 or yarn) and what the type needs.
    :param head_dim: even; all of it is rotated.
    :raises ConfigError: a type or setting that is not implemented.
    """

    def __init__(self, parameters: Mapping[str, RopeValue], *, head_dim: int) -> None:
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if _number(parameters, "partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError("RoPE over a part of the head is not implemented", where="rope_parameters")
        theta = _number(parameters, "rope_theta", 10000.0, least=2.0)  # its logarithm is divided by
        frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        self._scale = 1.0
        if kind == "linear":
            frequency = frequency / _number(parameters, "factor")
        elif kind == "llama3":
            frequency = _llama3(frequency, parameters)
        elif kind == "yarn":
            frequency, self._scale = _yarn(frequency, {"rope_theta": theta, **parameters})
        elif kind != "default":
            raise ConfigError(
                f"RoPE type {reprlib.repr(kind)} is not implemented",
                where="rope_parameters",
                hint="known: default, linear, llama3, yarn",
            )
        self.frequency = frequency
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def at(self, positions: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each fp32 [R, head_dim], of ``positions`` (int64 [R], all below ``longest``)."""
        table = self._tables.get(positions.device)
        if table is None or table[0].shape[0] < longest:
            angles = torch.outer(torch.arange(max(256, 1 << longest.bit_length()), dtype=torch.float32), self.frequency)
            angles = torch.cat([angles, angles], dim=-1)
            table = (angles.cos() * self._scale).to(positions.device), (angles.sin() * self._scale).to(positions.device)
            self._tables[positions.device] = table
        return table[0][positions], table[1][positions]


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate heads by their position's angle.

    :param x: [R, heads, head_dim].
    :param cosine: fp32 [R, head_dim]; ``sine`` the same.
    :returns: x's shape and dtype.
    """
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return (x * cosine.unsqueeze(-2) + turned * sine.unsqueeze(-2)).to(x.dtype)
