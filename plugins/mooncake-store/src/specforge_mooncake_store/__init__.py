# SPDX-License-Identifier: Apache-2.0
"""The ``mooncake`` feature store of SpecForge. ``plugin`` says what is offered; ``store`` is where to begin reading."""
