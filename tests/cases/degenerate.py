"""Layers that have no ordinary answer: dead, few or equal channels, NaN and infinity, shapes that do not fit."""

from dataclasses import replace

import numpy as np

from tests import naive
from tests.cases.net import Array, Net, case

DEAD = (1, 6, 11)
"""A fifth of the channels, nearly."""


def layer(net: Net, W: Array) -> Net:
    """A folded Conv."""
    net.tail(net.conv(net.feed(1, W.shape[1], 8, 8), W, net.vector(len(W))), len(W))
    net.expect("conv", naive.bounds(W))
    return net


@case()
def dead_gamma() -> Net:
    """γ = 0 on some channels, as training leaves it, or a rewrite does."""
    net = Net()
    W, norm = net.kernel(16, 3, 3, 3), net.norm(16)
    norm.gamma[list(DEAD)] = 0
    net.tail(net.bn(net.conv(net.feed(1, 3, 8, 8), W), norm), 16)
    net.expect("bn", norm.of(W))
    return net


@case(dead_kernels={"outlier": 8.0}, dead_kernels_that_hide={"outlier": 1.8})
def dead_kernels(outlier: float) -> Net:
    """A fifth of the kernels is 0. Were those counted in mean and std, 1.8 times the others would not stand out."""
    net = Net()
    W = net.kernel(30, 3, 3, 3, outlier=None)
    wanted = net.rng.uniform(0.9, 1.1, 30)
    wanted[::5] = 0
    wanted[6] = outlier
    W *= (wanted / naive.bounds(W)).reshape(-1, 1, 1, 1).astype(np.float32)
    layer(net, W)
    net.outliers["conv"] = (6,)
    return net


@case()
def all_dead() -> Net:
    """Every kernel is 0."""
    net = layer(Net(), np.zeros((16, 3, 3, 3), dtype=np.float32))
    net.outliers["conv"] = ()
    return net


@case(few_channels={"channels": 8}, ten_channels={"channels": 10}, one_channel={"channels": 1})
def few_channels(channels: int) -> Net:
    """No channel of n ≤ 10 can stand out by 3 std, however loud: nothing can be said of the layer."""
    net = layer(Net(), Net().kernel(channels, 3, 3, 3, outlier=0, factor=1000))
    net.outliers["conv"] = ()
    return net


@case()
def eleven_channels() -> Net:
    """The smallest layer in which u = 3 can flag a channel."""
    return layer(Net(), Net().kernel(11, 3, 3, 3, factor=1000))


@case()
def few_alive() -> Net:
    """Of 16 channels 8 are dead: the other 8 are too few."""
    net = Net()
    W = net.kernel(16, 3, 3, 3, factor=1000)
    W[::2] = 0
    layer(net, W)
    net.outliers["conv"] = ()
    return net


@case(nan_weight={"value": np.nan}, inf_weight={"value": np.inf}, minus_inf_weight={"value": -np.inf})
def broken_weight(value: float) -> Net:
    """One number of one kernel is NaN or infinite; another channel stands out."""
    W = Net().kernel(16, 3, 3, 3)
    W[9, 1, 2, 0] = value
    return layer(Net(), W)


@case(
    nan_gamma={"gamma": np.nan},
    inf_gamma={"gamma": np.inf},
    nan_variance={"variance": np.nan},
    negative_variance={"variance": -1.0},
    zero_variance={"variance": -0.5, "epsilon": 0.5},
)
def broken_norm(gamma: float = 1.0, variance: float = 1.0, epsilon: float = 1e-5) -> Net:
    """γ or var of one channel is NaN, infinite, or has no positive root; another channel stands out."""
    net = Net()
    W, norm = net.kernel(16, 3, 3, 3), replace(net.norm(16), epsilon=epsilon)
    norm.gamma[9], norm.variance[9] = gamma, variance
    net.tail(net.bn(net.conv(net.feed(1, 3, 8, 8), W), norm), 16)
    net.expect("bn", norm.of(W))
    return net


@case()
def zero_spread() -> Net:
    """Every channel has the same kernel."""
    W = np.repeat(Net().kernel(1, 3, 3, 3, outlier=None), 16, axis=0)
    net = layer(Net(), W)
    net.outliers["conv"] = ()
    return net


@case()
def tiny_weights() -> Net:
    """Numbers whose squares are 0 in float32: the singular value is not."""
    W = Net().kernel(16, 3, 3, 3) * np.float32(1e-30)
    return layer(Net(), W)


@case()
def huge_weights() -> Net:
    """Numbers whose squares are infinite in float32: the singular value is not."""
    W = Net().kernel(16, 3, 3, 3) * np.float32(1e30)
    return layer(Net(), W)


@case()
def flat_weight() -> Net:
    """The weight of a Conv is a matrix: no model that runs has it."""
    net = Net()
    W = net.kernel(16, 16, 3, 3)
    weight = net.tensor(net.kernel(16, 27), "weight")
    x = net.op("Relu", net.conv(net.feed(1, 3, 8, 8), weight, name="flat"), name="relu")
    net.tail(net.conv(x, W, net.vector(16)), 16)
    net.expect("conv", naive.bounds(W))
    net.expect_skipped("shape", "flat")
    net.not_run = "the weight has no place for a kernel"
    return net


@case()
def wrong_length_bn() -> Net:
    """The BN has constants for 12 channels, the Conv makes 16."""
    net = Net()
    x = net.conv(net.feed(1, 3, 8, 8), net.kernel(16, 3, 3, 3))
    net.tail(net.bn(x, net.norm(12)), 16)
    net.expect_skipped("shape", "bn")
    net.undecided.add("conv")
    net.not_run = "the BN does not fit what it normalises"
    return net
