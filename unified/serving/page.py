"""The web page of a pipeline: a prompt or a class in, the image out as it is generated; edits of a mask; captions; conversations.

Needs gradio.
"""

import importlib.util
from typing import Any

from unified.lora.base import base_of
from unified.pipeline.pipeline import UnifiedPipeline
from unified.serving.desk import NO_ADAPTER, Desk
from unified.serving.engine import Engine
from unified.serving.remote_engine import RemoteEngine
from unified.serving.uploads import checked_inputs

UPLOAD_LIMIT = 8 << 20  # bytes
CLIENT_LIMIT = 4  # requests of one client
BACKLOG = 256  # requests that gradio keeps until it looks at them
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
    from unified.serving.tabs import chat_tab, describe_tab, edit_tab, generate_tab, settings_fields

    desk = Desk(engine, Visitors(per_client))
    if not desk.remote:
        desk.pipe.set_progress_bar_config(disable=True)
    usual = {"guidance_scale": 1.5, "temperature": 0.85, "decoding": "plain", **desk.pipe.sampling}
    with gradio.Blocks(title="unified", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gradio.Markdown(introduction(desk))
        with gradio.Row():
            with gradio.Column(scale=2, min_width=280):
                settings = settings_fields(desk, usual, chosen)
            with gradio.Column(scale=5), gradio.Tabs():
                with gradio.Tab("Generate"):
                    generate_tab(desk, settings, usual["decoding"])
                with gradio.Tab("Edit", visible=not desk.remote):
                    edit_tab(desk, settings)
                with gradio.Tab("Describe", visible=desk.classes is None and not desk.remote):
                    describe_tab(desk, settings)
                with gradio.Tab("Chat", visible=desk.config.chat_template is not None and not desk.remote):
                    chat_tab(desk, settings)
        # On the instance: nothing is fetched or decoded before the queue has a place for it.
        page.preprocess_data = checked_inputs(page.preprocess_data)
    page.visitors = desk.visitors
    return page.queue(max_size=BACKLOG)


def check_installed() -> None:
    """Raises ValueError if gradio is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("serve: gradio is not installed; pip install 'unified-npp[demo]'.")


def introduction(desk: Desk) -> str:
    """The head of the page: what the model does, its size and that of its images."""
    if desk.remote:
        able, here = "from text", "runs in another engine"
    else:
        able = "from text, changes parts of them, and describes them"
        if desk.classes is not None:
            able = "of classes and changes parts of them"
        here = f"has {parameters(desk.pipe)}"
    height, width = desk.size
    return (
        f"# unified\nOne language model that generates images {able}. "
        f"This one {here} and generates {width} × {height} pixels."
    )


def parameters(pipe: UnifiedPipeline) -> str:
    """Size of the language model in words."""
    count = base_of(pipe.model).num_parameters()
    for size, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if count >= size:
            return f"{count / size:.1f} {name} parameters"
    return f"{count} parameters"
