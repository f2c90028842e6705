"""The head of a small model of every family in timm: is it found, is it right?

    python benchmarks/heads.py --output benchmarks/heads.json --docs docs/heads.md

A family is the start of a model's name up to the first digit, within one module of `timm.models`;
its model is the smallest of the few whose names promise least.
Models have 7 classes, random weights and the smallest images they take. Where `find_head` resolves
the head, its weights are drawn anew, so that zeros prove nothing, and three things are compared:

eval    features @ weight.T + bias with the logits in eval mode, relative to the largest logit
train   the same in train mode, dropout and BatchNorm included
kappa   `relative_flatness` with the Hessian of cross-entropy in the weight by autograd, in float64
        on the captured features of two samples; largest relative error

Runs one model at a time and continues where it was stopped.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatreg.data.files import write_json
from flatreg.measures.relative_flatness import relative_flatness
from flatreg.models.forward import Forward, run_forward
from flatreg.models.heads import Head, find_head

Row = dict[str, Any]
CLASSES, SMALL, LARGEST, COUNTED = 7, 64, 130e6, 3
SIZES = (
    *("zepto|atto|femto", "pico|xxt|xxs", "nano|xs|wee", "tiny|mini", "small|_s", "little"),
    *("medium|_m|betwixt", "base|_b", r"large|_l|giant|huge|enormous|_g|_h|_x|so\d+m", ""),
)
# Kinds of heads that the smallest model of its family may not have.
MORE = (
    *("deit_tiny_distilled_patch16_224", "pit_ti_distilled_224", "iformer_m_distilled"),
    *("efficientvim_m1_dist", "levit_128s", "levit_conv_128s", "resnetv2_18", "fastvit_t8"),
    *("coat_lite_tiny", "iformer_t", "convnext_atto_ols"),
)
TABLE = "<!-- the rest is written by benchmarks/heads.py -->\n"


def families() -> dict[str, list[str]]:
    """Names of all models, by family."""
    found = defaultdict(list)
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            match = re.match(r"[a-z]+(v\d+)?", name)
            start = name if name.startswith("test_") or match is None else match.group(0)
            found[f"{module}/{start}"].append(name)
    return dict(sorted(found.items())) | {f"more/{name}": [name] for name in MORE}


def count_parameters(name: str) -> float:
    """Of a model built without memory; infinite where it cannot be."""
    try:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=CLASSES)
    except Exception:  # whatever a model does that a meta tensor cannot
        return float("inf")
    return sum(p.numel() for p in model.parameters())


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Build the model and two images, the smallest of a few sizes it takes."""
    cfg = timm.get_pretrained_cfg(name)
    smaller: Row = {"img_size": SMALL} if cfg.fixed_input_size else {}
    sizes = [(smaller, SMALL)]
    if cfg.min_input_size:
        sizes.append(({}, max(SMALL, cfg.min_input_size[-1])))
    for options, size in [*sizes, ({}, cfg.input_size[-1])]:
        torch.manual_seed(0)
        try:
            model = timm.create_model(name, num_classes=CLASSES, **options).eval()
            images = torch.rand(2, 3, size, size)
            with torch.no_grad():
                model(images)
        except Exception:
            if size == cfg.input_size[-1] and not options:
                raise
            continue
        return model, images
    raise AssertionError


def draw_anew(head: Head, at: Forward) -> None:
    """Weights and bias of the head at random, with logits of order one."""
    torch.manual_seed(1)
    scale = float(at.features.detach().norm(dim=1).mean())
    with torch.no_grad():
        for p in head.parameters():
            p.normal_(std=0.5 if p.ndim == 1 else 1 / scale)


def kappa_by_autograd(feature: Tensor, weight: Tensor, bias: Tensor | None, label: int) -> Tensor:
    """Sum over s, s' of <w_s, w_s'> Tr H_ss'; a trace is a sum over the columns of the weight."""

    def loss(column: Tensor, old: Tensor, phi: Tensor) -> Tensor:
        logits = F.linear(feature, weight, bias) + (column - old) * phi
        return F.cross_entropy(logits[None], torch.tensor([label]))

    columns = weight.T.contiguous()
    blocks = torch.func.vmap(torch.func.jacrev(torch.func.grad(loss)))(columns, columns, feature)
    return ((weight @ weight.T) * blocks.sum(0)).sum()


def describe(model: nn.Module, head: Head) -> str:
    """Kind of the head: its layers, in which modules."""
    kinds = []
    for branch, name in zip(head.branches, head.names, strict=True):
        inside = [model.get_submodule(name[:i]) for i, c in enumerate(name) if c == "."][-1:]
        kind = "Conv2d 1x1" if isinstance(branch, nn.Conv2d) else type(branch).__name__
        shown = [type(m).__name__ for m in inside if not isinstance(m, nn.ModuleList)]
        kinds.append(" in ".join([kind, *shown]))
    return kinds[0] if len(kinds) == 1 else f"mean of {len(kinds)} {kinds[0]}"


def compare(model: nn.Module, images: Tensor, head: Head) -> Row:
    """Errors of the head, at weights drawn anew."""
    labels = torch.tensor([1, 2])
    with torch.no_grad():
        draw_anew(head, run_forward(model.eval(), images, labels, head))
        at = run_forward(model, images, labels, head)
        in_training = run_forward(model.train(), images, labels, head)
        errors = {
            mode: float((head.logits(a.features) - a.logits).abs().max() / a.logits.abs().max())
            for mode, a in (("eval", at), ("train", in_training))
        }
        phi, weight = at.features.double(), head.weight.double()
        bias = None if head.bias is None else head.bias.double()
        kappa = relative_flatness(phi, F.linear(phi, weight, bias), weight)
    exact = torch.stack([kappa_by_autograd(phi[i], weight, bias, i + 1) for i in range(2)])
    return {**errors, "kappa": float(((kappa - exact) / exact).abs().max())}


def examine(name: str) -> Row:
    """One row of the table."""
    start = time.perf_counter()
    model, images = build(name)
    row: Row = {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "size": images.shape[-1],
    }
    try:
        head = find_head(model, images)
    except ValueError as error:
        return {**row, "refused": str(error)}
    row |= {"head": head.name, "kind": describe(model, head), "features": head.weight.shape[1]}
    row |= compare(model, images, head)
    return {**row, "seconds": round(time.perf_counter() - start, 1)}


def is_right(row: Row) -> bool:
    """Whether the head was found and all comparisons hold."""
    return "head" in row and row["eval"] < 1e-5 and row["train"] < 1e-5 and row["kappa"] < 1e-9


def table(results: Row) -> str:
    """Markdown: the count, what was refused or left out, and all heads."""
    rows: dict[str, Row] = results["rows"]
    right = {family: row for family, row in rows.items() if is_right(row)}
    models = len({row["model"] for row in right.values()})
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    lines = [
        f"{len(right)} of {len(rows)} rows ({models} models) are found and right; {versions}.",
        "",
        "| not resolved | model | reason |",
        "|---|---|---|",
    ]
    for family, row in rows.items():
        if family not in right:
            reason = row.get("refused") or row.get("skipped") or row.get("failed") or "WRONG"
            lines.append(f"| {family} | {row['model']} | {reason} |")
    lines += [
        "",
        "| family | model | head | kind | d | px | eval | train | kappa |",
        "|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for family, row in right.items():
        errors = " | ".join(f"{row[key]:.0e}" for key in ("eval", "train", "kappa"))
        lines.append(
            f"| {family} | {row['model']} | {row['head']} | {row['kind']} | {row['features']} "
            f"| {row['size']} | {errors} |"
        )
    return "\n".join(lines) + "\n"


def smallest(names: list[str]) -> Row:
    """The smallest model, counted among the few whose names promise least."""
    sizes = {name: count_parameters(name) for name in sorted(names, key=_promise)[:COUNTED]}
    name = min(sizes, key=lambda n: sizes[n])
    return {"model": name, "parameters": sizes[name]}


def _promise(name: str) -> tuple[int, list[int], int]:
    """Order of sizes as names spell them: a word, then numbers such as depth and width."""
    rank = next((i for i, words in enumerate(SIZES) if re.search(words, name)), SIZES.index(""))
    return rank, [int(number) for number in re.findall(r"\d+", name)], len(name)


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/heads.json"))
    parser.add_argument("--docs", type=Path, help="write the table into this page too")
    args = parser.parse_args()
    versions = {name: version(name) for name in ("flatreg", "timm", "torch")}
    results: Row = {"versions": versions, "rows": {}}
    if args.output.exists():
        results["rows"] = json.loads(args.output.read_text(encoding="utf-8"))["rows"]
    for family, names in families().items():
        if family in results["rows"]:
            continue
        row = smallest(names)
        if LARGEST < row["parameters"] < float("inf"):
            row["skipped"] = f"the smallest has {row['parameters'] / 1e6:.0f}M parameters"
        else:
            try:
                row = examine(row["model"])
            except Exception as error:  # a model that does not run here is a row, not the end
                row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        results["rows"][family] = row
        write_json(args.output, results)
        print(family, row, flush=True)
        gc.collect()
    results["rows"] = dict(sorted(results["rows"].items()))
    write_json(args.output, results)
    print(table(results))
    if args.docs:
        prose = args.docs.read_text(encoding="utf-8").partition(TABLE)[0]
        args.docs.write_text(prose + TABLE + table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
