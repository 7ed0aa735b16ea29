"""ONNX models cut at their recurrent nodes: ONNX Runtime for what lies around, streams for these.

Legend: T steps, I input, H hidden. A model has one sequence: of the two dimensions that count steps
and rows one is 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper

from ostinato import Stream
from ostinato.convert import from_onnx

Array = npt.NDArray[np.float32]

RECURRENT = "RNN", "GRU", "LSTM"
# What may lie between two layers of a stack: numbers stay in their order.
LAYOUT = "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"


def numbers_of(name: str) -> dict[str, str]:
    """Return a stream's options for a name: its dtype, perhaps a slash and `activations`."""
    return dict(zip(("dtype", "activations"), name.split("/"), strict=False))


def session_of(model: onnx.ModelProto, threads: int) -> onnxruntime.InferenceSession:
    """Make a session of ONNX Runtime with so many threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def recurrent_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the nodes that hold a state, in the order in which they run."""
    return [node for node in model.graph.node if node.op_type in RECURRENT]


def between(
    model: onnx.ModelProto, known: Iterable[str], wanted: str
) -> tuple[list[onnx.NodeProto], list[str]]:
    """Return the nodes that compute a value of the graph, and what they read of what is known."""
    makers = {name: node for node in model.graph.node for name in node.output if name}
    constants = {tensor.name for tensor in model.graph.initializer} | {""}
    known, read, found, open_names = set(known), {}, set(), [wanted]
    while open_names:
        name = open_names.pop()
        if name in known:
            read[name] = None
        elif name not in constants:
            if name not in makers:
                raise ValueError(f"{wanted}: expected it to depend on {known}, but it needs {name}")
            node = makers[name]
            if id(node) not in found:
                found.add(id(node))
                open_names += node.input
    return [node for node in model.graph.node if id(node) in found], list(read)


def part_of(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    read: Sequence[str],
    wanted: Sequence[str],
) -> onnx.ModelProto:
    """Return some nodes of a model as a model, from what they read to what is wanted of them."""
    names = {name for node in nodes for name in node.input}
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in each]
        for each in (read, wanted)
    )
    constants = [tensor for tensor in model.graph.initializer if tensor.name in names]
    graph = helper.make_graph(nodes, "part", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def with_states(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Return a model whose states go in and come out, and their names: out by in.

    A recurrent node without `initial_h` begins at zeros, so such a model alone cannot go on where
    another call has ended.
    """
    other = onnx.ModelProto()
    other.CopyFrom(model)
    names: dict[str, str] = {}
    for k, node in enumerate(recurrent_nodes(other)):
        states = ("h", "c") if node.op_type == "LSTM" else ("h",)
        # X, W, R, B, sequence_lens, initial_h, initial_c; Y, Y_h, Y_c
        node.input.extend([""] * (5 + len(states) - len(node.input)))
        node.output.extend([""] * (1 + len(states) - len(node.output)))
        hidden = next(each.i for each in node.attribute if each.name == "hidden_size")
        for place, state in enumerate(states):
            before, after = f"{state}{k}_before", node.output[1 + place] or f"{state}{k}_after"
            node.input[5 + place], node.output[1 + place] = before, after
            names[before] = after
            for values, name in ((other.graph.input, before), (other.graph.output, after)):
                value = helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, hidden])
                values.append(value)
    return other, names


def layers_alone(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return what lies from the input of the first recurrent node to the output of the last one."""
    other = onnx.ModelProto()
    other.CopyFrom(model)
    for node in recurrent_nodes(other):
        del node.input[5:]
    first, *_, last = recurrent_nodes(other) * 2
    nodes, read = between(other, [first.input[0]], last.output[0])
    return part_of(other, nodes, read, [last.output[0]])


class Peer:
    """A model as it is, in ONNX Runtime, with the states that go from call to call.

    Args:
        model: from one input to one output, beside the states.
        states: the name of each state that comes out by the name under which it goes in.
        threads: of ONNX Runtime.
    """

    def __init__(self, model: onnx.ModelProto, states: dict[str, str], threads: int) -> None:
        self.session, self.threads = session_of(model, threads), threads
        self.states = states
        self.input = next(
            each.name for each in self.session.get_inputs() if each.name not in states
        )
        output = next(
            each.name for each in self.session.get_outputs() if each.name not in states.values()
        )
        self.outputs = [output, *states.values()]
        self.zeros = {
            each.name: np.zeros(each.shape, np.float32)
            for each in self.session.get_inputs()
            if each.name in states
        }
        self.reset()

    def reset(self) -> None:
        """Begin anew, from zeros."""
        self.feeds: dict[str, Any] = dict(self.zeros)

    def __call__(self, x: Array) -> Array:
        """Take the next steps."""
        self.feeds[self.input] = x
        y, *states = self.session.run(self.outputs, self.feeds)
        self.feeds.update(zip(self.states, states, strict=True))
        return y


class Stack(NamedTuple):
    """Recurrent layers of a graph, of which each reads the one before it."""

    # Of the graph's values: the sequence that goes in, and Y and perhaps Y_h that come out.
    reads: str
    makes: tuple[str, ...]
    kind: str
    # Under torch's names, for a stream.
    weights: dict[str, Any]


def stacks_of(model: onnx.ModelProto, output: str) -> list[Stack]:
    """Return the recurrent nodes that a value of the graph depends on, in the order of their runs.

    Nodes with nothing but a change of layout between them are one stack.
    """
    found: list[list[onnx.NodeProto]] = []
    for node in between(model, [each.name for each in model.graph.input], output)[0]:
        if node.op_type not in RECURRENT:
            continue
        if found and _is_stacked(model, found[-1][-1], node):
            found[-1].append(node)
        else:
            found.append([node])
    return [
        Stack(
            nodes[0].input[0],
            tuple(nodes[-1].output[:2]),
            nodes[0].op_type.lower(),
            from_onnx(nodes, model.graph.initializer),
        )
        for nodes in found
    ]


def _is_stacked(model: onnx.ModelProto, first: onnx.NodeProto, second: onnx.NodeProto) -> bool:
    """Return whether a node reads the sequence of another one, and nothing is computed between."""
    try:
        nodes, _ = between(model, [first.output[0]], second.input[0])
    except ValueError:
        return False
    same = first.op_type == second.op_type and len(first.attribute) == len(second.attribute)
    return same and all(node.op_type in LAYOUT for node in nodes)


class Cut:
    """A model whose recurrent layers are streams; ONNX Runtime runs all else.

    Args:
        model: from one input to its first output. What else goes in are states.
        threads: of ONNX Runtime; a stream has those of torch.
        dtype: of the streams (`numbers_of`).
        stacks: its recurrent layers; None for its recurrent nodes.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        threads: int,
        dtype: str,
        stacks: Sequence[Stack] | None = None,
    ) -> None:
        self.input, self.output = model.graph.input[0].name, model.graph.output[0].name
        self.stacks = stacks_of(model, self.output) if stacks is None else stacks
        self.streams = [
            Stream(each.kind, each.weights, **numbers_of(dtype)) for each in self.stacks
        ]
        # What is computed before each stack and after the last one. What a later part reads again
        # is kept.
        known = {self.input}
        kept: set[str] = set()
        parts = []
        for k, wanted in enumerate([*(each.reads for each in self.stacks), self.output]):
            nodes, read = between(model, known, wanted)
            parts.append((nodes, read, wanted))
            kept.update(read)
            known |= {name for node in nodes for name in node.output}
            if k < len(self.stacks):
                known |= {name for name in self.stacks[k].makes if name}
        self.parts = []
        for nodes, read, wanted in parts:
            made = {name for node in nodes for name in node.output}
            names = [wanted, *sorted(kept & made - {wanted})]
            session = session_of(part_of(model, nodes, read, names), threads) if nodes else None
            self.parts.append((session, read, names))

    def reset(self) -> None:
        """Begin anew, from zeros."""
        for stream in self.streams:
            stream.reset()

    def __call__(self, x: Array) -> Array:
        """Take the next steps."""
        values = {self.input: x}
        for k, (session, read, names) in enumerate(self.parts):
            if session is not None:
                made = session.run(names, {name: values[name] for name in read})
                values.update(zip(names, made, strict=True))
            if k == len(self.streams):
                break
            steps = values[self.stacks[k].reads]
            y = self.streams[k](steps.reshape(-1, steps.shape[-1]))
            # (T, D, B, H), and Y_h (D, B, H): whoever reads that one has one row, or one step.
            y = y.reshape(steps.shape[0], 1, -1, y.shape[-1])
            values.update(zip(self.stacks[k].makes, (y, y[-1]), strict=False))
        return values[self.output]
