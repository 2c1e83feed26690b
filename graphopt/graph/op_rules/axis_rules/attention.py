"""Axis rules of attention and of recurrent layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from graphopt.graph.op_rules.arguments import operand, operand_names

if TYPE_CHECKING:
    from graphopt.graph.axes.factors import Factor
    from graphopt.graph.axes.propagation import Propagation


def attention(see: Propagation, node: fx.Node) -> Any:
    """Scaled dot product attention: ``q [*, H, L, E]``, ``k [*, H, S, E]``, ``v [*, H, S, V]`` give ``[*, H, L, V]``.

    With fewer key heads than query heads, query heads are key heads x queries a key head.
    """
    q, k, v = (see.of(a) for a in node.args[:3])
    result = _relate(see, node, q, k, v)
    if not isinstance(node.meta["val"], (list, tuple)):
        return result
    others: list[Any] = [result]
    rows = result[:-1]  # of the log-sum-exp, or of the weights
    if "attention_math" in str(node.target):
        rows = (*rows, k[-2])
    for i in range(1, len(node.meta["val"])):
        sizes = see.sizes(node, i)
        others.append(rows if sizes == tuple(f.size for f in rows) else tuple(see.new(s) for s in sizes))
    return others


def _relate(
    see: Propagation, node: fx.Node, q: tuple[Factor, ...], k: tuple[Factor, ...], v: tuple[Factor, ...]
) -> tuple[Factor, ...]:
    see.unify(q[-1], k[-1])
    see.unify(k[-2], v[-2])
    if len(q) > 2 and len(k) > 2 and q[-3].size != k[-3].size and k[-3].size > 1:
        heads, _ = see.reshape([q[-3]], [k[-3].size, q[-3].size // k[-3].size])
        see.unify(heads, k[-3])
        see.unify(k[-3], v[-3])
        lead = see.broadcast(see.broadcast(q[:-3], k[:-3]), v[:-3]) + (q[-3],)
    else:
        lead = see.broadcast(see.broadcast(q[:-2], k[:-2]), v[:-2])
    see.attended(q[-2], k[-2], (q[-1], v[-1]), lead, node)
    names = operand_names(node)
    for name in ("attn_mask", "attn_bias"):
        if name in names and isinstance(mask := operand(node, name), fx.Node):
            see.broadcast((*lead, q[-2], k[-2]), see.of(mask))
    if "is_causal" in names and operand(node, "is_causal"):
        for f in (q[-2], k[-2]):
            see.freeze(f, f"causal order of {node.target} ({node.name})")
    return (*lead, q[-2], v[-1])


def attention_backward(see: Propagation, node: fx.Node) -> Any:
    """Gradients of query, key and value."""
    grad, q, k, v = (see.of(a) for a in node.args[:4])
    out = _relate(see, node, q, k, v)
    see.broadcast(see.broadcast(grad, out), see.of(operand(node, "out")))
    saved = see.of(operand(node, "logsumexp"))
    if [f.size for f in saved] == [f.size for f in out[:-1]]:
        see.broadcast(out[:-1], saved)
    results: list[Any] = [q, k, v]
    for i in range(3, len(node.meta["val"])):
        results.append(see.fresh(node, index=i))
    return results


def attention_rows_first(see: Propagation, node: fx.Node) -> Any:
    """Attention on ``[batch, L, H, E]``; rows of several sequences one behind the other (``[rows, H, E]``) stay."""
    dims = [_heads_first(see.of(a)) for a in node.args[:3]]
    *lead, heads, rows, size = _relate(see, node, *dims)
    _keep_rows(see, node, dims)
    return [(*lead, rows, heads, size), *(see.fresh(node, index=i) for i in range(1, len(node.meta["val"])))]


def attention_rows_first_backward(see: Propagation, node: fx.Node) -> Any:
    """Gradients of query, key and value."""
    grad, *dims = (_heads_first(see.of(a)) for a in node.args[:4])
    see.broadcast(grad, _relate(see, node, *dims))
    _keep_rows(see, node, dims)
    behind = (see.fresh(node, index=i) for i in range(3, len(node.meta["val"])))
    return [*(see.of(a) for a in node.args[1:4]), *behind]


def _heads_first(dims: tuple[Factor, ...]) -> tuple[Factor, ...]:
    return (*dims[:-3], dims[-2], dims[-3], dims[-1])


def _keep_rows(see: Propagation, node: fx.Node, dims: list[tuple[Factor, ...]]) -> None:
    """Freezes rows where numbers say which of them belong together."""
    names = operand_names(node)
    offsets = [n for n in ("cum_seq_q", "cu_seqlens_q") if n in names and operand(node, n) is not None]
    window = [n for n in ("window_size_left", "window_size_right", "window_size") if n in names]
    masked = "custom_mask_type" in names and operand(node, "custom_mask_type") != 0
    if offsets or masked or any(operand(node, n) is not None for n in window):
        for q in dims:
            see.freeze(q[-2], f"sequences and masks of {node.target} ({node.name})")


def recurrent_layer(see: Propagation, node: fx.Node) -> Any:
    """oneDNN's layer: ``input [time, batch, I]``, weights ``[gates x H, I]`` and ``[gates x H, H]``."""
    source = see.of(node.args[0])
    hidden = _layer(see, node, source[-1], [see.of(a) for a in node.args[1:5]], operand(node, "hidden_size"))
    for name in ("hx_", "cx_"):
        see.broadcast((source[1], hidden), see.of(operand(node, name))[-2:])
    see.freeze(source[0], f"order in time of {node.target} ({node.name})")
    state = (source[1], hidden)
    results: list[Any] = [(*source[:2], hidden)]
    for i in (1, 2):
        results.append((see.one,) * (len(see.sizes(node, i)) - 2) + state)
    return [*results, *(see.fresh(node, index=i) for i in range(3, len(node.meta["val"])))]


def recurrent_layer_backward(see: Propagation, node: fx.Node) -> Any:
    """Gradients of input, four weights, and both states."""
    source = see.of(operand(node, "input"))
    weights = [see.of(operand(node, f"weight{i}")) for i in (1, 2, 3, 4)]
    hidden = _layer(see, node, source[-1], weights, operand(node, "hidden_size"))
    states = [see.of(operand(node, n)) for n in ("hx_", "cx_tmp")]
    for state in states:
        see.broadcast((source[1], hidden), state[-2:])
    results: list[Any] = [source, *weights, *states]
    return results[: len(node.meta["val"])]


def _layer(
    see: Propagation, node: fx.Node, inputs: Factor, weights: list[tuple[Factor, ...]], hidden_size: int
) -> Factor:
    """Relates the weights of a layer and direction (input to gates, hidden to gates, biases): the hidden dimension."""
    hidden: Factor | None = None
    for position, weight in enumerate(weights):
        if not weight or weight[0].size < hidden_size:
            continue
        gates, its_hidden = see.reshape([weight[0]], [weight[0].size // hidden_size, hidden_size])
        see.cut(gates, range(1, gates.size))  # each gate is another function: pieces of size 1, no axis
        hidden = its_hidden if hidden is None else see.meet(hidden, its_hidden)
        if len(weight) > 1:
            see.feature(weight[1])
            see.feature(its_hidden)
            see.unify(weight[1], inputs if position == 0 else hidden)
    assert hidden is not None
    return hidden


def recurrent_cell(see: Propagation, node: fx.Node) -> Any:
    """One step of a layer: ``input [n, I]``, states ``[n, H]``, weights ``[gates x H, I]`` and ``[gates x H, H]``."""
    source, states = see.of(node.args[0]), operand(node, "hx")
    several = isinstance(states, (list, tuple))
    names = [n for n in ("w_ih", "w_hh", "b_ih", "b_hh") if isinstance(operand(node, n), fx.Node)]
    weights = [see.of(operand(node, name)) for name in names]
    dims = see.of(states[0] if several else states)
    hidden = _layer(see, node, source[-1], weights, dims[-1].size)
    for state in states if several else [states]:
        see.broadcast((*source[:-1], hidden), see.of(state))
    return see.repeated(node, (*source[:-1], hidden))


def recurrent(see: Propagation, node: fx.Node) -> Any:
    """``lstm``, ``gru``, ``rnn_tanh``: all layers and directions, as `torch.nn.LSTM` orders their weights."""
    source = see.of(node.args[0])
    names = operand_names(node)
    if "batch_sizes" in names or operand(node, "params") is None:
        return see.unknown(node)
    states = operand(node, "hx")
    params = operand(node, "params")
    directions = 2 if operand(node, "bidirectional") else 1
    layers, has_biases = operand(node, "num_layers"), operand(node, "has_biases")
    first_hidden = see.of(states[0] if isinstance(states, (list, tuple)) else states)[-1]
    each = len(params) // (layers * directions)
    if each != (4 if has_biases else 2):  # projections
        return see.unknown(node)
    batch_first = operand(node, "batch_first")
    time, batch = (source[-2], source[0]) if batch_first else (source[0], source[-2])
    see.freeze(time, f"order in time of {node.target} ({node.name})")
    inputs = source[-1]
    size = first_hidden.size
    finals: list[Factor] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            at = (layer * directions + direction) * each
            weights = [see.of(p) for p in params[at : at + each]]
            hidden = _layer(see, node, inputs, weights, size)
            outputs.append(hidden)
            finals.append(hidden)
        inputs = see.concat(outputs)
    state_dims = [see.of(s) for s in (states if isinstance(states, (list, tuple)) else [states])]
    merged = finals[0]
    if len(finals) > 1:  # the states of all layers lie in one tensor
        for other in finals[1:]:
            merged = see.meet(merged, other)
    final_states = []
    for dims in state_dims:
        see.unify(dims[-1], merged)
        see.cut(dims[0], range(1, dims[0].size))  # each layer and direction is another one
        if len(dims) == 3:
            see.unify(dims[1], batch)
        final_states.append(dims)
    return [(*source[:-1], inputs), *final_states]
