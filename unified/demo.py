"""A web page for a pipeline: prompt in, the picture out as it is drawn; edits of a mask; captions. Needs gradio."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from unified.lora import check_layout
from unified.pipeline import UnifiedPipeline
from unified.prompting import DECODING
from unified_tokenizers.images import as_rgb

PROMPT_LIMIT = 300  # characters
IMAGES_LIMIT = 4
UPLOAD_LIMIT = "8mb"


def build_demo(pipe: UnifiedPipeline, loras: Sequence[str | Path] = (), waiting: int = 8) -> Any:
    """The page as a ``gradio.Blocks``; requests run one at a time, at most ``waiting`` more wait, others are turned away.

    Args:
        pipe: what answers. Adapters are loaded into it by their folder's name.
        loras: adapter folders to choose from.
        waiting: length of the queue.

    Raises:
        ValueError: if gradio is not installed, the queue is shorter than 1, an adapter belongs to another model, or two
            adapters have one name.
    """
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise ValueError("serve: gradio is not installed; pip install 'unified-npp[demo]'.") from error
    if waiting < 1:
        raise ValueError(f"queue: {waiting} must be at least 1.")
    adapters = _load_adapters(pipe, loras)
    pipe.set_progress_bar_config(disable=True)

    def answer(error: ValueError) -> Exception:
        return gradio.Error(str(error), duration=None, print_exception=False)

    def draw(
        prompt: str,
        negative: str,
        seed: float,
        count: float,
        guidance: float,
        temperature: float,
        decoding: str,
        lora: str,
    ) -> Iterator[list[Image.Image]]:
        try:
            options = checked(prompt, negative, seed, count)
            choose_adapter(pipe, adapters, lora)
            for output in pipe.stream(**options, guidance_scale=guidance, temperature=temperature, decoding=decoding):
                yield output.images  # type: ignore[misc]
        except ValueError as error:
            raise answer(error) from error

    def edit(
        prompt: str, layers: dict[str, Any] | None, seed: float, guidance: float, temperature: float, lora: str
    ) -> Any:
        try:
            options = checked(prompt, "", seed, 1)
            choose_adapter(pipe, adapters, lora)
            image, mask = painted(layers, pipe.default_size)
            return pipe.inpaint(
                image=image, mask_image=mask, guidance_scale=guidance, temperature=temperature, **options
            ).images[0]
        except ValueError as error:
            raise answer(error) from error

    def describe(image: Image.Image | None, seed: float, temperature: float, lora: str) -> str:
        try:
            if image is None:
                raise ValueError("image: none given; upload a picture.")
            choose_adapter(pipe, adapters, lora)
            height, width = pipe.default_size
            generator = torch.Generator().manual_seed(int(seed))
            return pipe.caption(image.resize((width, height)), temperature=temperature, generator=generator)[0]
        except ValueError as error:
            raise answer(error) from error

    with gradio.Blocks(title="unified") as page:
        gradio.Markdown("# unified\nPictures from text, edits, and text from pictures.")
        with gradio.Row():
            seed = gradio.Number(0, label="Seed", precision=0, elem_id="seed")
            guidance = gradio.Slider(1, 10, 1.5, step=0.1, label="Guidance", elem_id="guidance")
            temperature = gradio.Slider(0.1, 2, 0.85, step=0.05, label="Temperature", elem_id="temperature")
            lora = gradio.Dropdown(["none", *adapters], value="none", label="LoRA", elem_id="lora")
        prompt = gradio.Textbox(label="Prompt", placeholder="red apple", max_length=PROMPT_LIMIT, elem_id="prompt")
        with gradio.Tab("Draw"):
            with gradio.Row():
                negative = gradio.Textbox(label="Negative prompt", max_length=PROMPT_LIMIT)
                count = gradio.Slider(1, IMAGES_LIMIT, 1, step=1, label="Pictures")
                decoding = gradio.Dropdown(list(DECODING), value="plain", label="Decoding")
            button = gradio.Button("Draw", variant="primary", elem_id="draw")
            gallery = gradio.Gallery(label="Pictures", elem_id="pictures", format="png", columns=IMAGES_LIMIT)
            inputs = [prompt, negative, seed, count, guidance, temperature, decoding, lora]
            gradio.on([button.click, prompt.submit], draw, inputs, gallery, concurrency_limit=1, concurrency_id="model")
        with gradio.Tab("Edit"):
            canvas = gradio.ImageEditor(type="pil", label="Upload a picture and paint over what is to be redrawn")
            edited = gradio.Image(label="Result", format="png")
            gradio.Button("Redraw").click(
                edit, [prompt, canvas, seed, guidance, temperature, lora], edited, concurrency_id="model"
            )
        with gradio.Tab("Describe"):
            upload = gradio.Image(type="pil", label="Picture")
            text = gradio.Textbox(label="Caption")
            gradio.Button("Describe").click(describe, [upload, seed, temperature, lora], text, concurrency_id="model")
    page.queue(max_size=waiting, default_concurrency_limit=1)
    return page


def checked(prompt: str, negative: str, seed: float, count: float) -> dict[str, Any]:
    """Arguments of a drawing, within what a public page allows.

    Raises:
        ValueError: for texts above :data:`PROMPT_LIMIT`, more than :data:`IMAGES_LIMIT` pictures, or no whole seed.
    """
    for name, text in (("prompt", prompt), ("negative prompt", negative)):
        if len(text or "") > PROMPT_LIMIT:
            raise ValueError(f"{name}: {len(text)} characters, at most {PROMPT_LIMIT} are allowed here; shorten it.")
    if not 1 <= count <= IMAGES_LIMIT or count != int(count):
        raise ValueError(f"pictures: {count} must be a whole number from 1 to {IMAGES_LIMIT}.")
    if seed is None or seed != int(seed) or not 0 <= seed < 2**63:
        raise ValueError(f"seed: {seed} must be a whole number that is not negative.")
    generators = [torch.Generator().manual_seed(int(seed) + i) for i in range(int(count))]
    return {
        "prompt": prompt, "negative_prompt": negative or None, "num_images_per_prompt": int(count), "generator": generators
    }  # fmt: skip


def painted(layers: dict[str, Any] | None, size: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """Picture and mask of an image editor's value, resized to ``size`` (height, width).

    Raises:
        ValueError: if nothing was uploaded or painted.
    """
    if not layers or layers.get("background") is None:
        raise ValueError("image: none given; upload a picture.")
    height, width = size
    background = layers["background"]
    mask = Image.new("L", background.size)
    for layer in layers["layers"]:
        mask.paste(255, (0, 0), layer.convert("RGBA").getchannel("A").point(lambda a: 255 if a > 0 else 0))
    if mask.getbbox() is None:
        raise ValueError("mask: nothing is painted; paint over what is to be redrawn.")
    return as_rgb(background).resize((width, height)), mask.resize((width, height), Image.Resampling.NEAREST)


def choose_adapter(pipe: UnifiedPipeline, adapters: Sequence[str], name: str) -> None:
    """Make one adapter count, or none. Raises ValueError for a name that is not offered."""
    if name not in ("none", *adapters):
        raise ValueError(f"lora: {name!r} is not offered; choose one of {['none', *adapters]}.")
    if name != "none":
        pipe.enable_lora()
        pipe.set_adapters(name)
    elif adapters:
        pipe.disable_lora()


def _load_adapters(pipe: UnifiedPipeline, folders: Sequence[str | Path]) -> list[str]:
    names = [Path(folder).name for folder in folders]
    if len(set(names)) < len(names) or "none" in names:
        raise ValueError(f"loras: {names} must be different names, none of them 'none'; rename a folder.")
    for folder in folders:
        check_layout(pipe.model, folder)
    for folder, name in zip(folders, names, strict=True):
        pipe.load_lora_weights(folder, adapter_name=name)
    return names


def serve(pipe: UnifiedPipeline, loras: Sequence[str | Path], host: str, port: int, waiting: int) -> None:
    """Run the page until interrupted."""
    page = build_demo(pipe, loras, waiting)
    page.launch(server_name=host, server_port=port, max_file_size=UPLOAD_LIMIT, show_error=True)
