# SPDX-License-Identifier: Apache-2.0
"""Ref channel over Redis Streams."""
