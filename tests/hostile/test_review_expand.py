"""Operators with graphs, and what calls and graphs cost: what a review of the expansion found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import NodeProto, TensorProto, helper

from onnx_clp import Limits, ModelFileError, scan
from tests.hostile import costly


def written(made: onnx.ModelProto | bytes, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
    return path


def info(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


def subgraph(nodes: list[NodeProto], output: str, inputs: tuple[str, ...] = ()) -> onnx.GraphProto:
    return helper.make_graph(nodes, "inner", [info(name) for name in inputs], [info(output)])


EMPTY = helper.make_graph([], "empty", [], [])


def with_graph(op: str, inputs: list[str], output: str, graph: onnx.GraphProto = EMPTY, domain: str = "") -> NodeProto:
    """A node with an attribute that is a graph."""
    return helper.make_node(op, inputs, [output], name=output, domain=domain, g=graph)


def model(nodes: list[NodeProto], *initializers: TensorProto) -> onnx.ModelProto:
    made = costly.model(nodes, [costly.KERNEL, costly.ONES, *initializers])
    made.opset_import.append(helper.make_opsetid("evil", 1))
    return made


# ---- operators with graphs


@pytest.mark.parametrize("op", ["MyConv", "Conv", "BatchNormalization"])
def test_an_operator_of_another_domain_with_a_graph_is_skipped_and_said(op: str, tmp_path: Path) -> None:
    inputs = ["r", "w"] if "Conv" in op else ["r", "ones", "ones", "ones", "ones"]
    nodes = [
        costly.conv("x", "c"),
        helper.make_node("Relu", ["c"], ["r"]),
        with_graph(op, inputs, "d", domain="evil"),
        helper.make_node("Relu", ["d"], ["e"]),
        costly.conv("e", "y"),
    ]
    report = scan(written(model(nodes), tmp_path))
    skipped = {part.name: (part.operator, part.reason) for part in report.skipped}
    assert skipped["d"] == (f"evil.{op}", "custom-operator")
    assert "d" not in {layer.name for layer in report.layers}
    assert not report.complete


def test_a_weight_out_of_an_identity_of_another_domain_with_a_graph_is_not_known(tmp_path: Path) -> None:
    nodes = [
        with_graph("Identity", ["w"], "v", domain="evil"),
        costly.conv("x", "c", "v"),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    report = scan(written(model(nodes), tmp_path))
    assert [(part.name, part.reason) for part in report.skipped] == [("c", "custom-operator")]


@pytest.mark.parametrize("op", ["Conv", "BatchNormalization"])
def test_a_standard_operator_with_a_graph_beside_is_judged(op: str, tmp_path: Path) -> None:
    inputs = ["r", "w"] if op == "Conv" else ["r", "ones", "ones", "ones", "ones"]
    nodes = [
        costly.conv("x", "r"),
        with_graph(op, inputs, "d"),
        helper.make_node("Relu", ["d"], ["y"]),
    ]
    assert "d" in {layer.name for layer in scan(written(model(nodes), tmp_path)).layers}


@pytest.mark.parametrize(("op", "domain"), [("Foreign", "evil"), ("If", "evil"), ("Add", ""), ("Conv", "")])
def test_what_the_graph_of_another_operator_holds_and_reads_is_judged(op: str, domain: str, tmp_path: Path) -> None:
    """No runtime need leave the results of such a graph alone, so nothing that they depend on is unused."""
    inner = subgraph([costly.conv("outer", "inner"), costly.conv("given", "other")], "inner", ("given",))
    second = "w" if op == "Conv" else "ones"
    nodes = [
        costly.conv("x", "outer"),
        with_graph(op, ["x", second], "d", inner, domain),
        helper.make_node("Relu", ["d"], ["y"]),
    ]
    report = scan(written(model(nodes), tmp_path))
    assert {layer.name for layer in report.layers} >= {"outer", "d/g/inner"}
    assert ("d/g/other", "unused") in {(part.name, part.reason) for part in report.skipped}


def test_a_result_of_a_graph_that_is_read_by_a_standard_operator_alone_ends_its_tail(tmp_path: Path) -> None:
    """An Add that has the value in its graph and among no inputs adds nothing to it."""
    nodes = [costly.conv("x", "c"), with_graph("Add", ["x", "ones"], "y", subgraph([], "c"))]
    assert [layer.name for layer in scan(written(model(nodes), tmp_path)).layers] == ["c"]


# ---- what decides


def decided_by(value: str) -> list[NodeProto]:
    """A convolution of x, pooled and compared: whether ``value`` is so."""
    return [
        costly.conv("x", "seen"),
        helper.make_node("ReduceMax", ["seen"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "zero"], [value]),
    ]


ZERO = helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0])
TWICE = helper.make_tensor("twice", TensorProto.INT64, [], [2])


def looping(times: str, first: str, inner: list[NodeProto], last: str) -> NodeProto:
    body = helper.make_graph(
        [*inner, helper.make_node("Relu", ["state"], ["next"])],
        "body",
        [info("i"), info("going"), info("state")],
        [info(last), info("next")],
    )
    return helper.make_node("Loop", [times, first, "x"], ["y"], name="loop", body=body)


DECIDED = {
    "if": lambda: [
        *decided_by("is"),
        helper.make_node(
            "If",
            ["is"],
            ["y"],
            then_branch=subgraph([helper.make_node("Relu", ["x"], ["a"])], "a"),
            else_branch=subgraph([helper.make_node("Neg", ["x"], ["b"])], "b"),
        ),
    ],
    "loop, whether it begins": lambda: [*decided_by("is"), looping("twice", "is", [], "going")],
    "loop, how often": lambda: [
        *decided_by("is"),
        helper.make_node("Cast", ["is"], ["times"], to=TensorProto.INT64),
        looping("times", "", [], "going"),
    ],
    "loop, whether it goes on": lambda: [looping("twice", "", decided_by("is"), "is")],
}


@pytest.mark.parametrize("case", DECIDED)
def test_what_decides_what_runs_is_not_unused(case: str, tmp_path: Path) -> None:
    report = scan(written(model(DECIDED[case](), ZERO, TWICE), tmp_path))
    assert [layer.name.rpartition("/")[2] for layer in report.layers] == ["seen"]
    assert not report.skipped


# ---- depth


def deep(functions: int, ifs: int) -> onnx.ModelProto:
    """Functions of which each calls the next within Ifs within each other."""
    bodies = []
    for i in range(functions):
        kind, domain = ("Relu", "") if i == functions - 1 else (f"f{i + 1}", "d")
        node = helper.make_node(kind, ["a"], ["b"], domain=domain)
        for _ in range(ifs):
            node = helper.make_node("If", ["a"], ["b"], then_branch=subgraph([node], "b"))
        bodies.append(costly.function(f"f{i}", [node]))
    nodes = [costly.conv("x", "c"), helper.make_node("f0", ["c"], ["v"], domain="d"), costly.conv("v", "y")]
    return costly.model(nodes, [costly.KERNEL], bodies)


@pytest.mark.parametrize(("functions", "ifs"), [(51, 20), (50, 2), (10, 10)])
def test_calls_within_graphs_within_calls_are_refused_where_they_are_too_deep(
    functions: int, ifs: int, tmp_path: Path
) -> None:
    with pytest.raises(ModelFileError, match="calls and graphs within each other 100 deep"):
        scan(written(deep(functions, ifs), tmp_path))


@pytest.mark.parametrize(("functions", "ifs"), [(4, 24), (50, 1), (60, 0)])
def test_calls_and_graphs_just_as_deep_as_they_may_be_are_read(functions: int, ifs: int, tmp_path: Path) -> None:
    assert [layer.name for layer in scan(written(deep(functions, ifs), tmp_path)).layers] == ["c"]


# ---- how much a call or a link holds


def names(count: int) -> list[str]:
    return [f"n{i}" for i in range(count)]


def many_outputs_of_many_graphs() -> onnx.ModelProto:
    node = helper.make_node("If", ["x"], ["y", *names(2000)], g=[EMPTY] * 2000)
    return costly.model([costly.conv("x", "c"), node], [costly.KERNEL])


def called_often(body: NodeProto, calls: int = 200) -> onnx.ModelProto:
    """A function that holds ``body`` is called often."""
    nodes = [helper.make_node("f", ["x"], [f"v{i}"], domain="d") for i in range(calls)]
    return costly.model([*nodes, costly.conv("v0", "y")], [costly.KERNEL], [costly.function("f", [body])])


def with_attributes() -> NodeProto:
    node = helper.make_node("X", ["a"], ["b"], domain="evil")
    for _ in range(5000):
        node.attribute.add()
    return node


def with_results_in_a_graph() -> NodeProto:
    node = helper.make_node("If", ["a"], ["b"])
    node.attribute.append(helper.make_attribute("g", helper.make_graph([], "g", [], [onnx.ValueInfoProto()] * 5000)))
    return node


COSTLY: dict[str, Callable[[], onnx.ModelProto]] = {
    "outputs of graphs": many_outputs_of_many_graphs,
    "outputs": lambda: called_often(helper.make_node("X", ["a"], ["b", *names(5000)], domain="evil")),
    "inputs": lambda: called_often(helper.make_node("X", ["a"] * 5000, ["b"], domain="evil")),
    "attributes": lambda: called_often(with_attributes()),
    "outputs of a graph": lambda: called_often(with_results_in_a_graph()),
    "graphs": lambda: called_often(helper.make_node("If", ["a"], ["b"], g=[EMPTY] * 1000)),
}


@pytest.mark.parametrize("case", COSTLY)
def test_what_each_call_and_each_graph_holds_counts(case: str, tmp_path: Path) -> None:
    """Each would be within the limit by its nodes and bytes alone."""
    path = written(COSTLY[case](), tmp_path)
    with pytest.raises(ModelFileError, match="has more than 50,000 nodes and tensors, with every call"):
        scan(path, limits=Limits(nodes=50_000))


def test_many_inputs_and_outputs_without_many_calls_are_read(tmp_path: Path) -> None:
    nodes = [costly.conv("x", "c"), helper.make_node("X", ["c"] * 20_000, ["v", *names(20_000)], domain="evil")]
    report = scan(written(model([*nodes, with_graph("X", ["v"] * 20_000, "u"), costly.conv("v", "y")]), tmp_path))
    assert [layer.name for layer in report.layers] == ["c"]
