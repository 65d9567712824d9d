"""What patching takes in memory, computed from a model's shape."""

from __future__ import annotations

from faststeer.observe.patching.graph import Graph
from faststeer.observe.patching.metrics import CHUNK


def patch_bytes(
    graph: Graph, hidden_size: int, intermediate_size: int, vocabulary: int, tokens: int, bytes_per_number: int = 2
) -> int:
    """An upper bound of what `patch` takes for one row of so many tokens, in bytes, beside the weights.

    With d the hidden size, n layers and S senders from the steering on, H heads, K key-value heads, T tokens, b bytes
    per number of the model and w = max(b, 4):

        S T d b                       what every sender writes, steered less unsteered; and the larger of
        (5 n + 3 H + 8) T d b         while these are made: what the layers read and wrote unsteered, one layer's heads
        (n + 5) T d b                 and, step by step: the stream before each layer,
        (H + 2 K + 36) T d w          the gradients of one layer's receivers, its activations, 16 senders in fp32,
        8 T I w                       the activations of its MLP, of width I,
        6 C V w                       logits of C = 64 positions and their gradient

    Attention is one that makes no T x T pattern ("sdpa"); "eager" takes 3 H T^2 w more. Edges take no more for being
    many: a score is added up where its gradient arises.
    """
    d, t, b, w = hidden_size, tokens, bytes_per_number, max(bytes_per_number, 4)
    n, heads, kv_heads = graph.depth, graph.heads, graph.kv_heads
    making = (5 * n + 3 * heads + 8) * t * d * b
    layer = (heads + 2 * kv_heads + 36) * t * d * w + 8 * t * intermediate_size * w
    step = (n + 5) * t * d * b + layer + 6 * min(CHUNK, tokens) * vocabulary * w
    return graph.n_senders * t * d * b + max(making, step)
