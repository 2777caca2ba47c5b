"""The server of the web page: its limits, names and password, and the adapters that it offers."""

import hmac
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from unified.lora.base import check_base
from unified.pipeline.pipeline import UnifiedPipeline
from unified.serving.address import answered_hosts, bracketed, is_everywhere
from unified.serving.desk import NO_ADAPTER
from unified.serving.engine import Engine
from unified.serving.page import CSS, UPLOAD_LIMIT, build_demo
from unified.serving.remote import RemotePipeline
from unified.serving.remote_engine import RemoteEngine

SESSION_LIMIT = 100  # whose state gradio keeps, about 200 KB each; one that is dropped is made again


def launch(
    page: Any,
    host: str = "127.0.0.1",
    allow_hosts: Sequence[str] = (),
    threads: int = 40,
    password: str | None = None,
    **options: Any,
) -> Any:
    """Start the page's server with its limits and looks; nothing is fetched from elsewhere or reported.

    Args:
        page: from :func:`build_demo`.
        host: where to listen; see :func:`unified.serving.address.answered_hosts` for the names that are answered.
        allow_hosts: further names.
        threads: of the server.
        password: asked for, with any user name, before the page is shown; None lets everybody in.
        options: further arguments of gradio's ``launch``.

    Raises:
        ValueError: for what cannot be a host name.
    """
    import gradio

    from unified.serving.guard import guards

    around = guards(page.visitors, answered_hosts(host, allow_hosts), is_everywhere(host), UPLOAD_LIMIT + (64 << 10))

    def matches(user: str, given: str) -> bool:
        return hmac.compare_digest(given.encode(), (password or "").encode())

    theme = gradio.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return page.launch(
        server_name=bracketed(host), app_kwargs={"middleware": around}, max_file_size=UPLOAD_LIMIT, max_threads=threads,
        state_session_capacity=SESSION_LIMIT, show_error=False, share=False, ssr_mode=False, enable_monitoring=False,
        footer_links=[], theme=theme, css=CSS, auth=matches if password else None, **options,
    )  # fmt: skip


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
    max_rows: int,
    waiting: int,
    per_client: int,
    **address: Any,
) -> None:
    """Run the page until interrupted.

    Args:
        pipe: what answers.
        loras: folders of adapters to choose from.
        chosen: an adapter beside ``loras`` that is active at first.
        max_rows, waiting: as for :class:`Engine`.
        per_client: as for :func:`build_demo`.
        address: as for :func:`launch`.
    """
    names = load_adapters(pipe, [*([] if chosen is None else [chosen]), *loras])
    with closing(Engine(pipe, max_rows, waiting)) as engine:
        page = build_demo(engine, NO_ADAPTER if chosen is None else names[0], per_client)
        launch(page, threads=40 + max_rows + waiting, **address)


def serve_remote(pipe: RemotePipeline, waiting: int, per_client: int, **address: Any) -> None:
    """Run the page over a server's engine until interrupted; arguments as for :func:`serve`, the first of them what asks it."""
    with closing(RemoteEngine(pipe, waiting)) as engine:
        page = build_demo(engine, per_client=per_client)
        launch(page, threads=40 + pipe.concurrency + waiting, **address)
