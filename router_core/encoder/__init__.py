"""From the text of a group to its context x: backbones embed (prompt, response), `fuse` makes one vector of a group.

Nothing is imported here, so that a numpy-only process can use `encoder.fuse` without a tokenizer or torch.
"""
