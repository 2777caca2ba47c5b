"""A web page for a pipeline: prompt in, the image out as it is generated; edits of a mask; captions. Needs gradio."""

import hmac
import importlib.util
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import closing, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from unified.data.crops import fit
from unified.decoding import DECODING_MODES
from unified.lora.adapters import base_of, check_base
from unified.pipeline.arguments import seeded
from unified.pipeline.options import GenerationOptions
from unified.pipeline.pipeline import UnifiedPipeline, UnifiedPipelineOutput
from unified.serving.engine import Engine, Job
from unified_tokenizers.images import as_rgb, read_image

PROMPT_LIMIT = 300  # characters
PATIENCE = 0.5  # seconds after which a page that was stopped is let go
IMAGES_LIMIT = 4
UPLOAD_LIMIT = "8mb"
PIXEL_LIMIT = 16_000_000
SIDE_LIMIT = 16_384  # pixels
LAYER_LIMIT = 4  # of an edited image; the page itself sends one
NO_ADAPTER = "none"
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
    check_installed()
    import gradio

    pipe = engine.pipe
    pipe.set_progress_bar_config(disable=True)
    height, width = pipe.default_size

    def followed(job: Job, show: Callable[[Any], Any]) -> Iterator[Any]:
        """What the page shows of a job; the job is cancelled when the page is closed or stopped."""
        try:
            yield gradio.skip(), f"Waiting: {job.ahead} before you." if job.ahead else "Working ..."
            for output in job.previews(PATIENCE):
                yield (gradio.skip(), gradio.skip()) if output is None else show(output)
        except CancelledError:
            yield gradio.skip(), "Stopped."
        finally:
            job.cancel()

    def shown_error(error: ValueError) -> Exception:
        return gradio.Error(str(error), duration=None, print_exception=False)

    def adapter_of(lora: str) -> str | None:
        return None if lora == NO_ADAPTER else lora

    def generate(
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
            check_request(prompt, negative, seed, count)
            options = GenerationOptions(
                guidance_scale=guidance, num_images_per_prompt=int(count), temperature=temperature, decoding=decoding
            )
            generators = seeded(int(seed), int(count))
            job = engine.submit(prompt, options, adapter_of(lora), negative or None, generators)
            captions = [f"seed {int(seed) + i}" for i in range(int(count))]
            about = f"guidance {guidance:g}, temperature {temperature:g}, LoRA {lora}"

            def show(output: UnifiedPipelineOutput) -> tuple[list[tuple[str, str]], str]:
                paths = [stored(image, gallery.GRADIO_CACHE) for image in output.images]
                return list(zip(paths, captions, strict=True)), progress_text(output.codes, about)

            yield from followed(job, show)
        except ValueError as error:
            raise shown_error(error) from error

    def edit(
        prompt: str, layers: dict[str, Any] | None, seed: float, guidance: float, temperature: float, lora: str
    ) -> Iterator[Any]:
        try:
            check_request(prompt, "", seed, 1)
            engine.check_length([prompt])
            image, mask = image_and_mask(layers, (height, width))
            generators = seeded(int(seed), 1)

            def work() -> Iterator[UnifiedPipelineOutput]:
                return pipe.stream(prompt, image=image, mask_image=mask, generator=generators,
                                   guidance_scale=guidance, temperature=temperature)  # fmt: skip

            job = engine.alone(work, adapter_of(lora))
            about = f"seed {int(seed)}, guidance {guidance:g}, temperature {temperature:g}, LoRA {lora}"
            yield from followed(job, lambda output: (output.images[0], progress_text(output.codes, about)))
        except ValueError as error:
            raise shown_error(error) from error

    def describe(file: str | None, seed: float, temperature: float, lora: str) -> Iterator[Any]:
        try:
            check_request("", "", seed, 1)
            image = fit_upload(opened(file), (height, width))
            generators = seeded(int(seed), 1)
            job = engine.alone(
                lambda: pipe.caption(image, temperature=temperature, generator=generators), adapter_of(lora)
            )
            about = f"Done: seed {int(seed)}, temperature {temperature:g}, LoRA {lora}."
            yield from followed(job, lambda text: (text, about))
        except ValueError as error:
            raise shown_error(error) from error

    def read_canvas(payload: Any) -> Any:
        """What gradio makes of an edited image, unless it would decode too much."""
        if payload is not None:
            parts = canvas.blob_storage.get(payload.id) or payload
            try:
                check_parts([parts.background, *parts.layers, parts.composite])
            except ValueError as error:
                raise shown_error(error) from error
        return decode_canvas(payload)

    with gradio.Blocks(title="unified", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gradio.Markdown(
            "# unified\nOne language model that generates images from text, changes parts of them, and describes them. "
            f"This one has {parameters(pipe)} and generates {width} × {height} pixels."
        )
        with gradio.Row():
            with gradio.Column(scale=2, min_width=280):
                with gradio.Group():
                    seed = gradio.Number(
                        0, label="Seed", info="The same seed gives the same image.", precision=0, elem_id="seed"
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
                    [NO_ADAPTER, *engine.adapters], value=chosen, label="LoRA", info="A style trained on top of the model.",
                    elem_id="lora", visible=bool(engine.adapters),
                )  # fmt: skip
            with gradio.Column(scale=5), gradio.Tabs():
                with gradio.Tab("Generate"):
                    prompt = gradio.Textbox(label="Prompt", placeholder="red apple", elem_id="prompt", autofocus=True)
                    with gradio.Row():
                        button = gradio.Button("Generate", variant="primary", elem_id="generate", scale=3)
                        stop = gradio.Button("Stop", elem_id="stop", scale=1)
                    gallery = gradio.Gallery(
                        show_label=False, elem_id="images", format="png", columns=2, fit_columns=False,
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
                            label="Images",
                            info="Each has the next seed.",
                            elem_id="count",
                        )
                        modes = [(mode.about, name) for name, mode in DECODING_MODES.items()]
                        decoding = gradio.Dropdown(modes, value="plain", label="Decoding", elem_id="decoding")
                with gradio.Tab("Edit"):
                    gradio.Markdown(
                        "Upload an image, paint over the part that shall change, and say what the whole image shows."
                    )
                    whole = gradio.Textbox(label="Prompt", placeholder="green apple", elem_id="whole")
                    with gradio.Row():
                        repaint = gradio.Button("Change", variant="primary", elem_id="repaint", scale=3)
                        stop_edit = gradio.Button("Stop", elem_id="stop-edit", scale=1)
                    with gradio.Row():
                        canvas = gradio.ImageEditor(
                            type="pil", label="Image", sources=["upload", "clipboard"],
                            layers=False, transforms=[], height=420, elem_id="canvas",
                        )  # fmt: skip
                        # On the instance: a subclass would need a custom front end.
                        decode_canvas = canvas.preprocess
                        canvas.preprocess = read_canvas  # type: ignore[method-assign]
                        edited = gradio.Image(
                            label="Result", format="png", interactive=False, height=420, elem_id="edited",
                            buttons=["download", "fullscreen"],
                        )  # fmt: skip
                    edit_status = gradio.Markdown(elem_id="edit-status")
                with gradio.Tab("Describe"):
                    gradio.Markdown(
                        "For models trained on images followed by their captions (`data.captioning`); others write nonsense."
                    )
                    upload = gradio.Image(
                        type="filepath", image_mode=None, label="Image", sources=["upload", "clipboard"], elem_id="upload",
                        height=400,
                    )  # fmt: skip
                    with gradio.Row():
                        ask = gradio.Button("Describe", variant="primary", elem_id="describe", scale=3)
                        stop_describe = gradio.Button("Stop", elem_id="stop-describe", scale=1)
                    text = gradio.Textbox(label="Description", elem_id="description")
                    described = gradio.Markdown(elem_id="describe-status")
        fresh.click(lambda: random.randrange(2**31), outputs=seed, show_progress="hidden", api_visibility="private")
        shown: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}
        generating = gradio.on(
            [button.click, prompt.submit], generate,
            [prompt, negative, seed, count, guidance, temperature, decoding, lora], [gallery, status], **shown,
        )  # fmt: skip
        editing = gradio.on(
            [repaint.click, whole.submit], edit, [whole, canvas, seed, guidance, temperature, lora],
            [edited, edit_status], **shown,
        )  # fmt: skip
        describing = ask.click(describe, [upload, seed, temperature, lora], [text, described], **shown)
        for halt, event in ((stop, generating), (stop_edit, editing), (stop_describe, describing)):
            halt.click(None, cancels=[event])
    return page.queue(max_size=None)


def launch(page: Any, threads: int = 40, password: str | None = None, **options: Any) -> Any:
    """Start the page's server with its limits and looks; nothing is fetched from elsewhere or reported.

    Args:
        page: from :func:`build_demo`.
        threads: of the server.
        password: asked for, with any user name, before the page is shown; None lets everybody in.
        options: further arguments of gradio's ``launch``.
    """
    import gradio

    def matches(user: str, given: str) -> bool:
        return hmac.compare_digest(given.encode(), (password or "").encode())

    theme = gradio.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return page.launch(max_file_size=UPLOAD_LIMIT, max_threads=threads, show_error=True, share=False, ssr_mode=False,
                       footer_links=[], theme=theme, css=CSS, auth=matches if password else None, **options)  # fmt: skip


def check_installed() -> None:
    """Raises ValueError if gradio is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("serve: gradio is not installed; pip install 'unified-npp[demo]'.")


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


def progress_text(codes: torch.Tensor, about: str) -> str:
    """How far images ``(N, h, w)`` are, and how they were made."""
    share = float((codes >= 0).float().mean())
    return f"Done: {about}." if share == 1 else f"Generating ... {share:.0%}"


def check_request(prompt: str, negative: str, seed: float, count: float) -> None:
    """Refuse what a public page does not allow.

    Raises:
        ValueError: for texts above :data:`PROMPT_LIMIT`, more than :data:`IMAGES_LIMIT` images, or no whole seed.
    """
    for name, text in (("prompt", prompt), ("negative prompt", negative)):
        if len(text or "") > PROMPT_LIMIT:
            raise ValueError(f"{name}: {len(text)} characters, at most {PROMPT_LIMIT} are allowed here; shorten it.")
    if not 1 <= count <= IMAGES_LIMIT or count != int(count):
        raise ValueError(f"images: {count} must be a whole number from 1 to {IMAGES_LIMIT}.")
    if seed is None or not 0 <= seed < 2**63 or seed != int(seed):
        raise ValueError(f"seed: {seed} must be a whole number that is not negative.")


def check_pixels(image: Image.Image) -> None:
    """Refuse an image with too many pixels or too long a side, before it is decoded: a small file may hold a huge one.

    Raises:
        ValueError: naming the limit.
    """
    size = f"image: {image.width}x{image.height} pixels"
    if image.width * image.height > PIXEL_LIMIT:
        raise ValueError(f"{size}, at most {PIXEL_LIMIT // 10**6} million are allowed here; make it smaller.")
    if max(image.size) > SIDE_LIMIT:
        raise ValueError(f"{size}, at most {SIDE_LIMIT} are allowed on a side here; make it smaller.")


def check_parts(parts: Sequence[Any]) -> None:
    """Refuse the parts of an edited image, uploaded files or their bytes, if there are too many or one is too large.

    Raises:
        ValueError: naming the limit.
    """
    if len(parts) > LAYER_LIMIT + 2:
        raise ValueError(f"image: {len(parts) - 2} layers, at most {LAYER_LIMIT} are allowed here; merge them.")
    for part in parts:
        if part is not None:
            with opened_lazily(BytesIO(part) if isinstance(part, bytes) else part.path) as image:
                check_pixels(image)


def opened(file: str | Path | None) -> Image.Image:
    """An uploaded image in RGB, upright, on white.

    Raises:
        ValueError: if there is none, it is no image, or it is too large.
    """
    if file is None:
        raise ValueError("image: none given; upload an image.")
    with opened_lazily(file) as image:
        check_pixels(image)
    try:
        return read_image(Path(file).read_bytes())
    except ValueError as error:
        raise ValueError(f"image: cannot be read ({error}); upload a PNG, JPEG or WebP file.") from error


@contextmanager
def opened_lazily(file: Any) -> Iterator[Image.Image]:
    """An image whose pixels are not read yet. Raises ValueError if it is none, or broken further on."""
    try:
        with Image.open(file) as image:
            yield image
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise ValueError(f"image: cannot be read ({error}); upload a PNG, JPEG or WebP file.") from error


def image_and_mask(layers: dict[str, Any] | None, size: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """Image and mask of an image editor's value, scaled and cropped to ``size`` (height, width).

    Raises:
        ValueError: if nothing was uploaded or painted, or the image is too large.
    """
    if not layers or layers.get("background") is None:
        raise ValueError("image: none given; upload an image.")
    background = layers["background"]
    check_pixels(background)
    mask = Image.new("L", background.size)
    for layer in layers["layers"]:
        check_pixels(layer)
        mask.paste(255, (0, 0), layer.convert("RGBA").getchannel("A").point(lambda a: 255 if a > 0 else 0))
    if mask.getbbox() is None:
        raise ValueError("mask: nothing is painted; paint over the part that shall change.")
    fitted = fit_upload(mask, size).point(lambda a: 255 if a > 64 else 0)
    return fit_upload(as_rgb(background), size), fitted


def fit_upload(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale and crop the centre to ``size`` (height, width).

    An image that has to be enlarged is cropped first: a line of 1 x 16,000 pixels would else grow at its whole length.
    """
    height, width = size
    if image.height < height or image.width < width:
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return fit(image, size)


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
    password: str | None = None,
) -> None:
    """Run the page until interrupted; ``chosen`` is an adapter beside ``loras`` that is active at first."""
    names = load_adapters(pipe, [*([] if chosen is None else [chosen]), *loras])
    # gradio decodes uploads before the page sees them; Pillow refuses above twice this number.
    Image.MAX_IMAGE_PIXELS = PIXEL_LIMIT // 2
    with closing(Engine(pipe, max_rows, waiting)) as engine:
        page = build_demo(engine, NO_ADAPTER if chosen is None else names[0])
        launch(page, 40 + max_rows + waiting, password, server_name=host, server_port=port)
