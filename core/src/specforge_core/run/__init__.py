# SPDX-License-Identifier: Apache-2.0
"""The only place that constructs and connects: from a plan to the two halves of a run.

Read ``assemble`` (what is constructed), then ``roles`` (who drives what), then ``directory`` (where everything lies).
"""
