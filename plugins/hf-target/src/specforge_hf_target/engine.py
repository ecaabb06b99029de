# SPDX-License-Identifier: Apache-2.0
"""The ``hf`` target engine: a causal language model on transformers, in this process.

Capturing is one prefill per batch through the decoder only: no logits, no key-value cache. The batch is padded at the
right and needs no padding mask: attention is causal, so no position before the padding ever sees it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from specforge_core.contracts import (
    INPUT_IDS,
    LOSS_MASK,
    AnswerSource,
    CaptureRequest,
    ChatTokenizer,
    Prompt,
    Sample,
    TargetDecoder,
    TargetEngine,
    TargetError,
    TargetInfo,
)
from torch import Tensor, nn

from specforge_hf_target.answers import HfAnswers
from specforge_hf_target.cached_decoder import HfTargetDecoder
from specforge_hf_target.config import HfTargetConfig
from specforge_hf_target.decoder_layers import FeatureCollector, check_request, find_decoder, find_layers
from specforge_hf_target.frozen_weights import PARAMETERS_PER_BYTE, count_weight_bytes, read_frozen_weights
from specforge_hf_target.model_files import check_text_files, first_line, locate_file, refusing, running
from specforge_hf_target.progress_bars import without_progress_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HfTargetEngine(TargetEngine):
    """See the module. Nothing but ``config.json`` is read before the first ``capture`` or ``decoder``."""

    def __init__(self, config: HfTargetConfig):
        self._config = config
        self._model: PreTrainedModel | None = None

    @cached_property
    def info(self) -> TargetInfo:
        return self._config.describe()

    def capture(self, prompts: Sequence[Prompt], request: CaptureRequest, epoch: int) -> Iterator[Sample]:
        check_request(request, self.info)
        self._check_prompts(prompts)
        if not prompts:
            return
        model = self._load()
        decoder = find_decoder(model, self.info)
        collector = FeatureCollector(decoder, find_layers(decoder, self.info), request, self.info)
        input_ids_BT = _pad_right(prompts).to(self._config.device)
        with (
            running(self.info),
            torch.no_grad(),
            collector.attached(),
        ):
            decoder(input_ids=input_ids_BT, use_cache=False)
        for row, prompt in enumerate(prompts):
            features = {
                INPUT_IDS: torch.tensor(prompt.input_ids, dtype=torch.int64),
                LOSS_MASK: torch.tensor(prompt.loss_mask, dtype=torch.bool),
                **collector.rows(row, prompt.num_tokens),
            }
            yield Sample(prompt.prompt_id, epoch, features, request.last_hidden_norm)

    def frozen_weights(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        return read_frozen_weights(self._config, self.info, names)

    def decoder(self, request: CaptureRequest) -> TargetDecoder:
        check_request(request, self.info)
        return HfTargetDecoder(self._load(), request, self.info)

    def answers(self, tokenizer: ChatTokenizer, *, batch_size: int) -> AnswerSource:
        stop = tokenizer.stop_token_ids or self.info.eos_token_ids
        return HfAnswers(self._load, self.info, stop_token_ids=stop, batch_size=batch_size)

    def health(self) -> None:
        """:raises TargetError: the model cannot be read, or its device is not there."""
        _ = self.info
        _check_device(self._config.device)

    def close(self) -> None:
        self._model = None

    def _load(self) -> PreTrainedModel:
        if self._model is None:
            _check_device(self._config.device)
            self._model = load_model(self._config, self.info)
        return self._model

    def _check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """An id beyond the embedding is an index error deep in torch, or a device-side assert that ends the process."""
        for prompt in prompts:
            if not prompt.num_tokens:
                raise TargetError("has no tokens", where=f"sample {prompt.prompt_id}", hint="leave it out")
            if min(prompt.input_ids) < 0 or max(prompt.input_ids) >= self.info.vocab_size:
                raise TargetError(
                    f"vocabulary mismatch: token ids go from {min(prompt.input_ids)} to {max(prompt.input_ids)}, "
                    f"the target's from 0 to {self.info.vocab_size - 1}",
                    where=f"sample {prompt.prompt_id}",
                    hint="prepare the prompts with this target's tokenizer",
                )


def load_model(config: HfTargetConfig, info: TargetInfo) -> PreTrainedModel:
    """The whole model, frozen, in evaluation mode, on its device.

    :raises TargetError: transformers does not know it, or its weights are missing or of another shape.
    """
    from transformers import AutoModelForCausalLM

    where = f"target {config.path}"
    check_text_files(config.path)
    if locate_file(config.path, "adapter_config.json", revision=config.revision) is not None:
        raise TargetError(
            "this is an adapter, or holds one: with it, transformers loads what it names besides the model",
            where=f"{where}: adapter_config.json",
            hint="merge it into its model and name the result, or remove it",
        )
    stored_bytes = count_weight_bytes(config)
    hint = "check its files; update transformers; set target.trust_remote_code if it brings its own code"
    with refusing(f"transformers cannot load {info.architecture}", where=where, hint=hint), without_progress_bars():
        _check_claims(config, stored_bytes)
        answer: Any = AutoModelForCausalLM.from_pretrained(
            config.path,
            revision=config.revision,
            dtype=getattr(torch, info.dtype),
            trust_remote_code=config.trust_remote_code,
            attn_implementation=config.attn_implementation,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # else its error does not say which
            output_loading_info=True,
        )
        model: PreTrainedModel = answer[0]
        loaded: dict[str, Any] = answer[1]
    if loaded["missing_keys"]:  # transformers fills these with random numbers and only warns
        raise TargetError(
            f"its files lack {len(loaded['missing_keys'])} weights, {min(loaded['missing_keys'])} among them",
            where=where,
            hint="the files are incomplete, or config.json is of another model",
        )
    if loaded["mismatched_keys"]:
        name, stored, expected = min(loaded["mismatched_keys"])
        raise TargetError(
            f"{len(loaded['mismatched_keys'])} weights are of another shape, {name} among them: "
            f"{list(stored)} in the files, {list(expected)} by config.json",
            where=where,
            hint="the weights and config.json are of different models",
        )
    nn.Module.to(model, config.device).eval().requires_grad_(False)
    return model


def _check_claims(config: HfTargetConfig, stored_bytes: int) -> None:
    """Lay the model out without memory: transformers makes what config.json claims before it finds it missing.

    :raises TargetError: the weight files cannot hold as many parameters.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if config.trust_remote_code:  # whoever wrote that code needs no large numbers
        return
    settings = AutoConfig.from_pretrained(config.path, revision=config.revision, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    claimed = sum(parameter.numel() for parameter in model.parameters())
    if claimed > PARAMETERS_PER_BYTE * stored_bytes:
        raise TargetError(
            f"config.json describes {claimed:,} parameters, the weight files have {stored_bytes:,} bytes",
            where=f"target {config.path}",
            hint="the weights and config.json are of different models",
        )


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise TargetError(
            f"device {device!r} cannot be used: {first_line(error)}",
            where="target.device",
            hint="cpu works everywhere",
        ) from error


def _pad_right(prompts: Sequence[Prompt]) -> Tensor:
    """int64 [B, T]. Any token pads: what is captured there is cut off."""
    input_ids_BT = torch.zeros(len(prompts), max(prompt.num_tokens for prompt in prompts), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        input_ids_BT[row, : prompt.num_tokens] = torch.tensor(prompt.input_ids, dtype=torch.int64)
    return input_ids_BT
