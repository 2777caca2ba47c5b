"""A web page for a pipeline: prompt in, the image out as it is generated; edits of a mask; captions. Needs gradio."""

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from unified.data.crops import fit
from unified.decoding import Sampling
from unified.lora.adapters import base_of, check_base
from unified.pipeline.pipeline import UnifiedPipeline, UnifiedPipelineOutput
from unified.serving.engine import Engine, Job
from unified_tokenizers.images import as_rgb

PROMPT_LIMIT = 300  # characters
PATIENCE = 0.5  # seconds after which a page that was stopped is let go
IMAGES_LIMIT = 4
UPLOAD_LIMIT = "8mb"
PIXEL_LIMIT = 16_000_000
NO_ADAPTER = "none"
DECODING = [("one code at a time", "plain"), ("several codes at a time, same image", "jacobi"),
            ("several codes at a time, same distribution", "sjd"), ("fastest, approximate", "gsd")]  # fmt: skip
CSS = """
.gradio-container {max-width: 1120px !important; margin: auto;}
#images {min-height: 390px;}
#images .grid-wrap {max-height: none;}
#images img, #edited img {image-rendering: pixelated;}
#status p, #edit-status p, #describe-status p {opacity: .75; font-size: .9em;}
"""


def build_demo(engine: Engine, chosen: str = NO_ADAPTER) -> Any:
    """The page as a ``gradio.Blocks`` over a running engine.

    Images that are sampled one code at a time share the engine's batch; everything else runs in it alone.

    Args:
        engine: what answers; the page offers its adapters.
        chosen: the adapter that is chosen at first.

    Raises:
        ValueError: if gradio is not installed.
    """
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise ValueError("serve: gradio is not installed; pip install 'unified-npp[demo]'.") from error
    pipe = engine.pipe
    pipe.set_progress_bar_config(disable=True)
    height, width = pipe.default_size

    def followed(job: Job, show: Callable[[Any], Any]) -> Iterator[Any]:
        """What a page shows of a job, which is stopped when nobody looks any more; without news, something to go on with."""
        try:
            yield gradio.skip(), f"Waiting: {job.ahead} before you." if job.ahead else "Working ..."
            for output in job.previews(PATIENCE):
                yield (gradio.skip(), gradio.skip()) if output is None else show(output)
        except CancelledError:
            yield gradio.skip(), "Stopped."
        finally:
            job.cancel()

    def told(error: ValueError) -> Exception:
        return gradio.Error(str(error), duration=None, print_exception=False)

    def adapter_of(lora: str) -> str | None:
        return None if lora == NO_ADAPTER else lora

    def draw(
        prompt: str,
        negative: str,
        seed: float,
        count: float,
        guidance: float,
        temperature: float,
        decoding: str,
        lora: str,
    ) -> Iterator[Any]:
        try:
            options = checked(prompt, negative, seed, count)
            sampling = Sampling(guidance, temperature)
            if decoding == "plain":
                job = engine.submit(sampling=sampling, adapter=adapter_of(lora), **options)
            else:
                engine.check_prompt(prompt)
                engine.check_prompt(negative, "negative_prompt")
                options |= {"guidance_scale": guidance, "temperature": temperature, "decoding": decoding}
                job = engine.alone(lambda: pipe.stream(**options), adapter_of(lora))
            captions = [f"seed {int(seed) + i}" for i in range(int(count))]
            about = f"guidance {guidance:g}, temperature {temperature:g}, LoRA {lora}"

            def show(output: UnifiedPipelineOutput) -> tuple[list[tuple[str, str]], str]:
                paths = [stored(image, gallery.GRADIO_CACHE) for image in output.images]
                return list(zip(paths, captions, strict=True)), drawn_text(output.codes, about)

            yield from followed(job, show)
        except ValueError as error:
            raise told(error) from error

    def edit(
        prompt: str, layers: dict[str, Any] | None, seed: float, guidance: float, temperature: float, lora: str
    ) -> Iterator[Any]:
        try:
            options = checked(prompt, "", seed, 1)
            engine.check_prompt(prompt)
            image, mask = painted(layers, (height, width))
            options |= {"image": image, "mask_image": mask, "guidance_scale": guidance, "temperature": temperature}
            job = engine.alone(lambda: pipe.stream(**options), adapter_of(lora))
            about = f"seed {int(seed)}, guidance {guidance:g}, temperature {temperature:g}, LoRA {lora}"
            yield from followed(job, lambda output: (output.images[0], drawn_text(output.codes, about)))
        except ValueError as error:
            raise told(error) from error

    def describe(file: str | None, seed: float, temperature: float, lora: str) -> Iterator[Any]:
        try:
            image = fit(opened(file), (height, width))
            (generator,) = checked("-", "", seed, 1)["generator"]
            job = engine.alone(
                lambda: pipe.caption(image, temperature=temperature, generator=generator), adapter_of(lora)
            )
            about = f"Done: seed {int(seed)}, temperature {temperature:g}, LoRA {lora}."
            yield from followed(job, lambda text: (text, about))
        except ValueError as error:
            raise told(error) from error

    with gradio.Blocks(title="unified", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gradio.Markdown(
            "# unified\nOne language model that generates images from text, redraws parts of them, and describes them. "
            f"This one has {parameters(pipe)} and samples {width} × {height} pixels."
        )
        with gradio.Row():
            with gradio.Column(scale=2, min_width=280):
                with gradio.Group():
                    seed = gradio.Number(
                        0, label="Seed", info="The same seed samples the same image.", precision=0, elem_id="seed"
                    )
                    fresh = gradio.Button("New seed", size="sm")
                guidance = gradio.Slider(
                    1,
                    10,
                    1.5,
                    step=0.1,
                    label="Guidance",
                    info="How closely to follow the prompt; 1 is off.",
                    elem_id="guidance",
                )
                temperature = gradio.Slider(
                    0.1,
                    2,
                    0.85,
                    step=0.05,
                    label="Temperature",
                    info="Lower is safer, higher more varied.",
                    elem_id="temperature",
                )
                lora = gradio.Dropdown(
                    [NO_ADAPTER, *engine.adapters], value=chosen, label="LoRA", info="A style learned on top of the model.",
                    elem_id="lora", visible=bool(engine.adapters),
                )  # fmt: skip
            with gradio.Column(scale=5), gradio.Tabs():
                with gradio.Tab("Draw"):
                    prompt = gradio.Textbox(label="Prompt", placeholder="red apple", elem_id="prompt", autofocus=True)
                    with gradio.Row():
                        button = gradio.Button("Draw", variant="primary", elem_id="draw", scale=3)
                        stop = gradio.Button("Stop", elem_id="stop", scale=1)
                    gallery = gradio.Gallery(
                        show_label=False, elem_id="pictures", format="png", columns=2, fit_columns=False,
                        object_fit="contain", buttons=["download", "fullscreen"],
                    )  # fmt: skip
                    status = gradio.Markdown(elem_id="status")
                    with gradio.Accordion("More options", open=False):
                        negative = gradio.Textbox(
                            label="Negative prompt", info="What to steer away from.", elem_id="negative"
                        )
                        count = gradio.Slider(
                            1,
                            IMAGES_LIMIT,
                            1,
                            step=1,
                            label="Pictures",
                            info="Each has the next seed.",
                            elem_id="count",
                        )
                        decoding = gradio.Dropdown(DECODING, value="plain", label="Decoding", elem_id="decoding")
                with gradio.Tab("Edit"):
                    gradio.Markdown(
                        "Upload an image, paint over what is to be redrawn, and say what the whole image shows."
                    )
                    change = gradio.Textbox(label="Prompt", placeholder="green apple", elem_id="change")
                    with gradio.Row():
                        redraw = gradio.Button("Redraw", variant="primary", elem_id="redraw", scale=3)
                        stop_edit = gradio.Button("Stop", elem_id="stop-edit", scale=1)
                    with gradio.Row():
                        canvas = gradio.ImageEditor(
                            type="pil", label="Picture", sources=["upload", "clipboard"],
                            layers=False, transforms=[], height=420, elem_id="canvas",
                        )  # fmt: skip
                        edited = gradio.Image(
                            label="Result", format="png", interactive=False, height=420, elem_id="edited",
                            buttons=["download", "fullscreen"],
                        )  # fmt: skip
                    edit_status = gradio.Markdown(elem_id="edit-status")
                with gradio.Tab("Describe"):
                    gradio.Markdown(
                        "For models trained on images followed by their captions (`data.captioning`); others have not "
                        "learned to, and write nonsense."
                    )
                    upload = gradio.Image(
                        type="filepath", image_mode=None, label="Picture", sources=["upload", "clipboard"], elem_id="upload",
                        height=400,
                    )  # fmt: skip
                    with gradio.Row():
                        ask = gradio.Button("Describe", variant="primary", elem_id="describe", scale=3)
                        stop_describe = gradio.Button("Stop", elem_id="stop-describe", scale=1)
                    text = gradio.Textbox(label="Description", elem_id="description")
                    described = gradio.Markdown(elem_id="describe-status")
        fresh.click(lambda: random.randrange(2**31), outputs=seed, show_progress="hidden", api_visibility="private")
        shown: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}
        drawing = gradio.on(
            [button.click, prompt.submit], draw,
            [prompt, negative, seed, count, guidance, temperature, decoding, lora], [gallery, status], **shown,
        )  # fmt: skip
        editing = gradio.on(
            [redraw.click, change.submit], edit, [change, canvas, seed, guidance, temperature, lora],
            [edited, edit_status], **shown,
        )  # fmt: skip
        describing = ask.click(describe, [upload, seed, temperature, lora], [text, described], **shown)
        for halt, event in ((stop, drawing), (stop_edit, editing), (stop_describe, describing)):
            halt.click(None, cancels=[event])
    return page.queue(max_size=None)


def launch(page: Any, threads: int = 40, **options: Any) -> Any:
    """Start the page's server with its limits and looks; nothing is fetched from elsewhere or reported."""
    import gradio

    theme = gradio.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return page.launch(max_file_size=UPLOAD_LIMIT, max_threads=threads, show_error=True, share=False, ssr_mode=False,
                       footer_links=[], theme=theme, css=CSS, **options)  # fmt: skip


def parameters(pipe: UnifiedPipeline) -> str:
    """Size of the language model in words."""
    count = base_of(pipe.model).num_parameters()
    for size, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if count >= size:
            return f"{count / size:.1f} {name} parameters"
    return f"{count} parameters"


def stored(image: Image.Image, cache: str) -> str:
    """Path of an image in gradio's cache. Gradio itself writes one again that is there, while a browser may be reading it."""
    from gradio.processing_utils import encode_pil_to_bytes, hash_bytes

    data = encode_pil_to_bytes(image, "png")
    path = Path(cache) / hash_bytes(data) / "image.png"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(uuid4().hex)
        part.write_bytes(data)
        part.replace(path)
    return str(path)


def drawn_text(codes: torch.Tensor, about: str) -> str:
    """How far images ``(N, h, w)`` are, and how they were made."""
    share = float((codes >= 0).float().mean())
    return f"Done: {about}." if share == 1 else f"Drawing ... {share:.0%}"


def checked(prompt: str, negative: str, seed: float, count: float) -> dict[str, Any]:
    """Arguments of a request, within what a public page allows.

    Raises:
        ValueError: for texts above :data:`PROMPT_LIMIT`, more than :data:`IMAGES_LIMIT` images, or no whole seed.
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


def check_pixels(image: Image.Image) -> Image.Image:
    """Refuse an image above :data:`PIXEL_LIMIT`, before it is decoded: a small file may hold a huge one."""
    if image.width * image.height > PIXEL_LIMIT:
        raise ValueError(
            f"image: {image.width}x{image.height} pixels, at most {PIXEL_LIMIT // 10**6} million are allowed here; "
            "make it smaller."
        )
    return image


def opened(file: str | Path | None) -> Image.Image:
    """An uploaded image in RGB, upright, on white.

    Raises:
        ValueError: if there is none, it is no image, or it has too many pixels.
    """
    if file is None:
        raise ValueError("image: none given; upload an image.")
    try:
        with Image.open(file) as image:
            return as_rgb(ImageOps.exif_transpose(check_pixels(image)))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise ValueError(f"image: cannot be read ({error}); upload a PNG, JPEG or WebP file.") from error


def painted(layers: dict[str, Any] | None, size: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """Picture and mask of an image editor's value, scaled and cropped to ``size`` (height, width).

    Raises:
        ValueError: if nothing was uploaded or painted, or the image has too many pixels.
    """
    if not layers or layers.get("background") is None:
        raise ValueError("image: none given; upload an image.")
    background = check_pixels(layers["background"])
    mask = Image.new("L", background.size)
    for layer in layers["layers"]:
        mask.paste(255, (0, 0), layer.convert("RGBA").getchannel("A").point(lambda a: 255 if a > 0 else 0))
    if mask.getbbox() is None:
        raise ValueError("mask: nothing is painted; paint over what is to be redrawn.")
    return fit(as_rgb(background), size), fit(mask, size).point(lambda a: 255 if a > 64 else 0)


def load_adapters(pipe: UnifiedPipeline, folders: Sequence[str | Path]) -> list[str]:
    """Load adapters under their folders' names; returns these.

    Raises:
        ValueError: if an adapter belongs to another model, or a name cannot be one of the choices.
    """
    names = [Path(folder).resolve().name for folder in folders]
    if len(set(names)) < len(names) or NO_ADAPTER in names or any("." in name for name in names):
        raise ValueError(
            f"loras: {names} must be different names without dots, none of them {NO_ADAPTER!r}; rename a folder."
        )
    for folder in folders:
        check_base(pipe.model, folder)
    for folder, name in zip(folders, names, strict=True):
        pipe.load_lora_weights(folder, adapter_name=name)
    return names


def serve(
    pipe: UnifiedPipeline,
    loras: Sequence[str | Path],
    chosen: str | Path | None,
    host: str,
    port: int,
    max_rows: int,
    waiting: int,
) -> None:
    """Run the page until interrupted; ``chosen`` is an adapter beside ``loras`` that counts at first."""
    names = load_adapters(pipe, [*([] if chosen is None else [chosen]), *loras])
    # gradio decodes uploads before the page sees them; Pillow refuses above twice this number.
    Image.MAX_IMAGE_PIXELS = PIXEL_LIMIT // 2
    with closing(Engine(pipe, max_rows, waiting)) as engine:
        page = build_demo(engine, NO_ADAPTER if chosen is None else names[0])
        launch(page, threads=40 + max_rows + waiting, server_name=host, server_port=port)
