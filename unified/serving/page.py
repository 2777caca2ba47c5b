"""The web page of a pipeline: a prompt or a class in, the image out as it is generated; edits of a mask; captions; conversations.

Needs gradio.
"""

import importlib.util
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from PIL import Image

from unified.config import UnifiedConfig
from unified.decoding.config import Sampling, modes_for
from unified.lora.base import base_of
from unified.pipeline.arguments import seeded
from unified.pipeline.chat import message
from unified.pipeline.metadata import describe_images
from unified.pipeline.options import GenerationOptions
from unified.pipeline.pipeline import UnifiedPipeline, UnifiedPipelineOutput
from unified.serving.engine import Engine, Job
from unified.serving.remote_engine import RemoteEngine
from unified.serving.uploads import check_files, checked_inputs, files_of_canvas, fit_upload, image_and_mask, opened

PROMPT_LIMIT = 300  # characters
PATIENCE = 0.5  # seconds after which a page that was stopped is let go
IMAGES_LIMIT = 4
UPLOAD_LIMIT = 8 << 20  # bytes
CLIENT_LIMIT = 4  # requests of one client
BACKLOG = 256  # requests that gradio keeps until it looks at them
NO_ADAPTER = "none"
NO_CLASS = -1  # to steer away from
CSS = """
.gradio-container {max-width: 1120px !important; margin: auto;}
#images {min-height: 390px;}
#images .grid-wrap {max-height: none;}
#images img, #edited img {image-rendering: pixelated;}
#conversation img {image-rendering: pixelated; min-width: 128px;}
#status p, #edit-status p, #describe-status p, #chat-status p {opacity: .75; font-size: .9em;}
"""


def build_demo(engine: Engine | RemoteEngine, chosen: str = NO_ADAPTER, per_client: int = CLIENT_LIMIT) -> Any:
    """The page as a ``gradio.Blocks`` over a running engine.

    Images of plain decoding share the engine's batch; everything else runs in it alone. Before a server there is nothing else:
    the page shows no more than it can do.

    Args:
        engine: what answers; the page offers its adapters.
        chosen: the adapter that is chosen at first.
        per_client: requests of one client that are answered or wait.

    Raises:
        ValueError: if gradio is not installed.
    """
    check_installed()
    import gradio

    from unified.serving.guard import Visitors

    pipe: Any = engine.pipe
    remote, visitors = isinstance(engine, RemoteEngine), Visitors(per_client)
    config = pipe.config if remote else base_of(pipe.model).config
    classes, talks = class_choices(config), config.chat_template is not None and not remote
    guidable = not isinstance(engine, RemoteEngine) or (engine.guided and not config.null_prompt)
    if not remote:
        pipe.set_progress_bar_config(disable=True)
    height, width = pipe.default_size
    usual = {"guidance_scale": 1.5, "temperature": 0.85, "decoding": "plain", **pipe.sampling}

    def followed(job: Job, show: Callable[[Any], Any], parts: int = 1) -> Iterator[Any]:
        """What the page shows of a job, in ``parts`` and a status; the job is cancelled when the page is closed or stopped."""
        same = [gradio.skip()] * parts
        try:
            yield *same, f"Waiting: {job.ahead} before you." if job.ahead else "Working ..."
            for output in job.previews(PATIENCE):
                yield (*same, job.note or gradio.skip()) if output is None else show(output)
        except CancelledError:
            yield *same, "Stopped."
        finally:
            job.cancel()

    @contextmanager
    def answering(request: gradio.Request) -> Iterator[None]:
        """A request's turn, and its errors as the page shows them: mistakes in words, anything else without any detail."""
        try:
            with visitors.turn(request.client.host, request.session_hash or ""):
                yield
        except ValueError as error:
            raise gradio.Error(str(error), duration=None, print_exception=False) from error
        except Exception as error:  # gradio prints it on the server
            raise gradio.Error("server: something went wrong; its log says what.", duration=None) from error

    def adapter_of(lora: str) -> str | None:
        return None if lora == NO_ADAPTER else lora

    def weights_of(lora: str) -> dict[str, float]:
        return {} if lora == NO_ADAPTER else {lora: 1.0}

    def wanted(subject: Any, negative: Any = None) -> dict[str, Any]:
        """What images show, as arguments of the pipeline: a prompt, or the number of a class."""
        if classes is None:
            return {"prompt": subject, "negative_prompt": negative or None}
        if subject is None:
            raise ValueError("class: none is chosen; choose one.")
        return {"class_labels": subject, "negative_class_labels": None if negative == NO_CLASS else negative}

    def in_words(subject: Any) -> str:
        return subject if classes is None else f"class {classes[subject][0]}"

    def generate(
        subject: Any,
        negative: Any,
        seed: float,
        count: float,
        guidance: float,
        temperature: float,
        decoding: str,
        lora: str,
        request: gradio.Request,
    ) -> Iterator[Any]:
        with answering(request):
            text, unlike = (subject, negative) if classes is None else ("", "")
            check_request(text, unlike, seed, count)
            given: dict[str, Any] = {"guidance_scale": guidance, "temperature": temperature, "decoding": decoding}
            options = GenerationOptions(num_images_per_prompt=int(count), **given)
            generators = seeded(int(seed), int(count))
            images = wanted(subject, negative)
            job = engine.submit(options=options, adapter=adapter_of(lora), generator=generators, **images)
            captions = [f"seed {int(seed) + i}" for i in range(int(count))]
            about = f"guidance {guidance:g}, temperature {temperature:g}, LoRA {lora}"

            def show(output: UnifiedPipelineOutput) -> tuple[list[tuple[str, str]], str]:
                seeds = [int(seed) + i for i in range(int(count))]
                if not remote:  # whose images say of themselves what they can
                    describe_images(
                        pipe, output.images, [in_words(subject)] * len(seeds), seeds, given, images.get("negative_prompt"),
                        adapters=weights_of(lora),
                    )  # fmt: skip
                paths = [stored(image, gallery.GRADIO_CACHE) for image in output.images]
                return list(zip(paths, captions, strict=True)), progress_text(output.codes, about)

            yield from followed(job, show)

    def edit(
        subject: Any,
        files: Any,
        seed: float,
        guidance: float,
        temperature: float,
        lora: str,
        request: gradio.Request,
    ) -> Iterator[Any]:
        with answering(request):
            check_request(subject if classes is None else "", "", seed, 1)
            images = wanted(subject)
            if classes is None:
                engine.check_length([subject])
            background, layers = files
            check_files(background, layers)
            generators = seeded(int(seed), 1)
            given: dict[str, Any] = {"guidance_scale": guidance, "temperature": temperature}

            def work() -> Iterator[UnifiedPipelineOutput]:
                image, mask = image_and_mask(background, layers, (height, width))  # one request's at a time
                return pipe.stream(image=image, mask_image=mask, generator=generators, **images, **given)

            def show(output: UnifiedPipelineOutput) -> tuple[Any, str]:
                describe_images(
                    pipe,
                    output.images,
                    [in_words(subject)],
                    [int(seed)],
                    given,
                    edit="inpaint",
                    adapters=weights_of(lora),
                )
                return output.images[0], progress_text(output.codes, about)

            job = engine.alone(work, adapter_of(lora))
            about = f"seed {int(seed)}, guidance {guidance:g}, temperature {temperature:g}, LoRA {lora}"
            yield from followed(job, show)

    def describe(file: Any, seed: float, temperature: float, lora: str, request: gradio.Request) -> Iterator[Any]:
        with answering(request):
            check_request("", "", seed, 1)
            check_files(file, [])
            generators = seeded(int(seed), 1)

            def work() -> list[str]:
                image = fit_upload(opened(file), (height, width))
                return pipe.caption(image, temperature=temperature, generator=generators)

            job = engine.alone(work, adapter_of(lora))
            about = f"Done: seed {int(seed)}, temperature {temperature:g}, LoRA {lora}."
            yield from followed(job, lambda text: (text, about))

    def converse(
        said: str, file: Any, history: list[Any], seed: float, temperature: float, lora: str, request: gradio.Request
    ) -> Iterator[Any]:
        """A turn of the user, and the reply as it grows: the conversation as it is kept and as it is shown, empty fields."""
        with answering(request):
            check_request(said, "", seed, 1)
            if not (said or "").strip():
                raise ValueError("message: empty; write something.")
            if file is not None:
                check_files(file, [])
            generators = seeded(int(seed) + len(history), 1)  # the same words again need not get the same reply
            asked: list[Any] = []

            def work() -> Iterator[tuple[list[Any], str]]:
                shown, reply = [] if file is None else [fit_upload(opened(file), (height, width))], list[Any]()
                asked.append(message("user", *shown, said.strip()))
                sampling = Sampling(temperature=temperature)
                for reply in pipe.stream_chat([*history, *asked], text_sampling=sampling, generator=generators):
                    yield reply, "Writing ..."
                yield reply, "Done."

            def show(state: tuple[list[Any], str]) -> tuple[Any, ...]:
                reply, status = state
                kept = [*history, *asked, *([message("assistant", *reply)] if reply else [])]
                return kept, bubbles(kept, conversation.GRADIO_CACHE), "", None, status

            yield from followed(engine.alone(work, adapter_of(lora)), show, 4)

    def subject_field(placeholder: str, elem_id: str, **options: Any) -> Any:
        """Where a prompt is written, or a class is chosen: typing narrows the choice."""
        if classes is None:
            return gradio.Textbox(label="Prompt", placeholder=placeholder, elem_id=elem_id, **options)
        return gradio.Dropdown(classes, value=classes[0][1], label="Class", elem_id=elem_id, filterable=True)

    with gradio.Blocks(title="unified", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        able = (
            "from text, changes parts of them, and describes them"
            if classes is None
            else "of classes and changes parts of them"
        )
        here = "runs in another engine" if remote else f"has {parameters(pipe)}"
        gradio.Markdown(
            f"# unified\nOne language model that generates images {'from text' if remote else able}. "
            f"This one {here} and generates {width} × {height} pixels."
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
                    max(10, usual["guidance_scale"]),
                    usual["guidance_scale"] if guidable else 1,
                    step=0.1,
                    label="Guidance",
                    info="How closely to follow the prompt; 1 is off.",
                    elem_id="guidance",
                    visible=guidable,
                )
                temperature = gradio.Slider(
                    min(0.1, usual["temperature"]),
                    max(2, usual["temperature"]),
                    usual["temperature"],
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
                    prompt = subject_field("red apple", "prompt", autofocus=True)
                    with gradio.Row():
                        button = gradio.Button("Generate", variant="primary", elem_id="generate", scale=3)
                        stop = gradio.Button("Stop", elem_id="stop", scale=1)
                    gallery = gradio.Gallery(
                        show_label=False, elem_id="images", format="png", columns=2, fit_columns=False,
                        object_fit="contain", buttons=["download", "fullscreen"],
                    )  # fmt: skip
                    status = gradio.Markdown(elem_id="status")
                    with gradio.Accordion("More options", open=False):
                        about = "What to steer away from."
                        if classes is None:
                            negative: Any = gradio.Textbox(
                                label="Negative prompt", info=about, elem_id="negative", visible=not remote
                            )
                        else:
                            choices: list[Any] = [("none", NO_CLASS), *classes]
                            negative = gradio.Dropdown(
                                choices, value=NO_CLASS, label="Negative class", info=about, elem_id="negative"
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
                        suitable = {} if remote else modes_for(base_of(pipe.model).prediction, config.patch_sizes)
                        modes = [(mode.about, name) for name, mode in suitable.items()] or [("plain", "plain")]
                        decoding = gradio.Dropdown(
                            modes, value=usual["decoding"], label="Decoding", elem_id="decoding", visible=not remote
                        )
                with gradio.Tab("Edit", visible=not remote):
                    gradio.Markdown(
                        "Upload an image, paint over the part that shall change, and say what the whole image shows."
                    )
                    whole = subject_field("green apple", "whole")
                    with gradio.Row():
                        repaint = gradio.Button("Change", variant="primary", elem_id="repaint", scale=3)
                        stop_edit = gradio.Button("Stop", elem_id="stop-edit", scale=1)
                    with gradio.Row():
                        canvas: Any = gradio.ImageEditor(
                            type="pil", label="Image", sources=["upload", "clipboard"],
                            layers=False, transforms=[], height=420, elem_id="canvas",
                        )  # fmt: skip
                        edited = gradio.Image(
                            label="Result", format="png", interactive=False, height=420, elem_id="edited",
                            buttons=["download", "fullscreen"],
                        )  # fmt: skip
                    edit_status = gradio.Markdown(elem_id="edit-status")
                with gradio.Tab("Describe", visible=classes is None and not remote):
                    gradio.Markdown(
                        "For models trained on images followed by their captions (`data.captioning`); others write nonsense."
                    )
                    upload: Any = gradio.Image(
                        type="filepath", image_mode=None, label="Image", sources=["upload", "clipboard"], elem_id="upload",
                        height=400,
                    )  # fmt: skip
                    with gradio.Row():
                        ask = gradio.Button("Describe", variant="primary", elem_id="describe", scale=3)
                        stop_describe = gradio.Button("Stop", elem_id="stop-describe", scale=1)
                    text = gradio.Textbox(label="Description", elem_id="description")
                    described = gradio.Markdown(elem_id="describe-status")
                with gradio.Tab("Chat", visible=talks):
                    gradio.Markdown("Ask for an image, or show one and ask about it. Reload the page to begin again.")
                    history = gradio.State([])
                    conversation = gradio.Chatbot(
                        show_label=False, elem_id="conversation", render_markdown=False, height=420, feedback_options=None,
                        buttons=[],
                    )  # fmt: skip
                    with gradio.Row():
                        said = gradio.Textbox(label="Message", placeholder="what is this?", elem_id="said", scale=3)
                        with_it: Any = gradio.Image(
                            type="filepath", image_mode=None, label="Image", sources=["upload", "clipboard"], elem_id="with-it",
                            height=160, scale=1,
                        )  # fmt: skip
                    with gradio.Row():
                        send = gradio.Button("Send", variant="primary", elem_id="send", scale=3)
                        stop_chat = gradio.Button("Stop", elem_id="stop-chat", scale=1)
                    chat_status = gradio.Markdown(elem_id="chat-status")
        # On the instances, because subclasses would need front ends of their own: nothing is fetched or decoded before the
        # queue has a place for it.
        page.preprocess_data = checked_inputs(page.preprocess_data)
        canvas.preprocess = files_of_canvas
        upload.preprocess = with_it.preprocess = lambda payload: payload and payload.path
        fresh.click(lambda: random.randrange(2**31), outputs=seed, show_progress="hidden", api_visibility="private")
        shown: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}
        generating = gradio.on(
            [button.click, *([prompt.submit] if classes is None else [])], generate,
            [prompt, negative, seed, count, guidance, temperature, decoding, lora], [gallery, status], **shown,
        )  # fmt: skip
        editing = gradio.on(
            [repaint.click, *([whole.submit] if classes is None else [])], edit, [whole, canvas, seed, guidance, temperature, lora],
            [edited, edit_status], **shown,
        )  # fmt: skip
        describing = ask.click(describe, [upload, seed, temperature, lora], [text, described], **shown)
        chatting = gradio.on(
            [send.click, said.submit], converse, [said, with_it, history, seed, temperature, lora],
            [history, conversation, said, with_it, chat_status], **shown,
        )  # fmt: skip
        events = ((stop, generating), (stop_edit, editing), (stop_describe, describing), (stop_chat, chatting))
        for halt, event in events:
            halt.click(None, cancels=[event])
    page.visitors = visitors
    return page.queue(max_size=BACKLOG)


def check_installed() -> None:
    """Raises ValueError if gradio is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("serve: gradio is not installed; pip install 'unified-npp[demo]'.")


def class_choices(config: UnifiedConfig) -> list[tuple[str, int]] | None:
    """Names and numbers of the classes of a class-conditional model, by number; None of any other model.

    A name that several classes share, and none, is told apart by the number.
    """
    if config.classes is None:
        return None
    names = config.class_names or ["class"] * config.classes
    counts = Counter(names)
    return [(name if counts[name] == 1 else f"{name} {number}", number) for number, name in enumerate(names)]


def bubbles(messages: Sequence[Any], cache: str) -> list[dict[str, Any]]:
    """A conversation as gradio shows it: a bubble for each text and image."""
    return [
        {
            "role": each["role"],
            "content": part["text"] if part["type"] == "text" else {"path": stored(part["image"], cache)},
        }
        for each in messages
        for part in each["content"]
    ]


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
