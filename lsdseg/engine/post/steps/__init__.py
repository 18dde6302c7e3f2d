"""Segmentation of volumes larger than memory, block by block: fragments, edges, tables, relabel, in this order.

Each module is one step: what it needs, what a worker does with a block, and the settings that its result depends on.
Every step goes through all samples of the test folder. Blocks write only what is theirs (their voxels, their id range
of nodes, the edges of their fragments) and replace what is there, so a block can be done twice, or broken off and done
again. What the numbers mean is in `engine.post.graph` and `engine.post.tables`; here blocks are read and written.
"""
