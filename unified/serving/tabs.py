"""What is on the page: settings, and the tabs. Each tab has its fields, its function and the events between them.

Needs gradio.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import gradio

from unified.decoding.config import Sampling, modes_for
from unified.pipeline.arguments import seeded
from unified.pipeline.chat import message
from unified.pipeline.metadata import describe_images
from unified.pipeline.options import GenerationOptions
from unified.pipeline.pipeline import UnifiedPipelineOutput
from unified.serving.desk import (
    IMAGES_LIMIT,
    NO_ADAPTER,
    NO_CLASS,
    Desk,
    adapter_of,
    check_request,
    followed,
    progress_text,
    stored,
    weights_of,
)
from unified.serving.uploads import check_files, files_of_canvas, fit_upload, image_and_mask, opened

SHOWN: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}


class Settings(NamedTuple):
    """The fields beside the tabs."""

    seed: Any
    guidance: Any
    temperature: Any
    lora: Any


def settings_fields(desk: Desk, usual: dict[str, Any], chosen: str) -> Settings:
    """The fields beside the tabs: seed, guidance, temperature and adapter, as ``usual`` and ``chosen`` at first."""
    with gradio.Group():
        seed = gradio.Number(0, label="Seed", info="The same seed gives the same image.", precision=0, elem_id="seed")
        fresh = gradio.Button("New seed", size="sm")
    fresh.click(lambda: random.randrange(2**31), outputs=seed, show_progress="hidden", api_visibility="private")
    guidance = gradio.Slider(
        1, max(10, usual["guidance_scale"]), usual["guidance_scale"] if desk.guided else 1, step=0.1, label="Guidance",
        info="How closely to follow the prompt; 1 is off.", elem_id="guidance", visible=desk.guided,
    )  # fmt: skip
    temperature = gradio.Slider(
        min(0.1, usual["temperature"]), max(2, usual["temperature"]), usual["temperature"], step=0.05, label="Temperature",
        info="Lower is safer, higher more varied.", elem_id="temperature",
    )  # fmt: skip
    lora = gradio.Dropdown(
        [NO_ADAPTER, *desk.engine.adapters], value=chosen, label="LoRA", info="A style trained on top of the model.",
        elem_id="lora", visible=bool(desk.engine.adapters),
    )  # fmt: skip
    return Settings(seed, guidance, temperature, lora)


def generate_tab(desk: Desk, settings: Settings, usual: str) -> None:
    """Images of a prompt or a class, shown while they are generated; ``usual`` is the decoding mode that is chosen at first."""
    prompt = subject_field(desk, "red apple", "prompt", autofocus=True)
    start, stop = start_and_stop("Generate", "generate", "stop")
    gallery = gradio.Gallery(
        show_label=False, elem_id="images", format="png", columns=2, fit_columns=False, object_fit="contain",
        buttons=["download", "fullscreen"],
    )  # fmt: skip
    status = gradio.Markdown(elem_id="status")
    with gradio.Accordion("More options", open=False):
        negative = negative_field(desk)
        count = gradio.Slider(
            1, IMAGES_LIMIT, 1, step=1, label="Images", info="Each has the next seed.", elem_id="count"
        )
        suitable = {} if desk.remote else modes_for(desk.config)
        modes = [(mode.about, name) for name, mode in suitable.items()] or [("plain", "plain")]
        decoding = gradio.Dropdown(modes, value=usual, label="Decoding", elem_id="decoding", visible=not desk.remote)

    def generate(
        subject: Any, unlike: Any, seed: float, number: float, guidance: float, temperature: float, mode: str, lora: str,
        request: gradio.Request,
    ) -> Iterator[Any]:  # fmt: skip
        with desk.answering(request):
            prompt_text, negative_text = (subject, unlike) if desk.classes is None else ("", "")
            check_request(prompt_text, negative_text, seed, number)
            seeds = [int(seed) + i for i in range(int(number))]
            given: dict[str, Any] = {"guidance_scale": guidance, "temperature": temperature, "decoding": mode}
            images = desk.wanted(subject, unlike)
            job = desk.engine.submit(
                options=GenerationOptions(num_images_per_prompt=len(seeds), **given), adapter=adapter_of(lora),
                generator=seeded(int(seed), len(seeds)), **images,
            )  # fmt: skip
            about = f"guidance {guidance:g}, temperature {temperature:g}, LoRA {lora}"

            def show(output: UnifiedPipelineOutput) -> tuple[list[tuple[str, str]], str]:
                if not desk.remote:  # whose images say of themselves what they can
                    describe_images(
                        desk.pipe, output.images, [desk.in_words(subject)] * len(seeds), seeds, given,
                        images.get("negative_prompt"), adapters=weights_of(lora),
                    )  # fmt: skip
                paths = [stored(image, gallery.GRADIO_CACHE) for image in output.images]
                captions = [f"seed {each}" for each in seeds]
                return list(zip(paths, captions, strict=True)), progress_text(output.codes, about)

            yield from followed(job, show)

    fields = [prompt, negative, settings.seed, count, settings.guidance, settings.temperature, decoding, settings.lora]
    event = gradio.on(begins(desk, start, prompt), generate, fields, [gallery, status], **SHOWN)
    stop.click(None, cancels=[event])


def edit_tab(desk: Desk, settings: Settings) -> None:
    """An image with a painted part, which is generated again."""
    gradio.Markdown("Upload an image, paint over the part that shall change, and say what the whole image shows.")
    whole = subject_field(desk, "green apple", "whole")
    start, stop = start_and_stop("Change", "repaint", "stop-edit")
    with gradio.Row():
        canvas: Any = gradio.ImageEditor(
            type="pil", label="Image", sources=["upload", "clipboard"], layers=False, transforms=[], height=420, elem_id="canvas",
        )  # fmt: skip
        edited = gradio.Image(
            label="Result", format="png", interactive=False, height=420, elem_id="edited", buttons=["download", "fullscreen"],
        )  # fmt: skip
    status = gradio.Markdown(elem_id="edit-status")
    canvas.preprocess = files_of_canvas  # on the instance, because a subclass would need its own front end

    def edit(
        subject: Any, files: Any, seed: float, guidance: float, temperature: float, lora: str, request: gradio.Request
    ) -> Iterator[Any]:
        with desk.answering(request):
            check_request(subject if desk.classes is None else "", "", seed, 1)
            images = desk.wanted(subject)
            if desk.classes is None:
                desk.engine.check_length([subject])
            background, layers = files
            check_files(background, layers)
            generators = seeded(int(seed), 1)
            given: dict[str, Any] = {"guidance_scale": guidance, "temperature": temperature}
            about = f"seed {int(seed)}, guidance {guidance:g}, temperature {temperature:g}, LoRA {lora}"

            def work() -> Iterator[UnifiedPipelineOutput]:
                image, mask = image_and_mask(background, layers, desk.size)  # one request's at a time
                found: Iterator[UnifiedPipelineOutput] = desk.pipe.stream(
                    image=image, mask_image=mask, generator=generators, **images, **given
                )
                return found

            def show(output: UnifiedPipelineOutput) -> tuple[Any, str]:
                describe_images(
                    desk.pipe, output.images, [desk.in_words(subject)], [int(seed)], given, edit="inpaint",
                    adapters=weights_of(lora),
                )  # fmt: skip
                return output.images[0], progress_text(output.codes, about)

            yield from followed(desk.engine.alone(work, adapter_of(lora)), show)

    fields = [whole, canvas, settings.seed, settings.guidance, settings.temperature, settings.lora]
    event = gradio.on(begins(desk, start, whole), edit, fields, [edited, status], **SHOWN)
    stop.click(None, cancels=[event])


def describe_tab(desk: Desk, settings: Settings) -> None:
    """A caption of an image."""
    gradio.Markdown(
        "For models trained on images followed by their captions (`data.captioning`); others write nonsense."
    )
    upload = upload_field("upload", height=400)
    start, stop = start_and_stop("Describe", "describe", "stop-describe")
    text = gradio.Textbox(label="Description", elem_id="description")
    status = gradio.Markdown(elem_id="describe-status")

    def describe(file: Any, seed: float, temperature: float, lora: str, request: gradio.Request) -> Iterator[Any]:
        with desk.answering(request):
            check_request("", "", seed, 1)
            check_files(file, [])
            generators = seeded(int(seed), 1)

            def work() -> list[str]:
                image = fit_upload(opened(file), desk.size)
                found: list[str] = desk.pipe.caption(image, temperature=temperature, generator=generators)
                return found

            about = f"Done: seed {int(seed)}, temperature {temperature:g}, LoRA {lora}."
            yield from followed(desk.engine.alone(work, adapter_of(lora)), lambda caption: (caption, about))

    event = start.click(describe, [upload, settings.seed, settings.temperature, settings.lora], [text, status], **SHOWN)
    stop.click(None, cancels=[event])


def chat_tab(desk: Desk, settings: Settings) -> None:
    """A conversation of texts and images."""
    gradio.Markdown("Ask for an image, or show one and ask about it. Reload the page to begin again.")
    kept = gradio.State([])
    conversation = gradio.Chatbot(
        show_label=False, elem_id="conversation", render_markdown=False, height=420, feedback_options=None, buttons=[],
    )  # fmt: skip
    with gradio.Row():
        said = gradio.Textbox(label="Message", placeholder="what is this?", elem_id="said", scale=3)
        with_it = upload_field("with-it", height=160, scale=1)
    start, stop = start_and_stop("Send", "send", "stop-chat")
    status = gradio.Markdown(elem_id="chat-status")

    def converse(
        words: str, file: Any, history: list[Any], seed: float, temperature: float, lora: str, request: gradio.Request
    ) -> Iterator[Any]:
        """A turn of the user, and the reply as it grows: the conversation as it is kept and as it is shown, empty fields."""
        with desk.answering(request):
            check_request(words, "", seed, 1)
            if not (words or "").strip():
                raise ValueError("message: empty; write something.")
            if file is not None:
                check_files(file, [])
            generators = seeded(int(seed) + len(history), 1)  # the same words again need not get the same reply
            asked: list[Any] = []

            def work() -> Iterator[tuple[list[Any], str]]:
                shown, reply = [] if file is None else [fit_upload(opened(file), desk.size)], list[Any]()
                asked.append(message("user", *shown, words.strip()))
                sampling = Sampling(temperature=temperature)
                for reply in desk.pipe.stream_chat([*history, *asked], text_sampling=sampling, generator=generators):
                    yield reply, "Writing ..."
                yield reply, "Done."

            def show(state: tuple[list[Any], str]) -> tuple[Any, ...]:
                reply, progress = state
                messages = [*history, *asked, *([message("assistant", *reply)] if reply else [])]
                return messages, bubbles(messages, conversation.GRADIO_CACHE), "", None, progress

            yield from followed(desk.engine.alone(work, adapter_of(lora)), show, 4)

    fields = [said, with_it, kept, settings.seed, settings.temperature, settings.lora]
    event = gradio.on(
        [start.click, said.submit], converse, fields, [kept, conversation, said, with_it, status], **SHOWN
    )
    stop.click(None, cancels=[event])


def subject_field(desk: Desk, placeholder: str, elem_id: str, **options: Any) -> Any:
    """Where a prompt is written, or a class is chosen: typing narrows the choice."""
    if desk.classes is None:
        return gradio.Textbox(label="Prompt", placeholder=placeholder, elem_id=elem_id, **options)
    return gradio.Dropdown(desk.classes, value=desk.classes[0][1], label="Class", elem_id=elem_id, filterable=True)


def negative_field(desk: Desk) -> Any:
    """What to steer away from."""
    about = "What to steer away from."
    if desk.classes is None:
        return gradio.Textbox(label="Negative prompt", info=about, elem_id="negative", visible=not desk.remote)
    choices: list[Any] = [("none", NO_CLASS), *desk.classes]
    return gradio.Dropdown(choices, value=NO_CLASS, label="Negative class", info=about, elem_id="negative")


def upload_field(elem_id: str, **options: Any) -> Any:
    """Where an image is uploaded; the function gets the file's path, undecoded."""
    field: Any = gradio.Image(
        type="filepath", image_mode=None, label="Image", sources=["upload", "clipboard"], elem_id=elem_id, **options
    )
    field.preprocess = lambda payload: payload and payload.path
    return field


def start_and_stop(label: str, start: str, stop: str) -> tuple[Any, Any]:
    """Two buttons in a row, by their ids."""
    with gradio.Row():
        return (
            gradio.Button(label, variant="primary", elem_id=start, scale=3),
            gradio.Button("Stop", elem_id=stop, scale=1),
        )


def begins(desk: Desk, button: Any, subject: Any) -> list[Any]:
    """What begins: the button and, in a prompt, the enter key."""
    return [button.click, *([subject.submit] if desk.classes is None else [])]


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
