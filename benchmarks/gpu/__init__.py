# SPDX-License-Identifier: Apache-2.0
"""Everything that is measured on a GPU, packed so that one command runs it there: see README.md."""
