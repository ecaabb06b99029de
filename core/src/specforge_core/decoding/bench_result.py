# SPDX-License-Identifier: Apache-2.0
"""What a bench measured, as numbers and as JSON. Stage 7; read again by the report.

``acceptance_length`` (τ) is tokens emitted by decode passes over decode passes: the prefill and the token it emits
belong to neither side. Speeds are given with and without the prefill.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from specforge_core.contracts import BenchError, Ratio
from specforge_core.decoding.speculative import DecodeResult

Side = Literal["plain", "speculative"]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first emitted position (0 is the prefill's token) at which the outputs differ."""

    position: int
    plain_token: int
    speculative_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOutcome:
    """One prompt, decoded both ways."""

    prompt_id: str
    prompt_tokens: int
    plain: DecodeResult
    speculative: DecodeResult
    difference: Difference | None

    def to_json(self) -> dict[str, Any]:
        found = self.difference
        return {
            "prompt_id": self.prompt_id,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.plain.token_ids),
            "target_passes": self.speculative.target_passes,
            "acceptance_length": _quotient(self.speculative.decode_tokens, self.speculative.target_passes),
            "plain_seconds": round(self.plain.prefill_seconds + self.plain.decode_seconds, 6),
            "speculative_seconds": round(self.speculative.prefill_seconds + self.speculative.decode_seconds, 6),
            "difference": None
            if found is None
            else {
                "position": found.position,
                "plain_token": found.plain_token,
                "speculative_token": found.speculative_token,
            },
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """Everything a bench measured."""

    outcomes: tuple[PromptOutcome, ...]
    draft_tokens: int
    max_new_tokens: int
    facts: Mapping[str, str | int]

    @property
    def lossless(self) -> bool:
        """Every prompt gave the same tokens both ways."""
        return all(outcome.difference is None for outcome in self.outcomes)

    @property
    def target_passes(self) -> int:
        """Decode passes of the target on the speculative side."""
        return sum(outcome.speculative.target_passes for outcome in self.outcomes)

    @property
    def acceptance_length(self) -> float | None:
        """τ; None where nothing was decoded after the prefill."""
        return _quotient(sum(outcome.speculative.decode_tokens for outcome in self.outcomes), self.target_passes)

    @property
    def position_acceptance(self) -> list[Ratio]:
        """Accepted over proposed at each draft position."""
        totals = [Ratio(0.0, 0.0)] * self.draft_tokens
        for outcome in self.outcomes:
            counts = zip(outcome.speculative.accepted, outcome.speculative.proposed, strict=True)
            for position, (accepted, proposed) in enumerate(counts):
                totals[position] += Ratio(float(accepted), float(proposed))
        return totals

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over proposed, all positions together."""
        ratios = self.position_acceptance
        return _quotient(sum(r.numerator for r in ratios), sum(r.denominator for r in ratios))

    def tokens_per_second(self, side: Side, *, with_prefill: bool) -> float | None:
        """Emitted tokens over seconds; without the prefill, its token is left out as well."""
        results = [outcome.plain if side == "plain" else outcome.speculative for outcome in self.outcomes]
        if with_prefill:
            seconds = sum(r.prefill_seconds + r.decode_seconds for r in results)
            return _quotient(sum(len(r.token_ids) for r in results), seconds)
        return _quotient(sum(r.decode_tokens for r in results), sum(r.decode_seconds for r in results))

    def speedup(self, *, with_prefill: bool) -> float | None:
        """Speculative over plain tokens per second: above 1 is faster."""
        plain = self.tokens_per_second("plain", with_prefill=with_prefill)
        speculative = self.tokens_per_second("speculative", with_prefill=with_prefill)
        return None if plain is None or speculative is None else _quotient(speculative, plain)

    def raise_if_lossy(self) -> None:
        """:raises BenchError: an output differs; names the first prompt and position."""
        lossy = [outcome for outcome in self.outcomes if outcome.difference is not None]
        if not lossy:
            return
        first = lossy[0].difference
        assert first is not None
        raise BenchError(
            f"speculative decoding changed the output of {len(lossy)} of {len(self.outcomes)} prompts; first at "
            f"emitted token {first.position}: {first.plain_token} became {first.speculative_token}",
            where=f"prompt {lossy[0].prompt_id}",
            hint="decode in float32: in lower precision a tie may fall differently when several tokens are verified",
        )

    def to_json(self) -> dict[str, Any]:
        """What ``bench.json`` holds."""
        positions = self.position_acceptance
        return {
            "lossless": self.lossless,
            "acceptance_length": self.acceptance_length,
            "acceptance_rate": self.acceptance_rate,
            "position_acceptance": [ratio.value for ratio in positions],
            "position_proposed": [int(ratio.denominator) for ratio in positions],
            "prompts": len(self.outcomes),
            "new_tokens": sum(len(outcome.plain.token_ids) for outcome in self.outcomes),
            "target_passes": self.target_passes,
            "draft_tokens": self.draft_tokens,
            "max_new_tokens": self.max_new_tokens,
            "tokens_per_second": {
                side: {
                    "with_prefill": self.tokens_per_second(side, with_prefill=True),
                    "decode": self.tokens_per_second(side, with_prefill=False),
                }
                for side in ("plain", "speculative")
            },
            "speedup": {"with_prefill": self.speedup(with_prefill=True), "decode": self.speedup(with_prefill=False)},
            "facts": dict(self.facts),
            "per_prompt": [outcome.to_json() for outcome in self.outcomes],
        }

    @property
    def plain_passes(self) -> int:
        """Target passes of plain decoding."""
        return sum(outcome.plain.target_passes for outcome in self.outcomes)


def _quotient(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None
