# SPDX-License-Identifier: Apache-2.0
"""See a D2F model decode, forward by forward: `python -m vllm_d2f.watch "a question"`.

`decoders` runs the models, `picture` describes their state after each forward, and `terminal`,
`gif` and `page` draw it.
"""
