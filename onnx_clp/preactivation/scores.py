"""What EP and BNP found, and what they choose: data without arrays."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Method(Enum):
    """By what channels are chosen."""

    EP = "ep"
    BNP = "bnp"


class Reads(Enum):
    """Which value of the graph was read.

    INPUT: what its BatchNormalization reads: the pre-activation itself.
    OUTPUT: what comes out where the normalisation is folded in, a·φ + c with an a and c that nobody knows.
    """

    INPUT = "input"
    OUTPUT = "output"


@dataclass(frozen=True, slots=True)
class SiteScores:
    """The channels of one site.

    Attributes:
        name: The site, as a scan names its layer.
        kind: Its form, as a scan names it.
        value: The value of the graph that was read.
        reads: What that value is.
        scores: Of each channel, in nats: its entropy (EP) or divergence (BNP); not finite where it has none.
        mirrored: For EP and ``Reads.OUTPUT``: the entropies of the smallest values instead of the largest, which is
            what EP looks at in a channel whose γ was negative. Else empty.
        rests: What each channel's output is with γ = 0 and β kept. That is β where ``reads`` is INPUT. Else β is not
            known: the bias that is left is β − γ·μ_run/σ_run, with more of the convolution's own bias, and setting the
            kernel alone to zero would leave the channel there. The mean of the output over the images is given
            instead. It is γ·(mean of φ − μ_run)/σ_run + β, so β where the images have the mean of training, and the
            channel's clean mean where they are clean.
        position: Of the site among the layers of a scan: two may have one name.
    """

    name: str
    kind: str
    value: str
    reads: Reads
    scores: tuple[float, ...]
    rests: tuple[float, ...]
    mirrored: tuple[float, ...] = ()
    position: int = 0

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.scores)


@dataclass(frozen=True, slots=True)
class Unread:
    """A site without scores.

    Attributes:
        name: As a scan names it.
        reason: Why, in a sentence.
    """

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of a model on images.

    Attributes:
        method: Which.
        images: How many images were run.
        sites: Those with scores, in topological order.
        unread: All other sites.
    """

    method: Method
    images: int
    sites: tuple[SiteScores, ...]
    unread: tuple[Unread, ...]


class Verdict(Enum):
    """What could be said about a site."""

    JUDGED = "judged"
    TOO_FEW_CHANNELS = "too-few-channels"
    ZERO_SPREAD = "zero-spread"
    NO_SCORES = "no-scores"


@dataclass(frozen=True, slots=True)
class SiteChoice:
    """The channels of one site that are chosen.

    Attributes:
        name: The site, as a scan names its layer.
        verdict: JUDGED; TOO_FEW_CHANNELS where no score could pass the threshold; ZERO_SPREAD where all are equal;
            NO_SCORES where no channel has one.
        mean: Of the finite scores; NaN where there are none.
        std: Their standard deviation (n−1); NaN where there are fewer than two.
        threshold: mean − u·std for EP, mean + u·std for BNP; NaN where nothing was judged.
        channels: Those beyond the threshold, strictly, ascending.
        z: Of each of them how many standard deviations it lies beyond the mean, above 0.
        rests: Of each of them what its output is with γ = 0 and β kept, as the authors' code leaves it; see
            `SiteScores`. CLP, and BackdoorBench here too, set both to zero: the output is 0.
        rests_known: Whether that is β itself, and not the mean over the images.
        mirrored: Channels that are not among ``channels`` and would be, had their folded γ been negative; ascending.
        unscored: Channels whose score is not finite, ascending. They count for nothing and are never chosen.
        position: As of `SiteScores`.
    """

    name: str
    verdict: Verdict
    mean: float
    std: float
    threshold: float
    channels: tuple[int, ...]
    z: tuple[float, ...]
    rests: tuple[float, ...]
    rests_known: bool
    mirrored: tuple[int, ...]
    unscored: tuple[int, ...]
    position: int = 0

    @property
    def judged(self) -> bool:
        """Whether a channel could have been chosen, or all are equal."""
        return self.verdict in {Verdict.JUDGED, Verdict.ZERO_SPREAD}


@dataclass(frozen=True, slots=True)
class Choice:
    """The channels of a model that are chosen.

    Attributes:
        method: By which.
        u: Standard deviations from the mean.
        sites: A choice for every site with scores, in their order.
        unread: Sites without scores: not the same as sites where nothing is chosen.
    """

    method: Method
    u: float
    sites: tuple[SiteChoice, ...]
    unread: tuple[Unread, ...]

    @property
    def chosen(self) -> int:
        """How many channels are chosen."""
        return sum(len(site.channels) for site in self.sites)
