# SPDX-License-Identifier: Apache-2.0
"""Discovery: hook specifications, descriptors, and the manager that finds who implements them."""
