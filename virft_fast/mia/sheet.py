"""A contact sheet of kept and dropped answers: each scene, overlaid with its answer's attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw
from torch import Tensor

from virft_fast.algorithms.sft import answer_ids
from virft_fast.batch import Prompt
from virft_fast.data.drawing import contact_sheet
from virft_fast.mia.answering import Answer, Answering
from virft_fast.mia.scenes import Scene, Scenes
from virft_fast.models.image_attention import attention_to_prompts, image_tokens

# Smaller scenes are enlarged to this size.
SHEET_PIXELS = 260


def attention_sheet(
    scenes: Scenes,
    answering: Answering,
    answers: Mapping[int, Answer],
    reasons: Mapping[int, Sequence[str]],
    limit: int,
) -> Image.Image | None:
    """Up to `limit` scenes, with attention in red and the target framed; None without answers."""
    cells = []
    for answer in on_sheet(answers, reasons, limit):
        built = scenes.build(answer.index)
        if isinstance(built, str):
            continue
        plan, scene = built
        prompt = answering.prompt(answer.index, scene)
        if isinstance(prompt, str):
            continue
        verdict = "kept" if not reasons[answer.index] else "; ".join(reasons[answer.index])
        caption = (
            f"{verdict}; {answer.ratio or 0.0:.2f} on the target. {plan.prefix} true: "
            f"{answer.truth} said: {answer.text}"
        )
        cells.append((_picture(answering, scene, prompt, answer), caption))
    return contact_sheet(cells, columns=4) if cells else None


def on_sheet(
    answers: Mapping[int, Answer], reasons: Mapping[int, Sequence[str]], limit: int
) -> list[Answer]:
    """The first kept answers, then the first dropped ones: half of each if there are enough."""
    answered = [answer for answer in answers.values() if not answer.problem]
    kept = [answer for answer in answered if not reasons[answer.index]]
    dropped = [answer for answer in answered if reasons[answer.index]]
    kept = kept[: max(-(-limit // 2), limit - len(dropped))]
    return kept + dropped[: limit - len(kept)]


def _picture(answering: Answering, scene: Scene, prompt: Prompt, answer: Answer) -> Image.Image:
    """The scene's images side by side, overlaid with the answer's attention."""
    attention = attention_again(answering, prompt, answer)
    tokens = image_tokens(prompt, answering.merge)
    strongest = max(float(attention[positions].max()) for positions, _ in tokens)
    images = [
        overlay(image, attention[positions], grid, strongest)
        for image, (positions, grid) in zip(scene.images, tokens, strict=True)
    ]
    target = images[scene.target_image]
    left, top, right, bottom = scene.box
    corners = (left, top, right - 1, bottom - 1)  # PIL also draws the last pixel
    width = max(2, max(target.size) // 100)
    ImageDraw.Draw(target).rectangle(corners, outline=(0, 160, 0), width=width)
    return _side_by_side(images)


def attention_again(answering: Answering, prompt: Prompt, answer: Answer) -> Tensor:
    """The answer's attention to its prompt, (P,), recomputed from the answer's text."""
    tokenizer = answering.processor.tokenizer
    ids = answer_ids(tokenizer, prompt.continued(answer.text))
    ids = ids[:-1] if answer.truncated and len(ids) > 1 else ids
    inputs = answering.policy.collate(
        [prompt], [[ids]], pad_token_id=tokenizer.pad_token_id, device=answering.device, packed=True
    )
    (attention,) = attention_to_prompts(answering.policy, inputs, answering.layer)
    return attention.cpu()


def overlay(
    image: Image.Image, attention: Tensor, grid: tuple[int, int], strongest: float
) -> Image.Image:
    """The image with the attention on its tokens in red.

    Args:
        attention: (rows * columns,).
        grid: rows and columns of tokens.
        strongest: the attention drawn in the deepest red.
    """
    strength = (attention / max(strongest, 1e-12)).view(grid)
    mask = Image.fromarray((200 * strength).byte().numpy())
    mask = mask.resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", image.size, (255, 0, 0)), image, mask)


def _side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    gap = max(2, images[0].width // 20)
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    row = Image.new("RGB", (width, max(image.height for image in images)), "white")
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + gap
    factor = max(1, SHEET_PIXELS // max(row.size))
    return row.resize((factor * row.width, factor * row.height), Image.Resampling.NEAREST)
