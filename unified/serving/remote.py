"""Images from an engine that serves an exported model: prompts to its OpenAI-compatible server, codes back, decoded here."""

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from reprlib import repr as short
from types import TracebackType
from typing import Any, NamedTuple

import httpx2
import torch
from PIL import Image
from torch import Tensor

from unified.config import UnifiedConfig
from unified.files import read_json
from unified.pipeline.arguments import as_prompts, check_parts, check_room, code_grid, image_prompt
from unified.pipeline.editing import unfinished_images
from unified.pipeline.metadata import describe, model_name
from unified.pipeline.options import SAMPLING, GenerationOptions, check_defaults, check_whole
from unified.pipeline.pipeline import UnifiedPipelineOutput
from unified.serving.export import EXPORT_FILE, PROMPT_FIELDS
from unified_tokenizers import AutoImageTokenizer, load_text_tokenizer
from unified_tokenizers.fields import is_whole
from unified_tokenizers.images import to_pil

BATCH = 16  # images that are decoded at once
AGAIN = (429, 502, 503, 504)  # answers of a server that is busy or being started
GUIDANCE_HINT = " Guidance needs a server started by `python -m unified_vllm`; guidance_scale=1 does without."
WAIT = 0.5  # seconds before the first further try; twice as long before each one after it


class Served(NamedTuple):
    """What a server says of itself: the model's name, and how many tokens it takes if it says so."""

    name: str
    room: int | None


class Images(NamedTuple):
    """Images to be: the caption of each, the ids before its codes, and the code grid of all."""

    texts: list[str]
    rows: list[tuple[int, ...]]
    grid: tuple[int, int]


class RemotePipeline:
    """An exported model that a server generates with; only the tokenizers are loaded here.

    A server samples with its own noise: a seed gives the same image again there, not the one of a pipeline here, and is not
    among what an image says of itself. Guidance needs a server with the plugin in ``engines/unified_vllm``.

    Args:
        folder: written by ``unified export``; the server has the same one.
        url: such as ``http://127.0.0.1:8000``.
        concurrency: requests that are under way at once.
        timeout: seconds that an answer may take.
        retries: further tries after a failed connection, or an answer that says busy.
        api_key: sent along, if the server asks for one.

    Raises:
        ValueError: for a damaged folder, or arguments out of their range.
    """

    def __init__(
        self,
        folder: str | Path,
        url: str,
        concurrency: int = 8,
        timeout: float = 600.0,
        retries: int = 3,
        api_key: str | None = None,
    ):
        check_whole("concurrency", concurrency)
        check_whole("retries", retries, least=0)
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
            raise ValueError(f"timeout: {timeout!r} must be a number of seconds above 0.")
        if api_key is not None and not (isinstance(api_key, str) and api_key.isascii() and api_key.isprintable()):
            raise ValueError("api_key: it is not of printable ASCII characters, as headers are; give another one.")
        self.folder, self.concurrency, self.retries, self.timeout = Path(folder), concurrency, retries, timeout
        self.config, self.sampling = read_export(self.folder)
        self.image_tokenizer = AutoImageTokenizer.from_pretrained(self.folder / "image_tokenizer")
        self.text_tokenizer = load_text_tokenizer(self.folder / "text_tokenizer")
        check_parts(self.config, self.image_tokenizer, self.text_tokenizer)
        self.url = base_url(url)
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        limits = httpx2.Limits(max_connections=concurrency)
        self._http = httpx2.Client(headers=headers, timeout=timeout, limits=limits)

    def __enter__(self) -> "RemotePipeline":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.close()

    def __call__(
        self, prompt: str | Sequence[str], options: GenerationOptions | None = None, seed: int = 0
    ) -> UnifiedPipelineOutput:
        """Images for prompts, those of a prompt side by side; image i has the seed ``seed + i``.

        Args:
            prompt: one caption or several.
            options: how they are sampled; None, here and in a field, for the defaults of the export.
            seed: of the first image.

        Raises:
            ValueError: for what a pipeline refuses too, what such a server cannot do, a request that it refuses, or an answer that
                is not this model's.
            ConnectionError: if it cannot be reached.
            TimeoutError: if it does not answer in time.
        """
        given = (options or GenerationOptions()).filled(self.sampling)
        images = self.arrange(prompt, given)
        served = self.served()
        bodies = self.requests(images, given, seed, served)
        if given.sampling.guided:
            self._check_guides(served)
        with ThreadPoolExecutor(self.concurrency) as pool:
            waiting = [pool.submit(self.codes, body) for body in bodies]
            try:
                codes = torch.tensor([each.result() for each in waiting]).reshape(-1, *images.grid)
            finally:
                for each in waiting:
                    each.cancel()
        decoded = self.decode(codes)
        self.describe(decoded, images.texts, given)
        return UnifiedPipelineOutput(decoded, codes)

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of the first grid that the model was trained on."""
        stride = self.image_tokenizer.downsample
        height, width = code_grid(self.config, stride, None, None)
        return height * stride, width * stride

    def served(self) -> Served:
        """The first model that the server lists.

        Raises:
            ValueError, ConnectionError, TimeoutError: as :meth:`__call__`.
        """
        listed = self._answer("GET", "/v1/models").get("data")
        first = listed[0] if isinstance(listed, list) and listed else None
        if not isinstance(first, dict) or not isinstance(first.get("id"), str):
            raise ValueError(f"server: {self.url} lists no models; give the address of an OpenAI-compatible server.")
        room = first.get("max_model_len")
        return Served(first["id"], room if isinstance(room, int) else None)

    def arrange(self, prompt: str | Sequence[str], options: GenerationOptions) -> Images:
        """The images for prompts and filled options. Raises ValueError for those that a pipeline or any server refuses."""
        check_remote(options, self.config)
        prompts = as_prompts(prompt)
        grid = code_grid(self.config, self.image_tokenizer.downsample, options.height, options.width)
        check_room(prompts, self.text_tokenizer, self.config, grid, "prompt")
        texts = [text for text in prompts for _ in range(options.num_images_per_prompt)]
        rows = [image_prompt(text, self.text_tokenizer, self.config, grid).ids for text in texts]
        return Images(texts, rows, grid)

    def requests(
        self, images: Images, options: GenerationOptions, seed: int, served: Served, guided: bool | None = None
    ) -> list[dict[str, Any]]:
        """The body of a request for each image; image i has the seed ``seed + i``.

        Args:
            images: from :meth:`arrange`.
            options: filled.
            seed: of the first image.
            served: what is asked.
            guided: whether the server has guidance; None leaves it to the scale.

        Raises:
            ValueError: if the server has no room for them.
        """
        guided = options.sampling.guided if guided is None else guided
        longest, steps = max(map(len, images.rows)) + guided, images.grid[0] * images.grid[1]
        if served.room is not None and longest + steps > served.room:
            raise ValueError(
                f"server: {self.url} takes {served.room} tokens, {longest + steps} are needed; start it with a larger maximum "
                "length."
            )
        return [
            {"model": served.name, **request_of(self.config, row, steps, options, seed + number, guided)}
            for number, row in enumerate(images.rows)
        ]

    def codes(self, body: dict[str, Any], note: Callable[[str], None] = lambda text: None) -> list[int]:
        """The codes that a request gets.

        Args:
            body: from :meth:`requests`.
            note: called with what is wrong before a further try, in words without the server's address.

        Raises:
            ValueError, ConnectionError, TimeoutError: as :meth:`__call__`.
        """
        return codes_of(self._answer("POST", "/v1/completions", body, note), body, self.config, self.url)

    def probe(self, served: Served, guided: bool) -> None:
        """Ask for one code, as a server with guidance or one without is asked.

        Raises:
            ValueError, ConnectionError, TimeoutError: as :meth:`__call__`; ValueError if the server is of the other kind.
        """
        plain = GenerationOptions(guidance_scale=1.0, guidance_schedule="constant").filled(self.sampling)
        (body,) = self.requests(self.arrange("a", plain), plain, 0, served, guided)
        self.codes({**body, "max_tokens": 1})

    def _check_guides(self, served: Served) -> None:
        """Raises ValueError if a server answers without guidance: it may check no ids, and sample after any prompt."""
        try:
            self.probe(served, guided=False)
        except ValueError:
            return
        raise ValueError(f"guidance_scale: {self.url} samples without guidance.{GUIDANCE_HINT}")

    @torch.no_grad()
    def decode(self, codes: Tensor) -> list[Image.Image]:
        """Images of codes ``(N, h, w)``, -1 where there is none yet."""
        return [image for part in codes.split(BATCH) for image in to_pil(unfinished_images(self.image_tokenizer, part))]

    def describe(self, images: Sequence[Image.Image], texts: Sequence[str], options: GenerationOptions) -> None:
        """Attach captions, filled options and the model's name to images."""
        settings = {each: getattr(options, each) for each in SAMPLING}
        for image, text in zip(images, texts, strict=True):
            size = {"height": image.height, "width": image.width}
            describe(image, prompt=text, settings=size | settings, model=model_name(str(self.folder)))

    def _answer(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> dict[str, Any]:
        trouble = ""
        for attempt in range(self.retries + 1):
            if attempt:
                note(f"{trouble}; asked again ({attempt} of {self.retries}).")
                time.sleep(WAIT * 2 ** (attempt - 1))
            last = attempt == self.retries
            try:
                answer = self._http.request(method, self.url + path, json=body)
            except httpx2.TimeoutException as error:  # not again: the server may still be at work on it
                raise TimeoutError(
                    f"server: {self.url} did not answer in {self.timeout:g} seconds; give it more time, or ask for less at once."
                ) from error
            except httpx2.TransportError as error:
                if last:
                    raise ConnectionError(
                        f"server: {self.url} cannot be reached ({error}); start it, or correct the address."
                    ) from error
                trouble = "The engine cannot be reached"
                continue
            if answer.status_code not in AGAIN or last:
                break
            trouble = f"The engine is busy ({answer.status_code})"
        if answer.status_code != 200:
            raise ValueError(
                f"server: {self.url} refuses {path} ({answer.status_code}): {reason_of(answer)}{hint_of(body)}"
            )
        try:
            content = answer.json()
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"server: {self.url} answers {path} with no JSON ({error}); is it the right one?"
            ) from error
        if not isinstance(content, dict):
            raise ValueError(f"server: {self.url} answers {path} with {short(content)}; is it the right one?")
        return content


def read_export(folder: Path) -> tuple[UnifiedConfig, dict[str, Any]]:
    """The configuration of an exported model and its sampling defaults. Raises ValueError for any other folder."""
    file = folder / EXPORT_FILE
    if not file.is_file():
        raise ValueError(f"pipeline: {str(folder)!r} has no {EXPORT_FILE}; give a folder written by `unified export`.")
    about = read_json(file, "pipeline")
    names = ("codebook_size", "image_grids", "boi_token_id", "eoi_token_id")
    prints = ("image_tokenizer_fingerprint", "text_tokenizer_fingerprint")
    missing = [name for name in ("first_code", *names, *prints) if name not in about]
    if missing:
        raise ValueError(f"pipeline: {str(file)!r} lacks {', '.join(missing)}; export the pipeline again.")
    text, sizes = read_json(folder / "config.json", "pipeline"), [about["first_code"], about["codebook_size"]]
    if not all(map(is_whole, sizes)) or sum(sizes) != text.get("vocab_size"):
        raise ValueError(
            f"pipeline: config.json of {str(folder)!r} has {text.get('vocab_size')!r} tokens, {EXPORT_FILE} first_code "
            f"{sizes[0]!r} and codebook_size {sizes[1]!r}; export the pipeline again."
        )
    text = {**text, "vocab_size": sizes[0]}
    prompts = [name for name in PROMPT_FIELDS if name in about]  # earlier exports have none
    fields = {name: about[name] for name in (*names, *prints, *prompts)}
    config = UnifiedConfig(text_config=text, positions="1d", **fields)
    known = ("guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p")
    return config, check_defaults({name: about[name] for name in known if name in about})


def base_url(url: str) -> str:
    """The address without ``/v1`` and slashes at its end. Raises ValueError if it is none of HTTP."""
    try:
        parts = httpx2.URL(url)
        usable = parts.scheme in ("http", "https") and bool(parts.host)
    except (httpx2.InvalidURL, TypeError):
        usable = False
    if not usable:
        raise ValueError(f"server: {url!r} is no address; give one such as http://127.0.0.1:8000.")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def check_remote(options: GenerationOptions, config: UnifiedConfig) -> None:
    """Raises ValueError for options that other engines do not have, or not for this model."""
    if options.sampling.guided and config.null_prompt:
        raise ValueError(
            f"guidance_scale: a server steers away from an empty prompt, the model from {config.null_prompt!r}; use "
            "guidance_scale 1, or `unified serve`."
        )
    if options.steer:
        raise ValueError("steer: a server has no adapters that steer; leave it out, or leave out the server.")
    if options.guidance_schedule != "constant":
        raise ValueError(f"guidance_schedule: {options.guidance_schedule!r}, a server knows 'constant' alone.")
    if options.decoding != "plain":
        raise ValueError(f"decoding: {options.decoding!r}, a server decodes in its own way; leave it out.")


def request_of(
    config: UnifiedConfig, row: Sequence[int], steps: int, options: GenerationOptions, seed: int, guided: bool
) -> dict[str, Any]:
    """The body of a request for ``steps`` codes after a row of ids, without the model's name.

    To a guided server a null token stands before ``<boi>``, the first id behind the codes: a server without guidance refuses
    it. Such a server samples codes alone; for any other one the ids are named.
    """
    sampling, first = options.sampling, config.vocabulary.text_vocab_size
    behind = first + config.codebook_size
    body = {
        "max_tokens": steps, "ignore_eos": True, "seed": seed, "return_token_ids": True, "top_p": sampling.top_p,
        "top_k": sampling.top_k, "temperature": 0.0 if sampling.top_k == 1 else sampling.temperature,
    }  # fmt: skip
    if guided:
        scale = {"guidance_scale": float(sampling.guidance_scale)}
        return {**body, "prompt": [*row[:-1], behind, row[-1]], "vllm_xargs": scale}
    return {**body, "prompt": list(row), "allowed_token_ids": list(range(first, behind))}


def codes_of(answer: dict[str, Any], body: dict[str, Any], config: UnifiedConfig, url: str) -> list[int]:
    """The codes in an answer to a request. Raises ValueError if they are too few, too many, or not codes of the model."""
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    found = choice.get("token_ids") if isinstance(choice, dict) else None
    if not isinstance(found, list) or not all(type(each) is int for each in found):
        raise ValueError(f"server: {url} answers without token_ids; it must know `return_token_ids`, as vLLM does.")
    read = choice.get("prompt_token_ids") if isinstance(choice, dict) else None
    if read is not None and read != body["prompt"]:
        raise ValueError(f"server: {url} read the prompt {short(read)}, sent was {short(body['prompt'])}.")
    if len(found) != body["max_tokens"]:
        raise ValueError(f"server: {url} answers with {len(found)} codes, asked were {body['max_tokens']}.")
    first = config.vocabulary.text_vocab_size
    codes = [each - first for each in found]
    wrong = [each for each in codes if not 0 <= each < config.codebook_size]
    if wrong:
        raise ValueError(
            f"server: {url} answers with the token {wrong[0] + first}, codes are {first} to {first + config.codebook_size - 1}; "
            "it serves another model."
        )
    return codes


def reason_of(answer: httpx2.Response) -> str:
    """What an answer says of an error, in one line."""
    try:
        content = answer.json()
        error = content.get("error", content) if isinstance(content, dict) else content
        text = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, RecursionError):
        text = answer.text
    line = " ".join(str(text if isinstance(text, str) else json.dumps(text)).split())
    return line[:300].rstrip(".") + "."


def hint_of(body: dict[str, Any] | None) -> str:
    """How an error of a request ends: the likeliest reason beside a damaged one."""
    if body is None:
        return ""
    if "vllm_xargs" in body:
        return GUIDANCE_HINT
    return " A server with guidance wants a guidance_scale; another model has other ids."
