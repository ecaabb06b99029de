# SPDX-License-Identifier: Apache-2.0
"""The train role's end of the wires, each part opened when it is first needed."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from specforge_core.config.plan import Plan
from specforge_core.contracts import LeaseDesk, Progress, RefReader, StopSignal
from specforge_core.features.ledger import Ledger, NoLedger
from specforge_core.loading.backpressure import Watermarks
from specforge_core.loading.demand import Demand, NothingWanted
from specforge_core.loading.supply import Supply, SupplyParts
from specforge_core.run.wires import RunWires


class TrainEnd:
    """What the train role reads from, asks at, and keeps account with.

    :param ledger: where the ledger is; None on ranks other than 0, which keep none.
    """

    def __init__(
        self, plan: Plan, wires: RunWires, *, ledger: Path | None, progress: Progress, stop: StopSignal
    ) -> None:
        self._plan = plan
        self._wires = wires
        self._ledger = ledger
        self._progress = progress
        self._stop = stop

    @cached_property
    def reader(self) -> RefReader:
        return self._wires["train"].channel.reader()

    @cached_property
    def desk(self) -> LeaseDesk:
        """Where an online run says what it wants captured."""
        return self._wires["train"].channel.leases()

    @cached_property
    def ledger(self) -> Ledger | NoLedger:
        return NoLedger() if self._ledger is None else Ledger(self._ledger, run_id=self._plan.run_id)

    @cached_property
    def supply(self) -> Supply:
        plan, capture = self._plan, self._plan.config.capture
        window = plan.config.training.global_batch_size
        watermarks = Watermarks(
            high_watermark_refs=capture.high_watermark_windows * window,
            low_watermark_refs=capture.low_watermark_windows * window,
            high_watermark_bytes=capture.high_watermark_bytes,
        )
        return Supply(
            SupplyParts(
                reader=self.reader,
                store=self._wires["train"].store,
                ledger=self.ledger,
                demand=NothingWanted() if plan.feature_reuse else Demand(self.desk, watermarks),
                trusted=self._wires.trusted,
                progress=self._progress,
                stop=self._stop,
                reuse_features=plan.feature_reuse,
                free=plan.retain,
                deadline_seconds=plan.config.loading.deadline_seconds,
            )
        )

    def close(self) -> None:
        """Idempotent."""
        for opened in ("desk", "reader", "ledger"):
            if opened in self.__dict__:
                self.__dict__[opened].close()
