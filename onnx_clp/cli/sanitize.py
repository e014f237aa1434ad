"""``onnx-clp sanitize``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import click
from click.core import ParameterSource

from onnx_clp.cli.exits import Exit
from onnx_clp.cli.image_options import model_input
from onnx_clp.cli.options import LONGEST_NUMBER, common, deliver, protect, share, terminal_style
from onnx_clp.correction.budget import DEFAULT_HOLD_OUT, HIGHEST_U
from onnx_clp.correction.request import DEFAULT_COPIES, DEFAULT_RIDGE, MOST_COPIES, REPAIRS
from onnx_clp.defaults import ACTIVITY, LOWEST_U, SCORES
from onnx_clp.limits import Limits
from onnx_clp.methods import DEFAULT_METHOD, METHODS
from onnx_clp.preactivation.selection import MOST_SUSPECTED

Value = TypeVar("Value")


def input_shapes(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Each ``name=1,3,224,224`` as a name and a shape."""
    shapes = {}
    for value in values:
        name, _equals, sizes = value.rpartition("=")
        if not name or not all(map(_is_size, sizes.split(","))):
            raise click.BadParameter(f"{value!r}: give name=1,3,224,224")
        shapes[name] = tuple(int(size) for size in sizes.split(","))
    return shapes


def said(name: str, value: Value) -> Value | None:
    """``value`` where the user gave the option ``name``; None where it is its default, which a method may replace."""
    source = click.get_current_context().get_parameter_source(name)
    return None if source in {ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP} else value


def some_share(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """A share, where one is given."""
    return None if value is None else share(context, parameter, value)


def _is_size(text: str) -> bool:
    return text.isdecimal() and len(text) < LONGEST_NUMBER and int(text) > 0


@click.command("sanitize", short_help="Write a copy of a model with its flagged channels silenced.")
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("destination", metavar="[OUT]", required=False, type=click.Path(path_type=Path))
@common((*SCORES, ACTIVITY), ", or by activity: bound / standard deviation on --images", u=None)
@click.option("--method", type=click.Choice(METHODS), default=DEFAULT_METHOD, show_default=True, metavar="NAME",
              help="By what channels are chosen. clp: their bounds; ep: the entropy of their pre-activations on "
              "--suspected-images; bnp: how far these are, on --images, from the running statistics; auto: by what is "
              "given.")  # fmt: skip
@click.option("--suspected-images", metavar="PATH", type=click.Path(path_type=Path),
              help="For ep: images of the training set that may have been poisoned, triggered ones among them; read "
              "like --images.")  # fmt: skip
@click.option("--num-suspected", type=click.IntRange(2), metavar="N",
              help=f"Take N of them, drawn at random; all, {MOST_SUSPECTED:,} at most, unless said.")  # fmt: skip
@click.option("--keep-bias/--zero-bias", default=None,
              help="Let silenced channels rest at the bias of their normalisation, as ep and bnp are published, or at "
              "0, as clp is.")  # fmt: skip
@click.option(
    "--max-share",
    callback=share,
    default="10%",
    show_default=True,
    metavar="SHARE",
    help="Leave a layer of which more than SHARE would be silenced, and say so; with a budget any share, unless said.",
)
@click.option("--dry-run", is_flag=True, help="Write nothing, say what would change; OUT may be left out.")
@click.option("--force", is_flag=True, help="Overwrite OUT and its data files.")
@click.option("--in-place", is_flag=True, help="Allow OUT to be IN; OUT may be left out.")
@click.option("--no-metadata", is_flag=True, help="Leave out the note in metadata_props.")
@click.option("--no-guard", is_flag=True,
              help="Without --images: silence channels also where the model then answers made-up inputs with one "
              "class.")  # fmt: skip
@click.option("--input-shape", "shapes", callback=input_shapes, multiple=True, metavar="NAME=SHAPE",
              help="Shape of an input for the run in onnxruntime where the model leaves it open.")  # fmt: skip
@click.option("--images", metavar="PATH", type=click.Path(path_type=Path),
              help="Clean images, of which no label is needed: correct with them what silencing shifts in later "
              "layers. A folder of pictures, an .npy or .npz, or the folder of a torchvision data set; 50 to 500 "
              "images.")  # fmt: skip
@click.option("--num-images", type=click.IntRange(2), metavar="N",
              help="Take N of the images, drawn at random; all, 500 at most, unless said.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, metavar="N", help="Seed of that choice.")
@click.option("--repair", type=click.Choice(REPAIRS), default="statistics", show_default=True, metavar="NAME",
              help="What the images are used for. statistics: give later layers their mean and variance back; refit: "
              "fit the kernels of convolutions anew, also where nothing is flagged, then the same; none: only compare "
              "the answers.")  # fmt: skip
@click.option("--ridge", type=float, metavar="NUMBER",
              help=f"How strongly a refit draws weights to 0, above 0; {DEFAULT_RIDGE} unless said.")  # fmt: skip
@click.option("--augment", type=click.IntRange(0, MOST_COPIES), metavar="N",
              help="Measure N copies of each image too, shifted by up to a tenth and every other one mirrored; "
              f"{DEFAULT_COPIES} with a refit, else 0, unless said.")  # fmt: skip
@click.option("--min-agreement", type=float, metavar="PERCENT",
              help="A budget: silence as much as leaves PERCENT of the images that are held out answered as before. "
              f"u goes from {HIGHEST_U:g} down to -u, {LOWEST_U:g} unless said, and stops before the budget is "
              "broken.")  # fmt: skip
@click.option("--max-accuracy-drop", type=float, metavar="POINTS",
              help="A budget: the same, as much as costs at most POINTS of accuracy on them. The images must be what "
              "evaluate reads, with labels. Of two budgets both hold.")  # fmt: skip
@click.option("--hold-out", callback=some_share, metavar="SHARE",
              help="The share of the images that a budget is judged on and nothing is corrected by; "
              f"{DEFAULT_HOLD_OUT:.0%} unless said.")  # fmt: skip
@click.option("--attack", metavar="FILE", type=click.Path(path_type=Path),
              help="attack.json of the model, or its folder, for its preprocessing.")  # fmt: skip
@model_input
def command(  # one parameter an option
    source: Path,
    destination: Path | None,
    u: float | None,
    max_share: float,
    form: str,
    output: Path | None,
    shapes: dict[str, tuple[int, ...]],
    allow_roots: tuple[Path, ...],
    limits: Limits,
    images: Path | None,
    num_images: int | None,
    seed: int,
    attack: Path | None,
    size: tuple[int, int] | None,
    resize: int | None,
    layout: str | None,
    value_range: tuple[float, float] | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    providers: tuple[str, ...] | None,
    batch_size: int | None,
    output_name: str | None,
    repair: str,
    ridge: float | None,
    augment: int | None,
    min_agreement: float | None,
    max_accuracy_drop: float | None,
    hold_out: float | None,
    score: str,
    threshold: str,
    method: str,
    suspected_images: Path | None,
    num_suspected: int | None,
    *,
    keep_bias: bool | None,
    count_dead: bool,
    quiet: bool,
    verbose: bool,
    debug: bool,  # noqa: ARG001  # read where errors are caught
    dry_run: bool,
    force: bool,
    in_place: bool,
    no_metadata: bool,
    no_guard: bool,
) -> int:
    """Write a copy of the model IN to OUT in which the flagged channels are silent.

    Only the numbers that silence a channel change. The copy is verified before it takes its place: byte for byte, by a
    new scan, by onnx.checker, and by onnxruntime where it is installed.

    With --images the mean and variance that later layers lose by it are measured and given back, in the same numbers of
    these layers. With --repair refit the kernels of the convolutions are fitted anew as well, so that weights that
    clean images do not use fade: also where nothing is flagged.

    With --method auto the method and -u, --score, --repair and --ridge are chosen by what is given, but for those that
    are said.
    How much to silence is said by -u, or found by a budget: --min-agreement, or --max-accuracy-drop.
    """
    from onnx_clp.report import json, text  # as late as onnx and NumPy
    from onnx_clp.sanitizer import sanitize

    if destination is None and not (in_place or dry_run):
        raise click.UsageError("Missing argument 'OUT' (or --in-place, or --dry-run).")
    shown = [path for path in (images, suspected_images, attack) if path is not None and path.is_file()]
    protect(output, [source, source if destination is None else destination, *shown])
    protect(destination, shown, "copy", "OUT")
    report = sanitize(
        source,
        source if destination is None else destination,
        said("u", u),
        score=said("score", score),
        threshold=said("threshold", threshold),
        count_dead=count_dead,
        max_share=said("max_share", max_share),
        metadata=not no_metadata,
        force=force,
        in_place=in_place,
        dry_run=dry_run,
        input_shapes=shapes,
        allow_roots=allow_roots,
        limits=limits,
        images=images,
        num_images=num_images,
        seed=seed,
        attack=attack,
        size=size,
        resize=resize,
        layout=layout,
        value_range=value_range,
        mean=mean,
        std=std,
        providers=providers,
        batch_size=batch_size,
        output_name=output_name,
        repair=said("repair", repair),
        ridge=ridge,
        augment=augment,
        method=method,
        suspected_images=suspected_images,
        num_suspected=num_suspected,
        keep_bias=keep_bias,
        min_agreement=min_agreement,
        max_accuracy_drop=max_accuracy_drop,
        hold_out=hold_out,
        guard=not no_guard,
    )
    folder = Path(os.path.realpath(report.destination)).parent
    protect(output, (*report.before.data_files, *(folder / name for name in report.files)))
    rendered = (
        json.render_sanitize(report)
        if form == "json"
        else text.render_sanitize(report, terminal_style(output), verbose=verbose)
    )
    deliver(rendered, output, quiet=quiet)
    return Exit.FINE if report.analysed else Exit.NOT_ANALYSED
