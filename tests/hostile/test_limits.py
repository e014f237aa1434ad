"""Memory and time of a scan are bounded by what is on disk: small files that ask for much, and long ones.

Time is not measured. That a walk is linear is seen from the number of calls of functions, which is the same on
every machine; that memory is bounded, from a limit on the address space of a process of its own.
"""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import DTypeLike
from onnx import numpy_helper

from onnx_clp import Layer, Limits, ModelFileError, OnnxClpError, UsageError, sanitize, scan
from onnx_clp.cli import run
from onnx_clp.errors import PayloadError
from onnx_clp.heads import _Walk
from onnx_clp.limits import MEMORY_PER_BYTE, WORK_PER_BYTE, Meter
from onnx_clp.model.constants import Constants, Derived
from onnx_clp.model.edits import length_delimited
from onnx_clp.model.expand import build_graph
from onnx_clp.model.file import open_model
from onnx_clp.model.graph import Node
from onnx_clp.model.tensors import Array
from onnx_clp.shapes import shapes
from tests.hostile import costly
from tests.hostile.counting import calls

MEMORY = 512 << 20
"""Bytes that a scan of any of these files may take beside what Python takes with its modules."""

SECONDS = 60
"""Of the processor, for a file that takes less than five: so much no walk takes that is linear."""


@pytest.fixture(autouse=True)
def metered() -> None:
    """Where steps are not counted, these tests would not end: each fails at once instead."""
    with pytest.raises(PayloadError):
        Meter(Limits(work=1)).touch(1)


def written(made: onnx.ModelProto | bytes, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
    return path


BOUNDED = """
import resource, sys
from onnx_clp import Limits, OnnxClpError, sanitize, scan
import onnx_clp.analysis, onnx_clp.rewrite, onnx_clp.runtime
onnx_clp.runtime.available = lambda: False
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
before = peak()
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # that a test does not take the machine's memory
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[2]), int(sys.argv[2])))
less = Limits(work=1 << 31)  # an eighth of what it is otherwise, so that a test takes less
for work in (scan, lambda path, limits: sanitize(path, path + ".out", max_share=1, limits=limits)):
    try:
        work(sys.argv[1], limits=less)
    except OnnxClpError as error:
        print(error, file=sys.stderr)
print(peak() - before)
"""


def bounded(path: Path) -> str:
    """What a scan and a rewrite complain of in a process of their own; it fails where they take too much."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BOUNDED, path, str(SECONDS)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < MEMORY
    return done.stderr


# ---- small files that ask for much

SMALL_FILES: dict[str, Callable[[], onnx.ModelProto]] = {
    "a_constant_doubled_20_times": lambda: costly.doubled_constant(20),
    "a_constant_doubled_60_times": lambda: costly.doubled_constant(60),
    "channels_doubled_22_times": lambda: costly.doubled_channels(22),
    "channels_doubled_40_times": lambda: costly.doubled_channels(40),
    "channels_doubled_10000_times": lambda: costly.doubled_channels(10_000),
    "a_fill_of_2_to_the_39": lambda: costly.filled([1 << 18, 1 << 18, 2, 4]),
    "a_fill_of_2_to_the_24_in_300_convolutions": lambda: costly.filled([1 << 10, 1 << 14, 1, 1], 300),
    "a_matrix_of_side_4096": lambda: costly.filled([2, 1 << 12, 1 << 12, 1]),
    "a_matrix_of_side_20000": lambda: costly.filled([1, 20_000, 20_000, 1]),
    "a_few_numbers_expanded": lambda: costly.expanded(100),
    "one_number_gathered": lambda: costly.gathered(100),
    "a_shape_of_2_to_the_30_without_data": lambda: costly.declared(1 << 30),
    "a_few_of_2_to_the_21_numbers_100_times": lambda: costly.parts_of_sums(100, 1 << 17),
    "a_sparse_kernel_in_200_convolutions": lambda: costly.sparse(200),
    "a_scale_for_a_block_of_2_to_the_40": lambda: costly.blocked(1 << 40),
    "bounds_of_a_million_channels_300_times": lambda: costly.many_wide(300, 100_000),
    "a_name_of_a_megabyte_in_10000_calls": lambda: costly.long_names(1_000_000, 10_000),
    "a_name_of_a_megabyte_around_10000_nodes": lambda: costly.long_named_if(1_000_000, 10_000),
}


REFUSED = {"a_name_of_a_megabyte_in_10000_calls"}
"""Cases that are an error as a whole; of the others a part is skipped."""


@pytest.mark.parametrize("case", SMALL_FILES)
def test_a_file_gets_no_more_memory_than_it_is_worth(case: str, tmp_path: Path) -> None:
    assert ("nodes and tensors" in bounded(written(SMALL_FILES[case](), tmp_path))) == (case in REFUSED)


@pytest.mark.parametrize(
    ("case", "layers"),
    [
        ("a_constant_doubled_20_times", {"y": "head", "judged": "limit"}),
        ("a_matrix_of_side_4096", {"y": "head", "c0": "limit"}),
        ("a_few_numbers_expanded", {"y": "head", **{f"c{i}": "limit" for i in range(100)}}),
        ("a_shape_of_2_to_the_30_without_data", {"first": "no-data"}),
        ("a_scale_for_a_block_of_2_to_the_40", {"y": "head", "c": "unreadable"}),
    ],
)
def test_what_costs_too_much_is_skipped_and_not_clean(case: str, layers: dict[str, str], tmp_path: Path) -> None:
    report = scan(written(SMALL_FILES[case](), tmp_path))
    assert {part.name: part.reason for part in report.skipped} == layers
    assert not report.complete


def test_what_comes_before_the_limit_is_judged_and_the_rest_said_to_be_skipped(tmp_path: Path) -> None:
    report = scan(written(costly.filled([1 << 10, 1 << 14, 1, 1], 400), tmp_path))
    skipped = [part.name for part in report.skipped if part.reason == "limit"]
    assert [layer.name for layer in report.layers] + skipped == [f"c{i}" for i in range(400)]
    assert report.layers
    assert skipped


def test_what_is_refused_keeps_nothing_of_the_scan_in_memory(tmp_path: Path) -> None:
    """An error that is kept as a value would hold the frames it came through, and those the report, in a circle."""
    path = written(costly.many_wide(300, 100_000), tmp_path)
    gc.collect()
    gc.disable()
    try:
        before = sum(type(kept) is Layer for kept in gc.get_objects())
        assert any(part.reason == "limit" for part in scan(path).skipped)
        assert sum(type(kept) is Layer for kept in gc.get_objects()) == before
    finally:
        gc.enable()


def test_what_is_refused_takes_nothing_from_the_layers_after_it(tmp_path: Path) -> None:
    """A kernel that costs too much, before and behind layers whose bias is read when they are measured."""
    nodes, value = [onnx.helper.make_node("ConstantOfShape", ["shape"], ["huge"])], "x"
    for name, weight in (("before", "w"), ("decoy", "huge"), ("behind", "w")):
        nodes.append(onnx.helper.make_node("Conv", [value, weight, "ones"], [name], name=name))
        nodes.append(onnx.helper.make_node("Relu", [name], [f"{name}_relu"]))
        value = f"{name}_relu"
    shape = costly.numbers("shape", 16, 1 << 12, 1 << 12, 1)
    made = costly.model([*nodes, costly.conv(value, "y")], [costly.KERNEL, costly.ONES, shape])
    report = scan(written(made, tmp_path))
    assert [layer.name for layer in report.layers] == ["before", "behind"]
    assert {part.name: part.reason for part in report.skipped} == {"decoy": "limit", "y": "head"}


def test_a_copy_that_is_given_more_than_its_input_is_verified(tmp_path: Path) -> None:
    """One data file under three names: the copy has it three times, and what was beyond the limit is so no more."""
    kernel = np.random.default_rng(0).standard_normal((1, 600, 600, 1)).astype(np.float32)  # dear for its size
    (tmp_path / "w0.bin").write_bytes(kernel.tobytes())
    nodes, tensors, value = [], [], "x"
    for i in range(3):
        if i:
            (tmp_path / f"w{i}.bin").symlink_to("w0.bin")
        tensor = onnx.TensorProto(name=f"k{i}", data_type=1, dims=kernel.shape, data_location=onnx.TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=f"w{i}.bin")
        tensors.append(tensor)
        nodes += [costly.conv(value, f"c{i}", f"k{i}"), onnx.helper.make_node("Relu", [f"c{i}"], [f"r{i}"])]
        value = f"r{i}"
    path = written(costly.model([*nodes, costly.conv(value, "y")], [costly.KERNEL, *tensors]), tmp_path)
    few = Limits(work=1)
    assert "limit" in {part.reason for part in scan(path, limits=few).skipped}
    report = sanitize(path, tmp_path / "out.onnx", limits=few)
    assert report.after is not None
    assert "limit" not in {part.reason for part in report.after.skipped}


def test_powers_cost_more_than_sums(tmp_path: Path) -> None:
    """They read small constants as they are met, so that the steps are many where they are cheap."""
    few = Limits(work=1 << 30)
    path = written(costly.powers(1000), tmp_path)
    assert {part.name: part.reason for part in scan(path, limits=few).skipped} == {"y": "head", "powered": "limit"}
    made = costly.powers(1000)
    for node in made.graph.node:
        node.op_type = "Mul" if node.op_type == "Pow" else node.op_type
    assert [layer.name for layer in scan(written(made, tmp_path), limits=few).layers] == ["powered"]


@pytest.mark.parametrize(
    "made",
    [*(costly.expanded_beside(10, op_type, 64) for op_type in ("Add", "Sub")), costly.enlarged(10, 64)],
    ids=["Add", "Sub", "ConvTranspose"],
)
def test_a_number_that_stands_for_many_is_paid_for_wherever_it_is_read(
    made: onnx.ModelProto, tmp_path: Path, touched: list[int]
) -> None:
    scan(written(made, tmp_path))
    assert sum(elements >= costly.CHANNELS * 64 * 64 for elements in touched) >= 10


def test_dear_arithmetic_is_paid_for(tmp_path: Path, touched: list[int]) -> None:
    """What else a scan of it touches, the same for each, is why the ratios are below 16 and 256."""

    def cost(op_type: str, dtype: DTypeLike) -> int:
        made = costly.powers(1)
        made.graph.node[0].op_type = op_type
        del made.graph.initializer[1:]
        constant = np.ones((256, costly.CHANNELS, 1, 1), dtype)
        made.graph.initializer.extend(numpy_helper.from_array(constant, name) for name in ("base", "exponent"))
        touched.clear()
        scan(written(made, tmp_path))
        return sum(touched)

    assert cost("Div", np.int64) > 2 * cost("Sub", np.int64)
    assert cost("Sub", np.float16) > 2 * cost("Sub", np.float32)
    assert cost("Pow", np.float32) > 20 * cost("Sub", np.float32)


QUANTISE = onnx.helper.make_node("QuantizeLinear", ["large", "half"], ["k0"])
TRANSPOSED = onnx.helper.make_node("Transpose", ["sum"], ["turned"], perm=[1, 0, 2, 3])


@pytest.mark.parametrize(
    ("steps", "passes"),
    [
        # a quotient, rounded, looked through for NaN, cleared of infinity, cut to its limits: each converted
        ([QUANTISE], 8),
        # less the zero point, times the scale, of as many types
        ([QUANTISE, onnx.helper.make_node("DequantizeLinear", ["k0", "half"], ["d"])], 4),
        # a conversion of 16 bits takes as long as four of 32
        ([onnx.helper.make_node("Cast", ["large"], ["h"], to=onnx.TensorProto.FLOAT16)], 4),
        # numbers that do not lie one after the other come one by one
        ([onnx.helper.make_node("Gather", ["large", "rows"], ["g"])], 8),
        (
            [
                SUM := onnx.helper.make_node("Add", ["large", "large"], ["sum"]),
                TRANSPOSED,
                onnx.helper.make_node("Reshape", ["turned", "size"], ["k"]),
            ],
            8,
        ),
        (
            [
                SUM,
                TRANSPOSED,
                onnx.helper.make_node("Reshape", ["turned", "size"], ["k"]),
                onnx.helper.make_node("Neg", ["k"], ["n"]),
            ],
            1,
        ),
        # a root of a byte is one of 16 bits
        ([QUANTISE, onnx.helper.make_node("Sqrt", ["k0"], ["r"])], 16),
    ],
    ids=["quantise", "dequantise", "cast", "gather", "reshape", "neg", "root"],
)
def test_a_step_of_several_passes_is_paid_for_each(
    steps: list[onnx.NodeProto], passes: int, tmp_path: Path, touched: list[int]
) -> None:
    """What the last of ``steps`` costs, beside the same without it."""
    rows, costs = 1 << 10, []
    half = numpy_helper.from_array(np.array(0.5, np.float32), "half")
    tensors = [costly.KERNEL, half, costly.numbers("size", rows, costly.CHANNELS, 1, 1)]
    tensors += [numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "one"), costly.numbers("rows", *range(rows))]
    expand = onnx.helper.make_node("Expand", ["one", "size"], ["large"])
    for made in (steps[:-1], steps):
        last = made[-1].output[0] if made else "large"
        nodes = [expand, *made, costly.conv("x", "c", last), onnx.helper.make_node("Relu", ["c"], ["y"])]
        path = written(costly.model(nodes, tensors), tmp_path)
        touched.clear()
        scan(path)
        costs.append(sum(touched))
    assert costs[1] - costs[0] >= passes * rows * costly.CHANNELS


def test_a_chain_of_constants_holds_what_its_links_need_at_once(tmp_path: Path) -> None:
    """A link holds two arrays of 256 KiB and some on its way, the chain of 300 no more than that."""
    path = written(costly.computed("Add", 300, 1 << 12), tmp_path)
    few = Limits(memory=8 << 20)
    assert [layer.name for layer in scan(path, limits=few).layers] == ["c"]
    less = scan(path, limits=Limits(memory=1 << 19))
    assert {part.name: part.reason for part in less.skipped} == {"y": "head", "c": "limit"}


def test_what_is_needed_again_is_held_until_then(tmp_path: Path) -> None:
    """A hundred sums, which are all joined in the end: none can be given up before."""
    nodes = [onnx.helper.make_node("Expand", ["one", "size"], ["large"])]
    nodes += [onnx.helper.make_node("Add", ["large", "large"], [f"a{i}"]) for i in range(100)]
    nodes.append(onnx.helper.make_node("Concat", [f"a{i}" for i in range(100)], ["all"], axis=2))
    nodes.append(onnx.helper.make_node("Slice", ["all", "zero", "one_", "two"], ["k"]))
    nodes += [costly.conv("x", "c", "k"), onnx.helper.make_node("Relu", ["c"], ["y"])]
    one = numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "one")
    tensors = [costly.KERNEL, one, costly.numbers("size", 1 << 10, costly.CHANNELS, 1, 1)]
    tensors += [costly.numbers("zero", 0), costly.numbers("one_", 1), costly.numbers("two", 2)]
    path = written(costly.model(nodes, tensors), tmp_path)
    arrays = 100 * 4 * costly.CHANNELS << 10  # bytes of the sums; they are there once more, joined
    assert [part.reason for part in scan(path, limits=Limits(memory=arrays)).skipped] == ["limit"]
    assert [layer.name for layer in scan(path, limits=Limits(memory=4 * arrays)).layers] == ["c"]


def test_one_data_file_that_is_read_under_many_names_is_counted_for_each(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(1 << 20))
    tensors = [costly.KERNEL]
    for i in range(100):
        tensor = onnx.TensorProto(name=f"k{i}", data_type=1, dims=[1 << 14, 16, 1, 1])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="w.bin")
        tensors.append(tensor)
    nodes = [onnx.helper.make_node("Concat", [f"k{i}" for i in range(100)], ["all"], axis=0)]
    nodes.append(onnx.helper.make_node("Slice", ["all", "zero", "end"], ["k"]))
    nodes += [costly.conv("x", "c", "k"), onnx.helper.make_node("Relu", ["c"], ["y"])]
    tensors += [costly.numbers("zero", 0), costly.numbers("end", 16)]
    path = written(costly.model(nodes, tensors), tmp_path)
    # The joined array may take 8 bytes for a number, which are 4 here: what is left is less than the parts take.
    assert [part.reason for part in scan(path, limits=Limits(memory=190 << 20)).skipped] == ["limit"]


def test_more_work_and_memory_can_be_given(tmp_path: Path) -> None:
    path = written(costly.doubled_constant(18), tmp_path)
    few = scan(path, limits=Limits(memory=1 << 20))
    assert {part.name: part.reason for part in few.skipped} == {"y": "head", "judged": "limit"}
    assert [layer.name for layer in scan(path, limits=Limits(memory=1 << 32, work=1 << 40)).layers] == ["judged"]


def test_a_large_file_may_cost_more_than_a_small_one() -> None:
    small, large = Meter(Limits(work=1000, memory=1000)), Meter(Limits(work=1000, memory=1000))
    large.grant(10)
    for meter, work, memory in ((small, 1000, 1000), (large, 1000 + 10 * WORK_PER_BYTE, 1000 + 10 * MEMORY_PER_BYTE)):
        meter.work(work)
        meter.hold(memory)
        for spend in (meter.work, meter.hold, meter.fits):
            with pytest.raises(PayloadError) as refused:
                spend(1)
            assert refused.value.reason == "limit"


def test_a_limit_that_is_none_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the limit nodes is 0"):
        Limits(nodes=0)
    path = str(written(costly.filled([16, 16, 1, 1]), tmp_path))
    for value in (
        "nodes=0.5",
        "seconds=1e99",
        "nodes=0",
        "nodes=-1",
        "nodes=many",
        "nodes=1e400",
        "nodes",
        "time=1",
        "=1",
    ):
        assert run(["scan", path, "--limit", value]) == 2, value
        assert "Traceback" not in capsys.readouterr().err


def test_the_command_takes_limits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(written(costly.CHAINS["Relu"](100), tmp_path))
    assert run(["scan", path, "--limit", "nodes=50"]) == 2
    assert "more than 50 nodes and tensors (if that is what it should have, raise the limit: --limit nodes=500)" in (
        capsys.readouterr().err
    )
    assert run(["scan", path, "--limit", "nodes=2e3", "--limit", "work=1e9"]) == 0


def test_a_rewrite_that_would_hold_too_much_leaves_the_layer(tmp_path: Path) -> None:
    """One kernel in a hundred layers, each of which would get a silent copy of its own."""
    nodes, value = [], "x"
    kernel = np.random.default_rng(0).standard_normal((16, 16, 64, 64)).astype("f")
    kernel[3] *= 50
    for i in range(100):
        nodes += [costly.conv(value, f"c{i}", "k"), onnx.helper.make_node("Relu", [f"c{i}"], [f"r{i}"])]
        value = f"r{i}"
    nodes += [
        onnx.helper.make_node("Mul", ["k", "k"], ["square"]),
        onnx.helper.make_node("Add", ["z", "square"], ["y"]),
    ]
    nodes.insert(-2, costly.conv(value, "z"))
    path = written(costly.model(nodes, [costly.KERNEL, onnx.numpy_helper.from_array(kernel, "k")]), tmp_path)
    with contextlib.suppress(OnnxClpError):
        report = sanitize(path, tmp_path / "out.onnx", dry_run=True, limits=Limits(memory=1, work=1 << 40))
        assert len(report.silenced) + len(report.left) == 100


# ---- long and deep graphs


LONG: dict[str, Callable[[int], onnx.ModelProto]] = {
    **{f"chain_of_{operator}": build for operator, build in costly.CHAINS.items()},
    "normalised_at_every_step": costly.normalised_at_every_step,
    "residual": costly.residual,
    "summed_with_itself": costly.summed_with_itself,
    "concatenated_sums": costly.concatenated_sums,
    "loops": costly.loops,
    "many_edges": costly.many_edges,
    "sums_of_one": costly.sums_of_one,
    "constants_of_constants": costly.constants_of_constants,
    "gated_by_one_sum": costly.gated_by_one_sum,
    "gathered_by_one_constant": costly.gathered_by_one_constant,
}


@pytest.mark.parametrize("case", LONG)
def test_a_graph_of_twice_the_length_takes_twice_the_steps(case: str, tmp_path: Path) -> None:
    """Beyond 256 sums a name more is not looked for, so the graphs are longer than that. 2.2: the ends count once."""
    steps = []
    scan(written(LONG[case](10), tmp_path))  # what is imported late is there
    for n in (300, 600):
        path = written(LONG[case](n), tmp_path)
        steps.append(calls(partial(sanitize, path, tmp_path / "out.onnx", u=1, max_share=1, dry_run=True)))
    assert steps[1] < 2.2 * steps[0]


def test_a_node_of_many_outputs_is_walked_to_a_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and once for each of three things that are known of what it makes; not for each of 300 states."""
    times: Counter[int] = Counter()
    step = _Walk.step

    def counted(walk: _Walk, node: Node) -> list[Node]:
        times[node.index] += 1
        return step(walk, node)

    monkeypatch.setattr(_Walk, "step", counted)
    scan(written(costly.states_of_one_loop(300), tmp_path))
    assert len(times) > 300
    assert max(times.values()) <= 4


def test_the_views_of_a_shared_weight_are_walked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not for each of 200 convolutions that read it through them."""
    views = 0
    view = Constants.view

    def counted(constants: Constants, derived: Derived, array: Array) -> Array:
        nonlocal views
        views += 1
        return view(constants, derived, array)

    monkeypatch.setattr(Constants, "view", counted)
    report = scan(written(costly.dequantised_behind_views(200), tmp_path))
    assert len(report.layers) == 200
    assert views == 200


def test_a_quadratic_walk_would_be_seen() -> None:
    """The proof that counting calls can fail."""

    def step() -> None: ...

    def quadratic(n: int) -> None:
        for _ in range(n * n):
            step()

    assert calls(lambda: quadratic(20)) > 3 * calls(lambda: quadratic(10))


def test_what_follows_in_the_next_round_of_a_loop_is_seen(tmp_path: Path) -> None:
    """The scores are an answer of the model, and features that a convolution reads: silencing them is not wrong."""
    report = scan(written(costly.carried_back(), tmp_path))
    assert [layer.name for layer in report.layers] == ["loop/body/inner", "loop/body/scores"]


def test_a_chain_of_100000_nodes_is_scanned_where_it_may(tmp_path: Path) -> None:
    path = written(costly.CHAINS["Relu"](100_000), tmp_path)
    with pytest.raises(ModelFileError, match="more than 40,000 nodes and tensors"):
        scan(path)
    report = scan(path, limits=Limits(nodes=200_000))
    assert [layer.name for layer in report.layers] == ["first"]


def test_a_concat_of_10000_branches_over_sums_is_scanned(tmp_path: Path) -> None:
    report = scan(written(costly.concatenated_sums(10_000), tmp_path), limits=Limits(nodes=100_000))
    (layer,) = report.layers
    assert layer.channels == 10_000 * costly.CHANNELS
    assert layer.kind == "Concat→BatchNormalization"


def test_ifs_nested_1000_deep_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="messages nested deeper than 100 at byte"):
        scan(written(costly.nested_if(1000), tmp_path))


def test_ifs_nested_30_deep_are_read(tmp_path: Path) -> None:
    assert [layer.name for layer in scan(written(costly.nested_if(30), tmp_path)).layers] == ["c"]


@pytest.mark.parametrize("length", [1, 2, 50])
def test_functions_that_call_themselves_are_refused(length: int, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="has a function that calls itself"):
        scan(written(costly.recursive(length), tmp_path))


def test_10000_functions_that_call_each_other_in_a_row_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="has functions that call each other 64 deep"):
        scan(written(costly.called(10_000, 1), tmp_path))


@pytest.mark.parametrize(("functions", "twice"), [(10_000, 2), (40, 2)])
def test_functions_that_call_each_other_several_times_do_not_grow_without_end(
    functions: int, twice: int, tmp_path: Path
) -> None:
    said = bounded(written(costly.called(functions, twice), tmp_path))
    assert "has functions that call each other 64 deep" in said or "more than 40,000 nodes and tensors" in said


def test_a_call_counts_for_more_than_what_it_calls(tmp_path: Path) -> None:
    """It costs some 70 µs by itself, a node 10."""
    path, calls = written(costly.called(10, 2), tmp_path), 2**10
    with pytest.raises(ModelFileError, match="nodes and tensors, with every call of a function counted"):
        scan(path, limits=Limits(nodes=4 * calls))
    assert scan(path, limits=Limits(nodes=8 * calls)).analysed


def test_functions_within_the_limits_are_read(tmp_path: Path) -> None:
    assert [layer.name for layer in scan(written(costly.called(10, 2), tmp_path)).layers] == ["c"]


@pytest.mark.parametrize("length", [1, 2, 100])
def test_nodes_that_read_what_they_make_are_skipped_and_said(length: int, tmp_path: Path) -> None:
    made = costly.looped(length)
    made.graph.output.append(onnx.helper.make_tensor_value_info("z", 1, None))
    report = scan(written(made, tmp_path))
    assert {part.name for part in report.skipped} >= {"y", *(f"ring{i}" for i in range(length))}
    assert [layer.name for layer in report.layers] == ["c"]
    assert not report.complete


def test_extents_do_not_grow_beyond_64_bits(tmp_path: Path) -> None:
    """Doubled 2,000 times, they would be integers of as many bits each, kept for every value."""
    made = costly.model(
        [costly.conv("x", "v"), *costly.doubled_along(2, 2000), costly.conv("d1999", "y")], [costly.KERNEL]
    )
    with open_model(written(made, tmp_path)) as file:
        graph = build_graph(file)
        known = shapes(graph, Constants(file, graph))
        extents = [known.extents(value) for node in graph.nodes for value in node.outputs]
    sizes = {size for each in extents for size in each or () if isinstance(size, int)}
    assert 8 << 59 in sizes
    assert max(sizes) < 1 << 63


PARTS: dict[str, Callable[[int], bytes]] = {
    "attributes": lambda n: length_delimited(7, length_delimited(1, b"\x2a\x00" * n)),
    "inputs": lambda n: length_delimited(7, length_delimited(1, b"\x0a\x00" * n)),
    "functions": lambda n: b"\xca\x01\x00" * n,
    "entries of metadata": lambda n: b"\x72\x00" * n,
    "entries of external data": lambda n: length_delimited(7, length_delimited(5, b"\x6a\x00" * n)),
    "numbers by themselves": lambda n: length_delimited(7, length_delimited(5, b"\x38\x01" * n)),
}
"""Messages of two or three bytes, which take hundreds in memory."""


@pytest.mark.parametrize("part", PARTS)
def test_empty_parts_count_for_what_they_cost(part: str, tmp_path: Path) -> None:
    """None of them alone is a node, and a node has some."""
    few = Limits(nodes=1000)
    with pytest.raises(ModelFileError, match=r"more than 1,000 nodes and tensors \("):  # before they are in memory
        scan(
            written(costly.model([costly.conv("x", "y")]).SerializeToString() + PARTS[part](8100), tmp_path), limits=few
        )
    scan(written(costly.model([costly.conv("x", "y")]).SerializeToString() + PARTS[part](500), tmp_path), limits=few)


def test_more_nodes_than_the_limit_are_refused_while_they_are_counted(tmp_path: Path) -> None:
    """Empty nodes and tensors take two bytes on disk, and hundreds in memory."""
    for field in (1, 5):
        content = length_delimited(7, bytes([field << 3 | 2, 0]) * 60_000)
        said = bounded(written(content, tmp_path))
        assert "more than 40,000 nodes and tensors" in said
        assert "every call" not in said  # which is what is said where all of them are in memory already
