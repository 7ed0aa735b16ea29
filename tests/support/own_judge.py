"""The judge of own cells: a plain loop over time, with the step of the graph on whole batches."""

import torch

from ostinato.own.graph import Graph


def layer(call):
    """Run a layer in its tensors' dtype; return output, last states and, if there, the others'.

    Autograd goes through it. Rows that end early keep their states.
    """
    graph, directions = Graph.parse(call.cell), 1 + call.bidirectional
    count = len(call.weights) // directions
    begins, lengths = _rows(call)
    flat = call.input.reshape(-1, call.input.shape[-1])
    found = [
        _direction(call, graph, call.weights[d * count : (d + 1) * count], flat, begins, lengths, d)
        for d in range(directions)
    ]
    outputs, last, every = zip(*found, strict=True)
    shape = call.input.shape[:-1]
    results = [torch.cat(outputs, -1).reshape(*shape, -1)]
    for k in range(1 + (graph.states > 1)):
        results.append(torch.stack([states[k] for states in last]))
    if graph.states > 1:
        results.append(torch.cat(every, -1).reshape(*shape, -1))
    return results


def _rows(call):
    """Where each step's rows begin, and how many steps each row of the batch has."""
    if call.batch_sizes is None:
        steps = len(call.input)
        ends = [steps] * call.batch if call.lengths is None else call.lengths.tolist()
        return [t * call.batch for t in range(steps)], torch.tensor(ends)
    sizes = call.batch_sizes
    begins = (sizes.cumsum(0) - sizes).tolist()
    return begins, (sizes[:, None] > torch.arange(call.batch)).sum(0)


def _direction(call, graph, weights, flat, begins, lengths, d):
    ih, hh, *others = weights
    own = others.pop() if graph.parameters else None
    b_ih, b_hh = others or (None, None)
    size, hidden = ih.shape[1], hh.shape[1]
    gates_x = torch.nn.functional.linear(flat[:, :size], ih, b_ih)
    states, anew = _states(call.initial, graph, d), _states(call.reset_to, graph, d)
    if anew is None:
        anew = [torch.zeros_like(state) for state in states]
    flags = None if call.resets is None else call.resets.reshape(-1)
    places, made = [], []
    times = range(len(begins))
    for t in reversed(times) if d else times:
        active = (lengths > t).unsqueeze(1)
        place = (begins[t] + torch.arange(call.batch)).clamp_max(len(flat) - 1)
        if flags is not None:
            # In reverse a row begins anew where it comes from the piece behind.
            near = t + 1 if d else t
            within = lengths > near
            where = (begins[near] if near < len(begins) else 0) + torch.arange(call.batch)
            cut = (flags[where.clamp_max(len(flat) - 1)] & within).unsqueeze(1)
            states = [torch.where(cut, a, s) for a, s in zip(anew, states, strict=True)]
        h, *_ = states
        gates_h = torch.nn.functional.linear(h, hh, b_hh) if graph.h_gates else h[:, :0]
        new = graph.run(
            gates_x[place].split(hidden, -1),
            gates_h.split(hidden, -1) if graph.h_gates else (),
            states,
            own,
            flat[place, size:].split(hidden, -1) if graph.drives else (),
        )
        states = [torch.where(active, n, s) for n, s in zip(new, states, strict=True)]
        places.append(place[active[:, 0]])
        made.append(torch.cat(states, -1)[active[:, 0]])
    rows = torch.zeros(len(flat), graph.states * hidden, dtype=flat.dtype)
    rows = rows.index_copy(0, torch.cat(places), torch.cat(made))
    h, *behind = states
    last = [h, torch.cat(behind, -1)] if behind else [h]
    return rows[:, :hidden], last, rows[:, hidden:]


def _states(given, graph, d):
    h, *behind = (*given, None)
    if h is None:
        return None
    hidden = h.shape[-1]
    found = [h[d], *(part for c in behind if c is not None for part in c[d].split(hidden, -1))]
    assert len(found) == graph.states
    return found
