"""The demo pool: invented preference pairs with true labels, and four tiny reward models truly trained on them.

`domains` needs numpy only; `tokenizer`, `train` and `label` need torch and transformers. Nothing is imported here, so
that `router_core.demo.domains` stays cheap.
"""
