r"""Train `demo`, the small OPT inside the package, on the documentation inside CPython.

    python scripts/train_demo_model.py --out first
    python scripts/train_demo_model.py --start first --out quip/model/demo --steps 400 --lr 2e-3 \
        --decay 0.15 --seed 1

A byte-level BPE tokenizer and an `OPTForCausalLM` (pre-layer-norm, ReLU, tied embeddings) learn
from the `train` split of `pydoc`; its `test` split gives the held-out perplexity in the progress
lines. The folder always holds the latest complete version, in float16. The second command goes on
from the first model with a stronger L1 decay: long training gives the weights of large models heavy
tails, which is what makes them hard to round; here a sparsifying penalty does it in minutes.
"""

import argparse
import copy
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Int64
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from quip.data.pydoc import pydoc_documents
from quip.data.tokens import encode

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # OPT's ids 0 to 3


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    train, test = (pydoc_documents(split) for split in ("train", "test"))
    tokenizer = train_tokenizer(train, args.vocab_size, args.seqlen)
    train_ids, test_ids = (encode(tokenizer, "\n\n".join(texts)) for texts in (train, test))
    if args.start:
        model = OPTForCausalLM.from_pretrained(args.start, dtype=torch.float32).train()
    else:
        model = OPTForCausalLM(model_config(args))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(train_ids):,} training tokens", flush=True)
    train_model(model, train_ids, test_ids, args, save=lambda: save(model, tokenizer, args.out))
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {size:,} bytes", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the model")
    parser.add_argument("--start", type=Path, help="a model of an earlier run to go on from")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=8, help="windows a step")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens a window, and positions")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument(
        "--decay", type=float, default=0.03, help="L1 decay, as a share of the rate"
    )
    parser.add_argument("--dropout", type=float, default=0.0, help="while training only")
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--ffn", type=int, default=768)
    parser.add_argument("--report_every", type=int, default=100, help="steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train_tokenizer(
    documents: list[str], vocab_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    """Byte-level BPE that, like OPT's own tokenizer, puts `</s>` before every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=max_length,
    )


def model_config(args: argparse.Namespace) -> OPTConfig:
    return OPTConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden,
        word_embed_proj_dim=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        ffn_dim=args.ffn,
        max_position_embeddings=args.seqlen,
        dropout=args.dropout,
        attention_dropout=0.0,
    )


def train_model(
    model: OPTForCausalLM,
    train_ids: Int64[Tensor, " train"],
    test_ids: Int64[Tensor, " test"],
    args: argparse.Namespace,
    *,
    save: Callable[[], None],
) -> None:
    """Adam over random windows, the learning rate warmed up and then lowered along a cosine.

    Matrices of the blocks decay towards zero by the same amount at every step, whatever their
    size (the proximal step of an L1 penalty). It holds back overfitting, and leaves many small
    weights and few large ones: the heavy tails that long training gives to large models.
    """
    linears = [m.weight for m in model.model.decoder.layers.modules() if isinstance(m, nn.Linear)]
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, args.steps))
    start, total = time.perf_counter(), 0.0
    for step in range(1, args.steps + 1):
        corners = torch.randint(len(train_ids) - args.seqlen + 1, (args.batch,))
        windows = torch.stack([train_ids[i : i + args.seqlen] for i in corners])
        # Half the time of float32 on processors with bfloat16 products; the weights stay float32.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=windows, labels=windows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        shrink(linears, schedule.get_last_lr()[0] * args.decay)
        schedule.step()
        optimizer.zero_grad()
        total += loss.item()
        if step % args.report_every == 0 or step == args.steps:
            count = (step - 1) % args.report_every + 1
            print(
                f"step {step}/{args.steps}: training perplexity {math.exp(total / count):.2f}, "
                f"held out {held_out_perplexity(model, test_ids, args.seqlen):.2f}, "
                f"{step * args.batch * args.seqlen:,} tokens, "
                f"{(time.perf_counter() - start) / 60:.1f} min",
                flush=True,
            )
            total = 0.0
            save()


@torch.no_grad()
def shrink(weights: list[nn.Parameter], amount: float) -> None:
    """Move every weight towards zero by the amount, and not beyond."""
    for weight in weights:
        weight.copy_(weight.sign() * (weight.abs() - amount).clamp_min(0))


def rate(step: int, steps: int, *, warm: int = 100, last: float = 0.02) -> float:
    """The share of the highest learning rate at a step."""
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@torch.no_grad()
def held_out_perplexity(model: OPTForCausalLM, ids: Int64[Tensor, " tokens"], seqlen: int) -> float:
    """exp of the mean loss over consecutive windows, in float32."""
    model.eval()
    windows = ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)
    losses = [model(input_ids=w, labels=w, use_cache=False).loss for w in windows.split(1)]
    model.train()
    return math.exp(torch.stack(losses).mean().item())


def save(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the float16 model beside the folder, then move file by file into it."""
    folder.mkdir(parents=True, exist_ok=True)
    half = copy.deepcopy(model).half().eval()
    half.config.dropout = 0.0
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".demo-") as temporary:
        half.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for path in Path(temporary).iterdir():
            path.chmod(0o644)  # safetensors writes for its owner alone
            os.replace(path, folder / path.name)


if __name__ == "__main__":
    main()
