# SPDX-License-Identifier: Apache-2.0
"""A run's prompts: prepared when a split of them is first asked for, with the target's tokenizer."""

from __future__ import annotations

from pathlib import Path

from specforge_core.config.plan import Plan
from specforge_core.contracts import Progress, Split, StopSignal
from specforge_core.prompts.prepare import prepare_prompts
from specforge_core.prompts.prompt_set import PromptSet
from specforge_core.run.directory import RunDirectory
from specforge_core.run.interrupt import StoppableProgress
from specforge_core.run.tokenizer import PluginTokenizer


class RunPrompts:
    """Called with a split, gives its prepared prompts: prepared now unless they were before.

    :ivar tokenizer: makes the target's tokenizer.
    """

    def __init__(self, plan: Plan, *, progress: Progress, stop: StopSignal) -> None:
        self._plan = plan
        self._directory = RunDirectory.of(plan.config)
        self._progress = StoppableProgress(progress, stop)
        self._prepared: dict[Split, PromptSet] = {}
        self.tokenizer = PluginTokenizer(plan.target_engine.tokenizer, plan.target_section)

    def __call__(self, split: Split) -> PromptSet:
        if split not in self._prepared:
            data = self._plan.config.data
            most = data.max_prompts if split == "train" else None
            self._prepared[split] = self.prepare(split, self._directory.prompts(split), most=most)
        return self._prepared[split]

    def prepare(self, split: Split, directory: Path, *, most: int | None) -> PromptSet:
        """Prepare the first so many prompts of a split, in a directory that need not be the run's."""
        data = self._plan.config.data
        return prepare_prompts(
            data.train if split == "train" else data.eval,
            directory=directory,
            tokenizer=self.tokenizer,
            settings=data.model_copy(update={"max_prompts": most}),
            vocab_size=self._plan.info.vocab_size,
            progress=self._progress,
        )
