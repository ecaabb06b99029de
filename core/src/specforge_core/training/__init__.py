# SPDX-License-Identifier: Apache-2.0
"""Stage 5: training that does not depend on how a window is cut.

Read ``trainer`` (the loop) first, then ``window_step`` (one optimizer step), ``optimizer`` and ``schedule``,
``parallelism`` (what ranks exchange), ``evaluator``, ``metrics_log``.
"""
