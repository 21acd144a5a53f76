"""Tokens in, residual stream and logits out.

The dimension key of the whole package, used as suffixes of array names (`x_BTD` is a batch of residual streams):

    B  batch (rows)                 H  query heads              M  tapped layers, stacked SAEs
    T  positions                    G  key/value heads          S  positions of a cache; shards
    N  flat tokens, N = B * T       C  head width               E  experts
    D  model width                  I  feed-forward width       R  repeats of the layer period
    F  SAE features                 L  layers                   P  layers in one period
    K  active features a token,     V  vocabulary               W  features of one edit
       experts a token              A  assignments of tokens to experts, A = N * K
"""
