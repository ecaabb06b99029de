# SPDX-License-Identifier: Apache-2.0
"""The run file as core understands it: one model per section, defaults included.

``target``, ``strategy``, ``store`` and ``channel`` belong to plugins. They are kept as plain mappings here and checked
against the chosen plugin's own section by ``config.plan``.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from specforge_core.hooks.sections import Section

Topology = Literal["offline", "colocated", "disaggregated"]


class RunSection(Section):
    """Which run this is and where it lives."""

    directory: Path = Field(description="run directory: config, metrics, checkpoints, export, reports")
    seed: int = Field(0, ge=0, description="everything random in the run derives from it")
    id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="the same in every process of one run, unlike any other run's; default: run.directory's last part",
    )
    token_file: Path | None = Field(
        None, description="file with the run's shared secret; default: the environment's SPECFORGE_TOKEN, or none"
    )


class HubSource(Section):
    """A data set on the Hugging Face hub: its files are fetched, none of its code is run."""

    hub: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?$",
        description="the data set's name, such as org/name",
    )
    revision: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,199}$", description="branch, tag or commit; default: main"
    )
    split: str = Field("train", min_length=1, max_length=100)
    config: str | None = Field(None, min_length=1, max_length=200, description="default: the data set's only or own")


def _kind_of_source(given: object) -> str:
    return "hub data set" if isinstance(given, (Mapping, HubSource)) else "path"


DataSource = Annotated[
    Annotated[Path, Tag("path")] | Annotated[HubSource, Tag("hub data set")], Discriminator(_kind_of_source)
]


class DataSection(Section):
    """Where prompts come from and how they become token ids and loss masks."""

    train: list[DataSource] = Field(
        min_length=1,
        description="files (JSON lines or arrays, also .gz and .zst, parquet, arrow), datasets on disk, folders, "
        "patterns such as data/*.jsonl, and {hub: org/name, revision, split, config}",
    )
    eval: list[DataSource] = Field(default=[], description="held-out prompts; captured once and kept")
    mapping: dict[str, str] = Field(
        default={}, description="the rows' own keys for what is read of them, such as {messages: dialogue, tools: apis}"
    )
    max_length: int = Field(2048, ge=2, description="tokens per prompt; longer ones are cut at the right")
    samples: Literal["conversation", "turn"] = Field(
        "conversation", description="turn: one sample per answer, for templates that rewrite what came before"
    )
    last_turn_only: bool = Field(False, description="train the last assistant turn of a conversation only")
    max_prompts: int | None = Field(None, ge=1, description="use only the first so many training prompts")
    template_arguments: dict[str, Any] = Field(
        default={}, description="variables of the chat template, such as {enable_thinking: false}"
    )
    date: datetime.date = Field(
        datetime.date(2026, 1, 1), description="today's date, for chat templates that write it into the prompt"
    )
    on_bad_row: Literal["stop", "skip"] = Field("stop", description="what a row that cannot be used does to the run")
    max_bad_rows: int = Field(1000, ge=1, description="on_bad_row: skip: rows skipped before the run is stopped anyway")
    workers: int = Field(1, ge=1, le=256, description="processes that prepare prompts")
    features: Path | None = Field(
        None, description="offline feature directory; default: features/ inside the run directory"
    )


MAX_THREADS = 1024
"""More than a machine has cores. Torch crashes on what the system cannot start, and a run file may be anybody's."""


class CaptureSection(Section):
    """How features are captured and how far capture may run ahead of training."""

    batch_size: int = Field(8, ge=1, description="prompts per prefill")
    processes: int = Field(
        1, ge=1, le=MAX_THREADS, description="capture processes that `specforge run` of a disaggregated run starts"
    )
    max_attempts: int = Field(
        3,
        ge=1,
        description="tries to capture a batch before its prompts are tried alone, and set aside where that fails",
    )
    high_watermark_windows: int = Field(
        4, ge=2, description="online: stop capturing at so many optimizer windows of samples in flight"
    )
    low_watermark_windows: int = Field(2, ge=1, description="online: go on capturing below so many windows in flight")
    high_watermark_bytes: int | None = Field(
        None, ge=1, description="online: also stop at so many bytes of features, those kept for a checkpoint included"
    )
    threads: int | None = Field(
        None, ge=1, le=MAX_THREADS, description="CPU threads of the capture process; default: torch's choice"
    )

    @model_validator(mode="after")
    def _ordered(self) -> CaptureSection:
        if self.low_watermark_windows >= self.high_watermark_windows:
            raise ValueError("low_watermark_windows must be below high_watermark_windows")
        return self


class TrainingSection(Section):
    """The optimizer and how a window is cut. A window is one optimizer step."""

    global_batch_size: int = Field(16, ge=1, description="samples per optimizer step, over all ranks")
    micro_batch_size: int = Field(4, ge=1, description="samples per forward pass and rank; changes speed, not results")
    epochs: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1, description="stop after so many optimizer steps (schedule included)")
    shuffle: bool = Field(True, description="a new prompt order each epoch, from the run's seed")
    learning_rate: float | None = Field(None, gt=0, description="default: the strategy's")
    warmup_ratio: float | None = Field(None, ge=0, lt=1, description="share of steps; default: the strategy's")
    max_grad_norm: float | None = Field(None, gt=0, description="default: the strategy's")
    weight_decay: float = Field(0.0, ge=0)
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the draft; masters are always float32")
    device: str = Field("cpu", description="cpu, cuda or cuda:N")
    threads: int | None = Field(
        None, ge=1, le=MAX_THREADS, description="CPU threads of the train process; default: torch's choice"
    )


class LoadingSection(Section):
    """How samples reach the trainer."""

    prefetch_windows: int = Field(2, ge=1, description="windows read and collated ahead")
    sort_by_length: bool = Field(True, description="inside a window only: less padding, same result")
    deadline_seconds: float = Field(600.0, gt=0, description="longest wait for a missing sample")
    retain: Literal["checkpoint", "window"] | None = Field(
        None,
        description="online: keep trained features until a checkpoint covers them, or free them with their window and "
        "capture them again after a crash; default: checkpoint where the store outlives the train process",
    )


class CheckpointSection(Section):
    """When training can be resumed from."""

    every_steps: int = Field(500, ge=1)
    keep: int = Field(2, ge=1, description="latest checkpoints kept, besides the best")


class EvaluationSection(Section):
    """Evaluation on held-out features during training."""

    every_steps: int | None = Field(None, ge=1, description="default: at each checkpoint and at the end")
    micro_batch_size: int | None = Field(None, ge=1, description="default: training.micro_batch_size")


class RegenerateSection(Section):
    """Answers made by the target itself: what a draft learns most from."""

    output: Path | None = Field(None, description="where the answers go; default: regenerated/ in the run directory")
    turns: Literal["all", "last"] = Field(
        "all", description="all: every answer, each upon the target's own answers before it; last: the last one alone"
    )
    servers: list[str] = Field(
        default=[],
        description="addresses of servers with an OpenAI-compatible API, such as http://host:8000/v1; "
        "default: the target engine in this process",
    )
    model: str | None = Field(None, description="the model's name on the servers; default: the only one they have")
    api_key_file: Path | None = Field(None, description="file with the servers' key; default: no key")
    concurrency: int = Field(64, ge=1, le=4096, description="requests in flight, over all servers")
    timeout_seconds: float = Field(600.0, gt=0, description="longest wait for one answer")
    retries: int = Field(5, ge=0, description="further tries of a request that failed")
    temperature: float = Field(0.0, ge=0, description="0: the likeliest token each time")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0: leave it out")
    max_tokens: int = Field(1024, ge=1, description="tokens per answer; a longer one is cut and marked")
    thinking: Literal["template", "on", "off", "mixed"] = Field(
        "template", description="template: as the chat template does by itself; mixed: on for half of the conversations"
    )
    batch_size: int = Field(32, ge=1, description="answers that an engine in this process makes at once")

    @field_validator("thinking", mode="before")
    @classmethod
    def _as_yaml_reads_it(cls, value: object) -> object:
        """YAML reads on and off without quotes as true and false."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class BenchSection(Section):
    """Real greedy speculative decoding against plain decoding of the same target."""

    prompts: int = Field(20, ge=1, description="held-out prompts decoded")
    max_new_tokens: int = Field(64, ge=1)
    prompt_tokens: int | None = Field(
        None, ge=1, description="cut prompts to so many tokens; default: everything before the first trained token"
    )
    draft_tokens: int | None = Field(None, ge=1, description="proposed per target pass; default: the drafter's most")
    threads: int | None = Field(
        None, ge=1, le=MAX_THREADS, description="CPU threads while decoding; default: training.threads"
    )


class RunConfig(Section):
    """One run."""

    run: RunSection
    topology: Topology = "offline"
    target: dict[str, Any] = Field(description="target engine: name and the plugin's own settings")
    strategy: dict[str, Any] = Field(description="strategy: name and the plugin's own settings")
    data: DataSection
    store: dict[str, Any] | None = Field(None, description="feature store; default: the topology's")
    channel: dict[str, Any] | None = Field(None, description="ref channel; default: the topology's")
    capture: CaptureSection = CaptureSection()
    training: TrainingSection = TrainingSection()
    loading: LoadingSection = LoadingSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvaluationSection = EvaluationSection()
    regenerate: RegenerateSection = RegenerateSection()
    bench: BenchSection = BenchSection()
