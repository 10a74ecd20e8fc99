"""Chunked loss: no [tokens, vocabulary] tensor, neither in forward nor in backward.

`attach` replaces a model's head by one that returns `deferred` logits, which remember which `rows` of which hidden
states they are and what is done to them (`logit_rows`, `row_ops`). When their loss is asked for, `chunked` computes
that and its gradient a few rows at a time (`row_loss`, `head_weight`). `window` checks the first loss.
"""
