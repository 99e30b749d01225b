"""Where `quip run` measures perplexity: --eval_datasets, or what suits the calibration text."""

from pathlib import Path

from quip.cli.flags import NAMED
from quip.cli.output import names
from quip.cli.parse import Arguments
from quip.errors import UsageError

PAPER_SETS = "wikitext2,ptb-new,c4-new"


def evaluations_of(args: Arguments, *, quantizes: bool) -> tuple[str, ...]:
    """The data sets of a run, by name. Raises UsageError for flags that contradict each other."""
    if args.proxy_only:
        if not quantizes:
            raise UsageError("--proxy_only needs weights to quantize: give --wbits 2 to 8")
        if args.compare or args.eval_datasets or args.tasks:
            raise UsageError(
                "--proxy_only evaluates nothing: leave out --compare, --eval_datasets and --tasks"
            )
        return ()
    wanted = args.eval_datasets
    if wanted is None:
        dataset = args.dataset or _dataset_of(args.hessians)
        if dataset not in NAMED and (args.hessians or Path(dataset).expanduser().exists()):
            raise UsageError(
                f"DATASET {dataset} is a file or folder: say where to measure perplexity with "
                "--eval_datasets FILE,... (text that is not calibrated on), or `none`"
            )
        wanted = "pydoc" if dataset == "pydoc" else PAPER_SETS
    if wanted == "none":
        if args.compare or (not quantizes and not args.tasks):
            flag = "--compare" if args.compare else "--wbits 16"
            raise UsageError(f"{flag} means to evaluate: leave out --eval_datasets none")
        return ()
    return names(wanted, "--eval_datasets")


def _dataset_of(store: Path) -> str:
    from quip.data.hessians import HessianStore

    return HessianStore(store).stamp["dataset"]
