# SPDX-License-Identifier: Apache-2.0
"""What every ref channel must do. Subclass, provide ``make_channel``, and pytest runs the contract::

    class TestMyChannel(RefChannelSuite):
        def make_channel(self, directory):
            return MyChannel(MyChannelConfig(name="mine"), context(directory))

A channel says ``replayable`` and ``cross_process`` as its descriptor does. One that crosses processes also tells how
its two sides die (``kill_writer``, ``kill_reader``); what is not told is not tested.
"""

from __future__ import annotations

from specforge_core.testing.channel_ending_suite import ChannelEndingSuite
from specforge_core.testing.channel_under_test import WAIT_SECONDS, read_all
from specforge_core.testing.lease_desk_suite import LeaseDeskSuite
from specforge_core.testing.ref_delivery_suite import RefDeliverySuite

__all__ = ["WAIT_SECONDS", "RefChannelSuite", "read_all"]


class RefChannelSuite(RefDeliverySuite, ChannelEndingSuite, LeaseDeskSuite):
    """The contract of :class:`specforge_core.contracts.RefChannel`: delivery, endings, and the lease desk."""

    thorough = frozenset(
        {
            "test_threads_publish_while_one_polls",
            "test_poll_waits_no_longer_than_told",
            "test_a_take_waits_no_longer_than_told",
            "test_no_two_takers_get_one_batch",
        }
    )
