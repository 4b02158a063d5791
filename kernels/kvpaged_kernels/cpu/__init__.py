"""Stock-torch fast paths for pages on a CPU.

Nothing is gathered: adjacent pages are read through strided views, one attention call serves many
pages, and parts of a sequence are merged exactly by their log-sum-exp. What depends on the block
table alone is planned once a step (`plan`) and reused by every layer.
"""
