"""Images of an evaluation to look at: as they are, attacked, and what the attack changed."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from flatreg.attacks.cascade import attack_rows, describe, stages
from flatreg.attacks.spot_check import on_everyone
from flatreg.data.images import Images
from flatreg.data.loading import subset
from flatreg.data.sharing import Batch
from flatreg.evaluation.results import Evaluation
from flatreg.measures.linearised_margin import margin
from flatreg.models.forward import evaluated
from flatreg.models.state import derived_seed
from flatreg.report.rows import Report
from flatreg.threat import to_unit_range

_COUNT = 6
_BYTES = 2_500_000  # of all images on the page, so that it can be sent
_SMALL = 64  # pixels: larger images are compressed with loss, as noise does not compress without


@dataclass(frozen=True, eq=False)
class Attacked:
    """An image of the evaluation under the attack of one arm.

    Attributes:
        prediction, margin: of the image as it is; the margin in logits, below 0 where it is wrong.
        attacked_prediction, attacked_margin: of the attacked image.
        attack: that made it; None where the image was wrong as it is, and is not attacked.
        survived: whether the evaluation found no image that fools the model.
        image: attacked, `(channels, height, width)`.
    """

    prediction: int
    margin: float
    attacked_prediction: int
    attacked_margin: float
    attack: str | None
    survived: bool
    image: Tensor


@dataclass(frozen=True, eq=False)
class Example:
    """One image of the evaluation: its dataset index, its label, and what each arm makes of it."""

    index: int
    label: int
    image: Tensor
    arms: dict[str, Attacked]


def gallery(
    report: Report, data: Images, models: Mapping[str, nn.Module], attack: str
) -> list[Example]:
    """Six random images of the evaluation, that all arms classify right as far as there are such.

    The attack that fooled an image is repeated with the seed that it had, so that its image is that
    of the evaluation. Of a survivor the first attack of the cascade is repeated.

    Args:
        report: of `models`.
        data: that the report evaluated.
        models: by the names of its arms.
        attack: the cascade of the evaluation, by name.
    """
    first = report.rows[0].evaluation
    wrong = [sum(row.evaluation.verdicts[at] == -2 for row in report.rows) for at in range(first.n)]
    taken: list[int] = []
    for times in sorted(set(wrong)):
        among = [at for at in range(first.n) if wrong[at] == times]
        if len(taken) < _COUNT:
            taken += subset(among, _COUNT - len(taken), first.seed)
    chosen = [first.indices[at] for at in sorted(taken)]
    by_arm = {
        row.name: _attacked(models[row.name], data, row.evaluation, chosen, attack)
        for row in report.rows
    }
    images, labels = to_unit_range(data.images_at(chosen)).cpu(), data.labels[chosen].tolist()
    return [
        Example(index, labels[at], images[at], {arm: found[at] for arm, found in by_arm.items()})
        for at, index in enumerate(chosen)
    ]


def _attacked(
    model: nn.Module, data: Images, evaluation: Evaluation, chosen: list[int], attack: str
) -> list[Attacked]:
    """The images at `chosen`, attacked as in the evaluation."""
    verdict_at = dict(zip(evaluation.indices, evaluation.verdicts, strict=True))
    verdicts = [verdict_at[index] for index in chosen]
    attacks = on_everyone(stages(attack))
    device = next(model.parameters()).device
    images = to_unit_range(data.images_at(chosen).to(device))
    batch = Batch(chosen, images, data.labels[chosen].to(device).long())
    ended = images.clone()
    with evaluated(model) as module:
        for number in {max(verdict, 0) for verdict in verdicts if verdict > -2}:
            among = [at for at, v in enumerate(verdicts) if v > -2 and max(v, 0) == number]
            ended[among] = attack_rows(
                attacks[number],
                module,
                batch,
                torch.tensor(among, device=device),
                eps=evaluation.eps,
                norm=evaluation.norm,
                seed=derived_seed(evaluation.seed, number),
            ).inputs.to(images.dtype)
        with torch.no_grad():
            logits = [module(x) for x in (images, ended)]
    predictions = [z.argmax(1).tolist() for z in logits]
    margins = [margin(z, batch.labels).tolist() for z in logits]
    return [
        Attacked(
            predictions[0][at],
            margins[0][at],
            predictions[1][at],
            margins[1][at],
            describe(attacks[max(verdict, 0)]) if verdict > -2 else None,
            verdict == -1,
            ended[at].cpu(),
        )
        for at, verdict in enumerate(verdicts)
    ]


@dataclass(frozen=True)
class Shown:
    """An `Example` as a page shows it, each image a data URI.

    Attributes:
        clean: the image as it is.
        arms: by name, what was found and the attacked image and difference.
        reach: the change of a pixel that is drawn black or white in the differences.
        small: whether its pixels are to be drawn as squares.
    """

    example: Example
    clean: str
    arms: dict[str, tuple[Attacked, str, str]]
    reach: float
    small: bool


def shown(examples: list[Example]) -> list[Shown]:
    """As many of the examples as a page of a few megabytes holds, at least one."""
    found: list[Shown] = []
    size = 0
    for example in examples:
        changes = {arm: one.image - example.image for arm, one in example.arms.items()}
        reach = max(float(change.abs().max()) for change in changes.values())
        grey = {arm: 0.5 + change / (2 * (reach or 1)) for arm, change in changes.items()}
        arms = {
            arm: (one, data_uri(one.image), data_uri(grey[arm]))
            for arm, one in example.arms.items()
        }
        small = max(example.image.shape[1:]) <= _SMALL
        one = Shown(example, data_uri(example.image), arms, reach, small)
        size += len(one.clean) + sum(len(uri) for _, *uris in arms.values() for uri in uris)
        if found and size > _BYTES:
            break
        found.append(one)
    return found


def data_uri(image: Tensor) -> str:
    """A `(channels, height, width)` image in [0,1] as a PNG or, where it is large, a JPEG.

    One or three channels are grey or colours; of any other number the mean is shown.
    """
    levels = (image.detach().float().clamp(0, 1) * 255).round().byte().cpu().numpy()
    if len(levels) not in (1, 3):
        levels = levels.mean(0, keepdims=True).astype(np.uint8)
    picture = Image.fromarray(levels[0] if len(levels) == 1 else np.moveaxis(levels, 0, 2))
    kind = "png" if max(picture.size) <= _SMALL else "jpeg"
    written = io.BytesIO()
    picture.save(written, kind, **({"optimize": True} if kind == "png" else {"quality": 88}))
    return f"data:image/{kind};base64,{base64.b64encode(written.getvalue()).decode()}"
