"""`quip evaluate MODEL`: perplexity, tasks, divergence and speed of a model or checkpoint."""

import argparse

from quip.cli.flags import refuse_tasks, task_flags, zero_shot
from quip.cli.machine import machine_flags, stream_flag
from quip.cli.output import names, numbers
from quip.cli.parse import Arguments, as_given, refuse_small
from quip.cli.streams import say
from quip.cli.values import place
from quip.errors import UsageError
from quip.jobs.requests import request

HELP = "measure a checkpoint or a model as it is"
EXAMPLES = """
quip evaluate demo --datasets pydoc --nsamples 4
quip evaluate runs/demo-2bit --reference demo --agreement 32
quip evaluate runs/demo-2bit --speed --speed_batch 4
"""


def build(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what to call with them."""
    parser.add_argument(
        "model",
        type=place,
        help="a checkpoint written by --save, or a model as `quip run` takes it",
    )
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--datasets",
        metavar="A,B,...",
        help="where perplexity is measured: names as for `quip run`, or files; by default what the "
        "run measured that saved the checkpoint",
    )
    group.add_argument(
        "--seqlen",
        type=int,
        metavar="N",
        help="tokens in a window (default: as in that run, or what the model can take)",
    )
    group.add_argument(
        "--nsamples",
        type=int,
        metavar="N",
        help="the first N windows of each data set (default: as in that run, or all)",
    )
    group.add_argument(
        "--reference",
        type=place,
        metavar="MODEL",
        help="the original: adds its perplexities, the KL divergence from its predictions (mean and"
        " 99th percentile), and how often both predict the same token",
    )
    group.add_argument(
        "--agreement",
        type=int,
        metavar="N",
        help="with --reference: how long both models write the same, greedily, after N prompts of "
        "each data set (64 tokens, 32 new ones)",
    )
    group.add_argument(
        "--speed",
        action="store_true",
        help="tokens per second, memory, and the share of what the device's memory can do, beside "
        "the same model with dense matrices",
    )
    group.add_argument(
        "--speed_batch",
        metavar="A,B,...",
        help="numbers of texts side by side whose speed is measured too, such as 4,16",
    )
    task_flags(parser.add_argument_group("zero-shot tasks"))
    group = parser.add_argument_group("machine and output")
    stream_flag(group)
    machine_flags(group, out="a new or empty folder for run.json")
    parser.set_defaults(call=call)


def call(args: Arguments) -> None:
    """Turn strings into plain values, measure, and print the result."""
    refuse_small(args, seqlen=2, nsamples=1, agreement=1)
    if args.overwrite and args.out is None:
        raise UsageError("--overwrite speaks of --out: name the folder with --out DIR")
    if args.agreement is not None and args.reference is None:
        raise UsageError("--agreement speaks of the original: name it with --reference MODEL")
    datasets = None if args.datasets is None else names(args.datasets, "--datasets")
    batches = _batches(args)
    refuse_tasks(args)

    from quip.jobs.evaluate import Evaluation, run_evaluation
    from quip.jobs.report.text import table

    report = run_evaluation(
        request(
            Evaluation,
            args,
            datasets=datasets,
            speed_batch=batches,
            tasks=zero_shot(args),
            flags=as_given(args),
        )
    )
    say(table(report))


def _batches(args: Arguments) -> tuple[int, ...]:
    if args.speed_batch is None:
        return ()
    if not args.speed:
        raise UsageError("--speed_batch speaks of --speed: add it")
    return numbers(args.speed_batch, "--speed_batch", least=1, most=1024)
