"""What is measured beside ours: each peer turns a case into a call.

A peer's `prepare` returns a call that takes nothing and returns the output sequence, or a cell's
next state, as an array; or None where the peer has no such layer.

Legend: T steps, B batch, I input, H hidden, G gates, D directions.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from cases import Case
from torch.nn.utils.rnn import PackedSequence

Call = Callable[[], Any]

# torch's gates in ONNX's order: r z n -> z r n, and i f g o -> i o f g.
_GATE_ORDER = {"RNN": [0], "GRU": [1, 0, 2], "LSTM": [0, 3, 1, 2]}


def result(output: Any) -> torch.Tensor:
    """The tensor that stands for a module's output: the sequence, or a cell's next h."""
    if isinstance(output, tuple) and not isinstance(output, PackedSequence):
        output = output[0]
    return output.data if isinstance(output, PackedSequence) else output


def module_call(module: torch.nn.Module, x: Any, train: bool) -> Call:
    """A call of a torch module: inference, or a training step."""
    if not train:
        return lambda: result(module(x))

    def step() -> torch.Tensor:
        for parameter in module.parameters():
            parameter.grad = None
        output = result(module(x))
        output.sum().backward()
        return output

    return step


class TorchCompile:
    """The torch module through torch.compile: cells only, since layers break the graph."""

    name = "torch.compile"

    def __init__(self, threads: int) -> None:
        self.version = torch.__version__

    def prepare(self, case: Case, module: torch.nn.Module, x: Any) -> Call | None:
        if not (case.is_cell and case.batch == 1 and case.hidden in (64, 256)):
            return None
        torch._dynamo.reset()
        return module_call(torch.compile(module, fullgraph=True), x, case.train)


class OnnxRuntime:
    """ONNX Runtime, one GRU, LSTM or RNN node per layer."""

    name = "ONNX Runtime"

    def __init__(self, threads: int) -> None:
        import onnxruntime

        self.version = onnxruntime.__version__
        self.runtime = onnxruntime
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads = threads
        self.options.inter_op_num_threads = 1

    def prepare(self, case: Case, module: torch.nn.Module, x: Any) -> Call | None:
        if case.train or case.is_cell or case.bfloat16:
            return None
        model = onnx_model(case, module)
        session = self.runtime.InferenceSession(model, self.options, ["CPUExecutionProvider"])
        inputs = {"x": x.numpy()}
        return lambda: session.run(None, inputs)[0]


class OpenVino:
    """OpenVINO on the same ONNX model, in float32, tuned for latency."""

    name = "OpenVINO"

    def __init__(self, threads: int) -> None:
        import openvino

        self.version = openvino.__version__.partition("-")[0]
        self.core = openvino.Core()
        self.options = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }

    def prepare(self, case: Case, module: torch.nn.Module, x: Any) -> Call | None:
        if case.train or case.is_cell or case.bfloat16:
            return None
        model = self.core.read_model(onnx_model(case, module))
        request = self.core.compile_model(model, "CPU", self.options).create_infer_request()
        array = x.numpy()
        return lambda: request.infer([array], share_inputs=True, share_outputs=True)[0]


def all_peers(threads: int) -> list[Any]:
    """Every peer that is installed."""
    peers: list[Any] = [TorchCompile(threads)]
    if find_spec("onnxruntime") and find_spec("onnx"):
        peers.append(OnnxRuntime(threads))
    if find_spec("openvino") and find_spec("onnx"):
        peers.append(OpenVino(threads))
    return peers


def onnx_model(case: Case, module: torch.nn.Module) -> bytes:
    """The module as an ONNX model (T, B, I) -> (T, D, B, H), or (T, B, D * H) when stacked."""
    from onnx import TensorProto, helper, numpy_helper

    H, D = case.hidden, 2 if case.bidirectional else 1
    order = _GATE_ORDER[case.layer]
    nodes, constants = [], []

    def constant(name: str, array: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def gates(array: torch.Tensor) -> np.ndarray:
        parts = array.detach().numpy().reshape(len(order), H, *array.shape[1:])
        return parts[order].reshape(array.shape)

    constant("flat", np.array([0, 0, -1], np.int64))
    before = "x"
    for k in range(case.layers):
        suffixes = [f"_l{k}", f"_l{k}_reverse"][:D]

        def stacked(name: str, suffixes: list[str] = suffixes) -> np.ndarray:
            return np.stack([gates(getattr(module, name + suffix)) for suffix in suffixes])

        biases = np.concatenate([stacked("bias_ih"), stacked("bias_hh")], axis=1)
        inputs = [
            before,
            constant(f"W{k}", stacked("weight_ih")),
            constant(f"R{k}", stacked("weight_hh")),
            constant(f"B{k}", biases),
        ]
        options: dict[str, Any] = {"hidden_size": H}
        options["direction"] = "bidirectional" if D == 2 else "forward"
        if case.layer == "GRU":
            options["linear_before_reset"] = 1
        nodes.append(helper.make_node(case.layer, inputs, [f"y{k}"], **options))
        before = f"y{k}"
        if case.layers > 1:
            nodes.append(helper.make_node("Transpose", [before], [f"t{k}"], perm=[0, 2, 1, 3]))
            nodes.append(helper.make_node("Reshape", [f"t{k}", "flat"], [f"z{k}"]))
            before = f"z{k}"
    shape = (case.steps, case.batch, case.input)
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(before, TensorProto.FLOAT, None)],
        constants,
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def as_sequence(output: Any, case: Case) -> torch.Tensor:
    """A peer's output as torch gives it: (T, B, D * H)."""
    tensor = torch.as_tensor(np.array(output) if not isinstance(output, torch.Tensor) else output)
    if tensor.dim() == 4:
        tensor = tensor.transpose(1, 2).reshape(case.steps, case.batch, -1)
    return tensor
