# SPDX-License-Identifier: Apache-2.0
"""What is offered for capture and when: backpressure, batches cut from the prompts' order, and the demand over both."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable

import pytest
from specforge_core.contracts import CaptureBatch, DataError, InFlight, sample_id
from specforge_core.loading.backpressure import Backpressure, Watermarks
from specforge_core.loading.demand import Demand, NothingWanted, PlannedBatch
from specforge_core.loading.order import PromptOrder
from specforge_core.loading.planned import only_missing, plan_epochs
from specforge_core.loading.windows import WindowPlan
from toy_capture import ListDesk

GO, PAUSE = "go", "pause"
NO_LIMIT = Watermarks(high_watermark_refs=sys.maxsize, low_watermark_refs=1)


@pytest.mark.parametrize(
    ("marks", "batch", "observed"),
    [
        # (high, low, bytes), (refs, bytes) of the next batch, [(refs, bytes in flight, bytes kept, decision)]
        ((10, 4, None), (1, 0), [(0, 0, 0, GO), (9, 0, 0, GO), (10, 0, 0, PAUSE), (9, 0, 0, PAUSE), (3, 0, 0, GO)]),
        ((10, 4, None), (1, 0), [(50, 0, 0, PAUSE), (4, 0, 0, PAUSE), (0, 0, 0, GO), (9, 0, 0, GO)]),
        ((10, 4, None), (3, 0), [(7, 0, 0, GO), (8, 0, 0, PAUSE), (7, 0, 0, PAUSE), (3, 0, 0, GO), (6, 0, 0, GO)]),
        ((10, 4, 100), (1, 10), [(5, 90, 0, GO), (5, 91, 0, PAUSE), (4, 10, 0, PAUSE), (3, 10, 0, GO)]),
        ((10, 4, 100), (1, 10), [(3, 95, 0, PAUSE), (3, 90, 0, GO), (3, 50, 41, PAUSE), (3, 50, 40, GO)]),
        ((2, 1, None), (1, 0), [(1, 0, 0, GO), (2, 0, 0, PAUSE), (1, 0, 0, PAUSE), (0, 0, 0, GO)]),
        ((10, 4, None), (11, 0), [(0, 0, 0, PAUSE)]),
    ],
)
def test_backpressure_is_a_table(
    marks: tuple[int, int, int | None], batch: tuple[int, int], observed: list[tuple[int, int, int, str]]
) -> None:
    high, low, nbytes = marks
    machine = Backpressure(Watermarks(high_watermark_refs=high, low_watermark_refs=low, high_watermark_bytes=nbytes))
    decisions = [
        machine.observe(InFlight(refs, size), batch=InFlight(*batch), kept_bytes=kept).value
        for refs, size, kept, _ in observed
    ]
    assert decisions == [row[-1] for row in observed]


@pytest.mark.parametrize(("high", "low", "nbytes"), [(4, 4, None), (4, 0, None), (3, 5, None), (4, 2, 0)])
def test_watermarks_that_cannot_work_are_refused(high: int, low: int, nbytes: int | None) -> None:
    with pytest.raises(ValueError, match=r"watermark|need 0"):
        Watermarks(high_watermark_refs=high, low_watermark_refs=low, high_watermark_bytes=nbytes)


# --- batches ---------------------------------------------------------------------------------------------------------


def size_of(index: int) -> int:
    return 10 + index * 7 % 13


def planned(plan: WindowPlan, *, size: int, start: int = 0) -> list[PlannedBatch]:
    order = PromptOrder(plan.num_prompts, seed=5, shuffle=True)
    return list(
        plan_epochs(
            plan,
            order,
            lambda epoch: lambda index: (sample_id(f"p{index}", epoch), size_of(index)),
            size=size,
            fingerprint="f",
            start=start,
        )
    )


def window_plan(prompts: int, batch: int, *, epochs: int = 1, max_steps: int | None = None) -> WindowPlan:
    return WindowPlan(
        num_prompts=prompts, global_batch_size=batch, micro_batch_size=1, epochs=epochs, max_steps=max_steps
    )


def needed(plan: WindowPlan, start: int) -> list[str]:
    """The samples of windows ``start`` and later, as the loader wants them."""
    order = PromptOrder(plan.num_prompts, seed=5, shuffle=True)
    places = [plan.place(index) for index in range(start, plan.total_windows)]
    return [sample_id(f"p{index}", epoch) for epoch, place in places for index in order.epoch(epoch)[place]]


def ids(batches: Iterable[PlannedBatch]) -> list[str]:
    return [key for item in batches for key, _ in item.samples.values()]


def test_batches_are_cut_at_the_same_places_wherever_training_starts() -> None:
    chance = random.Random(11)
    for _ in range(300):
        plan = window_plan(
            chance.randint(1, 40),
            chance.randint(1, 12),
            epochs=chance.randint(1, 3),
            max_steps=chance.choice([None, chance.randint(1, 12)]),
        )
        size, start = chance.randint(1, 15), chance.randint(0, 14)
        whole = {item.batch.key: item for item in planned(plan, size=size)}
        later = planned(plan, size=size, start=start)
        assert ids(later) == needed(plan, start), (plan, size, start)
        for item in later:
            batch, at = item.batch, (plan, size, start)
            assert batch.first % size == 0, at
            assert batch.count == min(size, plan.num_prompts - batch.first), at
            assert list(item.samples) == list(batch.offsets), at
            assert batch.key in whole, at
            assert item.samples.items() <= whole[batch.key].samples.items(), at


def test_the_prompts_after_the_last_step_are_captured_with_it_but_not_wanted() -> None:
    [first, second, third] = [item.batch for item in planned(window_plan(14, 4, max_steps=2), size=3)]
    assert (first.wanted, second.wanted) == ((), ())
    assert (third.first, third.count, third.wanted) == (6, 3, (0, 1))


def test_a_start_in_the_middle_of_a_batch_wants_its_rest() -> None:
    batches = [item.batch for item in planned(window_plan(14, 4), size=3, start=1)]
    assert [(batch.first, batch.count, batch.wanted) for batch in batches] == [
        (3, 3, (1, 2)),
        (6, 3, ()),
        (9, 3, ()),
        (12, 2, ()),
    ]


def test_a_finished_run_wants_nothing() -> None:
    assert planned(window_plan(14, 4), size=3, start=4) == []


def test_what_is_done_is_left_out() -> None:
    batches = planned(window_plan(6, 6), size=3)
    done = [*ids(batches[:1]), ids(batches)[4]]
    [left] = only_missing(iter(batches), done)
    assert (left.batch.first, left.batch.wanted) == (3, (0, 2))
    assert not set(ids([left])) & set(done)


# --- demand ----------------------------------------------------------------------------------------------------------


def begun(
    plan: WindowPlan, marks: Watermarks = NO_LIMIT, *, size: int = 3, start: int = 0, available: Iterable[str] = ()
) -> tuple[Demand, ListDesk]:
    desk = ListDesk()
    demand = Demand(desk, marks)
    demand.begin(iter(planned(plan, size=size, start=start)), set(available), outstanding=desk.outstanding())
    return demand, desk


def wanted_of(batches: Iterable[CaptureBatch], plan: WindowPlan) -> list[str]:
    order = PromptOrder(plan.num_prompts, seed=5, shuffle=True)
    return [
        sample_id(f"p{order.epoch(batch.epoch)[batch.first + offset]}", batch.epoch)
        for batch in batches
        for offset in batch.offsets
    ]


def test_offers_follow_training_and_never_exceed_a_watermark() -> None:
    """A whole run at random sizes: what is in flight and kept stays below both watermarks, and it always ends."""
    chance = random.Random(3)
    for _ in range(60):
        window, size = chance.randint(1, 6), chance.randint(1, 5)
        plan = window_plan(chance.randint(1, 30), window, epochs=chance.randint(1, 3))
        low = chance.randint(1, 2) * window
        least = (2 * window + size) * 22  # 22: the largest size_of
        limit = chance.choice([None, least, 3 * least])
        marks = Watermarks(
            high_watermark_refs=low + size + chance.randint(0, 5), low_watermark_refs=low, high_watermark_bytes=limit
        )
        _train_through(plan, marks, size=size)


def _train_through(plan: WindowPlan, marks: Watermarks, *, size: int) -> None:
    demand, desk = begun(plan, marks, size=size)
    nbytes = {key: size_of(int(key[1 : key.index(".")])) for key in needed(plan, 0)}
    in_flight, kept = dict[str, int](), dict[str, int]()
    seen = 0
    for index in range(plan.total_windows):
        for key in wanted_of(desk.offered[seen:], plan):
            in_flight[key] = nbytes[key]
        demand.arrived(wanted_of(desk.finish_all(), plan))
        seen = len(desk.offered)
        held = sum(in_flight.values()) + sum(kept.values())
        assert demand.in_flight == InFlight(len(in_flight), sum(in_flight.values()))
        assert len(in_flight) <= marks.high_watermark_refs
        assert marks.high_watermark_bytes is None or held <= marks.high_watermark_bytes
        window = needed(plan, index)[: len(needed(plan, index)) - len(needed(plan, index + 1))]
        assert set(window) <= in_flight.keys(), "without these training stands still for ever"
        kept |= {key: in_flight.pop(key) for key in window}
        demand.acked(window, kept=True)
        demand.top_up()
        if demand.short_of_room:
            demand.freed(list(kept))
            kept.clear()
            demand.top_up()
    assert demand.in_flight == InFlight(0, 0)
    assert wanted_of(desk.offered, plan) == needed(plan, 0), "each sample once, in order"


def test_capture_pauses_until_the_low_watermark() -> None:
    plan = window_plan(12, 2)
    demand, desk = begun(plan, Watermarks(high_watermark_refs=6, low_watermark_refs=3), size=2)
    assert [batch.first for batch in desk.offered] == [0, 2, 4]
    for window, offered in ((0, 3), (1, 5)):
        demand.acked(needed(plan, 0)[2 * window : 2 * window + 2], kept=False)
        demand.top_up()
        assert len(desk.offered) == offered


def test_kept_bytes_count_until_they_are_freed() -> None:
    plan = window_plan(12, 2)
    samples = needed(plan, 0)
    sizes = [size_of(int(key[1 : key.index(".")])) for key in samples]
    limit = sum(sizes[:4]) + 5
    marks = Watermarks(high_watermark_refs=8, low_watermark_refs=4, high_watermark_bytes=limit)
    demand, desk = begun(plan, marks, size=2)
    assert len(desk.offered) == 2
    assert not demand.short_of_room, "nothing waits for a checkpoint yet"
    demand.acked(samples[:2], kept=True)
    demand.top_up()
    assert len(desk.offered) == 2
    assert demand.short_of_room
    demand.freed(samples[:2])
    demand.top_up()
    assert not demand.short_of_room
    assert len(desk.offered) == (3 if sum(sizes[2:6]) <= limit else 2)


def test_there_is_no_shortage_while_enough_is_in_flight_or_nothing_more_is_wanted() -> None:
    plan = window_plan(6, 1)
    samples = needed(plan, 0)
    limit = sum(size_of(int(key[1 : key.index(".")])) for key in samples[:3]) + 1
    demand, _ = begun(plan, Watermarks(high_watermark_refs=3, low_watermark_refs=2, high_watermark_bytes=limit), size=1)
    demand.acked(samples[:1], kept=True)
    assert not demand.short_of_room, "two are still in flight"
    demand.acked(samples[1:2], kept=True)
    assert demand.short_of_room
    whole, _ = begun(window_plan(3, 1), Watermarks(high_watermark_refs=4, low_watermark_refs=2), size=1)
    whole.acked(needed(window_plan(3, 1), 0), kept=True)
    assert not whole.short_of_room


def test_what_is_here_already_is_in_flight_but_not_offered() -> None:
    plan = window_plan(6, 6)
    samples = needed(plan, 0)
    demand, desk = begun(plan, available=[*samples[:3], samples[4]])
    assert [(batch.first, batch.count, batch.wanted) for batch in desk.offered] == [(3, 3, (0, 2))]
    assert demand.in_flight.refs == 6
    desk.finish_all()
    demand.arrived([samples[3], samples[5]])
    assert demand.offer_again(demand.outstanding()) == 0


def test_what_an_earlier_session_left_outstanding_is_not_offered_again() -> None:
    plan = window_plan(9, 9)
    desk = ListDesk()
    [first, second, _] = [item.batch for item in planned(plan, size=3)]
    alone = CaptureBatch(split="train", epoch=0, first=4, count=1, fingerprint="f")  # cut small by a dead process
    held_out = CaptureBatch(split="eval", epoch=0, first=6, count=3, fingerprint="g")
    desk.offer([first, alone, held_out])
    desk.offered.clear()
    demand = Demand(desk, NO_LIMIT)
    demand.begin(iter(planned(plan, size=3)), set(), outstanding=desk.outstanding())
    assert [(batch.first, batch.wanted) for batch in desk.offered] == [(second.first, (0, 2)), (6, ())]
    assert demand.offer_again(demand.outstanding()) == 0
    demand.arrived(wanted_of([batch for batch in desk.finish_all() if batch.split == "train"], plan))
    assert demand.offer_again(demand.outstanding()) == 0


def test_only_what_was_lost_is_offered_again() -> None:
    plan = window_plan(9, 9)
    samples = needed(plan, 0)
    demand, desk = begun(plan)
    [first, *_] = desk.offered
    desk.finish(desk.take("gone", 0.0))  # type: ignore[arg-type]
    demand.arrived([samples[1]])
    desk.offered.clear()
    assert demand.offer_again(demand.outstanding()) == 2
    assert [(batch.key, batch.wanted) for batch in desk.offered] == [(first.key, (0, 2))]
    assert demand.offer_again(demand.outstanding()) == 0, "it is outstanding again"
    assert demand.in_flight.refs == 9


def test_a_channel_that_lost_everything_is_offered_everything_that_is_missing() -> None:
    plan = window_plan(9, 3)
    samples = needed(plan, 0)
    demand, desk = begun(plan)
    desk.finish_all()
    demand.arrived(samples[:4])
    demand.acked(samples[:3], kept=True)
    desk.offered.clear()
    assert demand.offer_again([]) == 5
    assert wanted_of(desk.offered, plan) == samples[4:]
    demand.arrived(samples[4:])
    assert demand.offer_again([]) == 0


def test_a_sample_whose_features_are_gone_is_offered_alone() -> None:
    plan = window_plan(6, 6)
    samples = needed(plan, 0)
    demand, desk = begun(plan)
    demand.arrived(wanted_of(desk.finish_all(), plan))
    desk.offered.clear()
    demand.lost([samples[4]])
    assert demand.offer_again(demand.outstanding()) == 1
    [batch] = desk.offered
    assert (batch.first, batch.count, batch.wanted) == (3, 3, (1,))


def test_offering_one_sample_again_has_an_end_that_names_it() -> None:
    plan = window_plan(3, 3)
    demand, desk = begun(plan)
    desk.finish_all()
    demand.arrived(needed(plan, 0)[1:])
    for _ in range(5):
        assert demand.offer_again(demand.outstanding()) == 1
        desk.finish_all()
    with pytest.raises(DataError, match=rf"sample {needed(plan, 0)[0]}: offered for capture 6 times") as caught:
        demand.offer_again(demand.outstanding())
    assert "logs of the capture processes" in caught.value.hint


def test_several_epochs_the_last_steps_and_short_windows() -> None:
    plan = window_plan(7, 3, epochs=3, max_steps=8)
    demand, desk = begun(plan, size=4)
    assert [(batch.epoch, batch.first, batch.count, batch.wanted) for batch in desk.offered] == [
        *[(epoch, first, count, ()) for epoch in (0, 1) for first, count in ((0, 4), (4, 3))],
        (2, 0, 4, ()),
        (2, 4, 3, (0, 1)),
    ]
    assert demand.in_flight.refs == 7 + 7 + 6


def test_beginning_anew_after_held_out_samples_keeps_counting() -> None:
    """Held-out samples are copied through the same demand before training begins."""
    desk = ListDesk()
    demand = Demand(desk, NO_LIMIT)
    held_out = PlannedBatch(CaptureBatch(split="eval", epoch=0, first=0, count=1), {0: ("h0.held-out", 7)})
    demand.begin(iter([held_out]), set(), outstanding=[])
    assert demand.in_flight == InFlight(1, 7)
    desk.finish_all()
    demand.arrived(["h0.held-out"])
    demand.acked(["h0.held-out"], kept=True)
    demand.freed(["h0.held-out"])
    plan = window_plan(3, 3)
    demand.begin(iter(planned(plan, size=3)), set(), outstanding=desk.outstanding())
    assert demand.in_flight.refs == 3
    assert not demand.short_of_room


def test_offline_nothing_is_wanted() -> None:
    nothing = NothingWanted()
    nothing.begin(iter(planned(window_plan(3, 3), size=3)), set(), outstanding=[])
    nothing.top_up()
    nothing.arrived(["a"])
    nothing.acked(["a"], kept=True)
    nothing.freed(["a"])
    assert nothing.outstanding() == []
    assert nothing.offer_again([]) == 0
    assert not nothing.short_of_room
