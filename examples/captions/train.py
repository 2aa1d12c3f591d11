"""Trains the caption model under wait-k streaming spans, with this library's attention.

    python examples/captions/train.py --minutes 8.5 --out runs/captions     # one GPU
    python examples/captions/train.py --steps 20 --tokens 800 --out captions-run    # a CPU run

A Qwen2 model of 3.6 M parameters over bytes. Every batch is new; each sample in it is seen at a wait of its own, from
k = 1 to everything read first (`batches.WAITS`), so that one model serves every latency. All that differs from ordinary
training is two arguments of the forward: `spans=` and grouped `position_ids`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from batches import IGNORED, WAITS, Batch, Training
from generator import Sample, samples
from layout import END_ID, HEADER, PROMPT, SOURCE_END, VOCAB, ceiling
from safetensors.torch import load_file, save_file
from scoring import exact
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import ByT5Tokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

import streamkernels

BEGIN = time.monotonic()
BETAS, DECAY, CLIP, WARMUP = (0.9, 0.98), 0.05, 1.0, 500


def new_model(
    seed: int = 0, *, hidden: int = 256, layers: int = 6, intermediate: int = 512, head_dim: int = 64
) -> Qwen2ForCausalLM:
    """A fresh model: byte tokens, two query heads per key/value head, tied embeddings."""
    torch.manual_seed(seed)
    heads = hidden // head_dim
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=END_ID, pad_token_id=0, do_sample=False)
    return model


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Weighted cross entropy of the target rows. model: patched; batch: of `batches.collate`, on the model's device."""
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "spans")}
    logits: Tensor = model(**inputs, use_cache=False).logits
    labels = batch["labels"].flatten()
    each = cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=IGNORED, reduction="none")
    weights = batch["weights"].flatten()
    return (each * weights).sum() / weights.sum()


def new_optimizer(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=matrices[0].is_cuda)


def rate_at(peak: float, step: int, progress: float) -> float:
    """Linear warm-up by steps, then half a cosine down to 1 % over the whole run; progress in [0, 1]."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * min(1.0, (step + 1) / WARMUP) * (0.01 + 0.99 * cosine)


def batches_for(args: argparse.Namespace, device: torch.device) -> Iterator[Batch]:
    """Training batches on the device, made by worker processes."""
    workers = args.workers if args.workers is not None else max(0, min(14, (os.cpu_count() or 1) - 2))
    data = Training(f"train {args.seed}", args.tokens, args.batch, pool=2048 if args.batch > 64 else 8 * args.batch)
    # few in flight: a batch is a megabyte and a half of shared memory
    more: dict[str, Any] = {"prefetch_factor": 2, "persistent_workers": True} if workers else {}
    pinned = device.type == "cuda"
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers, pin_memory=pinned, **more)
    for batch in loader:
        yield {name: x.to(device, non_blocking=True) for name, x in batch.items()}


def report(model: nn.Module, rows: list[Sample], waits: tuple[int | None, ...]) -> str:
    """Exact match beside its ceiling, one entry per wait."""
    model.eval()
    parts = []
    for k in waits:
        right, tokens = exact(model, rows, k)
        name = "batch" if k is None else f"k={k}"
        parts.append(f"{name} {sum(right) / len(rows):.3f}/{ceiling(rows, k):.3f} (tokens {tokens:.4f})")
    model.train()
    return "  ".join(parts)


def train(args: argparse.Namespace) -> None:
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.set_float32_matmul_precision("high")  # tf32 on a GPU; the weights, sums and softmax stay fp32
    batches = batches_for(args, device)
    first = next(batches)  # the workers start before the device is in use
    model = new_model(args.seed).to(device)
    optimizer = new_optimizer(model, args.rate)
    if args.resume:
        load_state(args.resume, model, optimizer)
    count = sum(p.numel() for p in model.parameters())
    check = list(itertools.islice(samples("validation", held_out=True), args.checked))
    logging.disable_progress_bar()
    length = f"{args.steps} steps" if args.steps else f"{args.minutes} minutes"
    print(f"{count:,} parameters on {device}, torch {torch.__version__}, {length}", flush=True)

    handle = streamkernels.patch(model)
    model.train()
    start, said = time.monotonic(), BEGIN
    losses: list[Tensor] = []
    seen = step = 0
    for step, batch in enumerate(itertools.chain([first], batches)):
        now = time.monotonic()
        progress = step / args.steps if args.steps else (now - start) / (60 * args.minutes - (start - BEGIN))
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate_at(args.rate, step, progress)
        loss = loss_of(model, batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        seen += len(batch["labels"])
        if step % args.log == 0 or now - said > 60:
            mean = torch.stack(losses).mean().item()
            pace = 1e3 * (now - start) / max(step, 1)
            print(f"{now - BEGIN:6.1f} s  step {step:6d}  loss {mean:.4f}  norm {norm:.2f}  {pace:.1f} ms", flush=True)
            losses = []
        if now - said > args.check:
            said = now
            print(f"  exact match/ceiling: {report(model, check, (1, 5, None))}", flush=True)
            save(model, args.out)
    print(f"{time.monotonic() - BEGIN:6.1f} s  {step} steps, {seen:,} samples", flush=True)
    print(f"  exact match/ceiling: {report(model, check, WAITS)}", flush=True)
    handle.undo()
    save(model, args.out)
    if args.state:
        save_state(args.out, model, optimizer, step)
    print(f"saved to {args.out}", flush=True)


def save(model: Qwen2ForCausalLM, out: Path) -> None:
    """The model in fp16 and its tokenizer, as `from_pretrained` reads them, and what stands around the words."""
    half = Qwen2ForCausalLM(Qwen2Config(**{**model.config.to_dict(), "_attn_implementation": None}))
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    half.half().save_pretrained(out)
    ByT5Tokenizer().save_pretrained(out)
    streaming = {"prompt": PROMPT, "header": HEADER, "source_end": SOURCE_END, "policy": "wait-k:5"}
    (out / "streaming.json").write_text(json.dumps(streaming, indent=2) + "\n", encoding="utf-8")


def save_state(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """What `--resume` needs: fp32 weights, and the optimizer's moments in bf16 (both files stay under 16 MB)."""
    names = {id(p): name for name, p in model.named_parameters()}
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(weights, out / "state_weights.safetensors")
    moments = {
        f"{key}.{names[id(p)]}": state[key].bfloat16()
        for p, state in optimizer.state.items()
        for key in ("exp_avg", "exp_avg_sq")
    }
    save_file(moments, out / "state_moments.safetensors", metadata={"step": json.dumps(step)})


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Weights and moments of an earlier run; the schedule begins anew."""
    model.load_state_dict(load_file(folder / "state_weights.safetensors"), strict=False)
    moments = load_file(folder / "state_moments.safetensors")
    for name, p in model.named_parameters():
        state = {key: moments[f"{key}.{name}"].to(p) for key in ("exp_avg", "exp_avg_sq")}
        # past the steps in which Adam corrects its bias
        optimizer.state[p] = {"step": torch.tensor(1e4, device=p.device if p.is_cuda else None), **state}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--minutes", type=float, default=8.5, help="stop after this long, start-up included")
    parser.add_argument("--steps", type=int, default=0, help="stop after this many steps instead")
    parser.add_argument("--tokens", type=int, default=32_768, help="tokens per batch, padding included")
    parser.add_argument("--batch", type=int, default=10**9, help="at most this many samples per batch")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="processes that make batches (default: cores - 2, at most 14)")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--log", type=int, default=200, help="steps between two lines")
    parser.add_argument("--check", type=float, default=45, help="seconds between two checks of the exact match")
    parser.add_argument("--checked", type=int, default=500, help="samples in a check")
    parser.add_argument("--state", action="store_true", help="also save what --resume needs")
    parser.add_argument("--resume", type=Path, help="folder of an earlier run with --state")
    return parser


if __name__ == "__main__":
    train(arguments().parse_args())
