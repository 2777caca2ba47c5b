"""Continuous batching: requests join and leave a running batch, each row in its own modality.

All rows share the cache column that is written next. A request may join at any step: its prompt is copied to the columns
just before, and a bias hides what other requests left there. A step reads the columns from the oldest running request on;
when the last column is written, those move back to the front. A guided request holds a second row for its unconditional
side.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unified.decoding.config import Sampling
from unified.decoding.decode import sample_next, span_coordinates
from unified.decoding.decoder import Decoder
from unified.decoding.kv_cache import KeyValueCache
from unified.decoding.prefill import Prompt, prefill
from unified.decoding.sampling import PositionNoise, sample_codes
from unified.prediction.coordinates import span_offsets
from unified.prediction.merge import Grid
from unified.sequence import ImageSegment, Segment, TextSegment


@dataclass(eq=False)
class Request:
    """What to continue, and how far.

    Args:
        prompt: the row; if it ends with ``<boi>`` an image comes first, else text.
        grid: code grid of its images.
        generator: seeds its text; an image is the one that :func:`unified.decoding.iterate_codes` samples with it.
        image_sampling, text_sampling: how codes and text tokens are sampled.
        negative: the unconditional row, ending with ``<boi>``; needed if ``image_sampling.guided``.
        max_new_tokens: text tokens that it may write; 0 ends the row with its first image.
        max_images: images that it may generate; text cannot open another one after that.
        text_ids: size of the text tokenizer's vocabulary, where the model's is larger; None for all of the model's.
    """

    prompt: Prompt
    grid: Grid
    generator: torch.Generator
    image_sampling: Sampling = field(default_factory=Sampling)
    text_sampling: Sampling = field(default_factory=Sampling)
    negative: Prompt | None = None
    max_new_tokens: int = 0
    max_images: int = 1
    text_ids: int | None = None

    @property
    def rows(self) -> int:
        """Rows of the batch that it takes."""
        return 2 if self.image_sampling.guided and self.max_images else 1


class _Row:
    """A request in the batch: where it stands and what it has generated."""

    def __init__(self, request: Request, indices: list[int], decoder: Decoder):
        self.request, self.indices, self.decoder = request, indices, decoder
        generator = request.generator.clone_state()
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
        text_ids = decoder.model.config.vocabulary.text_vocab_size
        self.text_noise = PositionNoise([torch.Generator().manual_seed(seed)], text_ids, decoder.model.device)
        self.image_noise: PositionNoise | None = None
        self.segments: list[Segment] = []
        self.text: list[int] = []
        self.codes: list[int] = []
        self.written = self.images = 0
        self.first = 0  # column of the cache where it begins
        self.position = [0.0, 0.0]  # next coordinate of the row and of its unconditional side
        self.span: Tensor | None = None  # (rows, h*w, ...) positions of the image being generated
        self.scales: list[float] = []  # guidance of its codes
        self.next: int | None = None  # a token that has to follow
        self.finished = False

    def open_image(self) -> None:
        self.codes = []
        grid, sampling = self.request.grid, self.request.image_sampling
        self.scales = sampling.scales(grid[0] * grid[1])
        size = self.decoder.model.config.codebook_size
        self.image_noise = PositionNoise([self.request.generator], size, self.decoder.model.device)
        start = torch.tensor(self.position[: len(self.indices)], device=self.decoder.model.device)
        self.span = self.decoder.positions(span_coordinates(self.decoder.model, start, grid))

    def close_image(self) -> None:
        config = self.decoder.model.config
        self.segments.append(ImageSegment(torch.tensor(self.codes).reshape(self.request.grid)))
        _, advance = span_offsets(self.request.grid, 1, *config.coordinates)
        self.position[0] += advance
        self.span = None
        self.images += 1
        self.next = config.eoi_token_id
        self.finished = self.written >= self.request.max_new_tokens

    def close_text(self) -> None:
        if self.text:
            self.segments.append(TextSegment(self.text))
        self.text = []


class Batcher:
    """Keeps ``max_rows`` rows busy: submit requests at any time, call :meth:`step` until they are done.

    Args:
        decoder: from :func:`unified.decoding.make_decoder`.
        max_rows: rows of the batch.
        length: maximal number of tokens of a request, prompt included.
    """

    def __init__(self, decoder: Decoder, max_rows: int, length: int):
        self.decoder, self.length = decoder, length
        self.free = list(range(max_rows))[::-1]  # the lowest one is taken first
        self.max_rows = max_rows
        self.waiting: deque[Request] = deque()
        self.rows: list[_Row] = []
        self.failed: dict[Request, ValueError] = {}  # requests that :meth:`step` gave up
        self._cache = KeyValueCache(length + max(1, length // 4))  # columns move back every length // 4 steps or later
        self._column = 0
        dtype, device = decoder.model.dtype, decoder.model.device
        self._bias = torch.full((max_rows, 1, 1, self._cache.length), float("-inf"), dtype=dtype, device=device)
        self._hidden = torch.zeros(max_rows, decoder.model.backbone.config.hidden_size, dtype=dtype, device=device)
        self._nowhere = decoder.positions(torch.zeros(max_rows, 1, 2, device=device))

    def submit(self, request: Request) -> None:
        """Queue a request. Raises ValueError as :meth:`check`."""
        self.check(request)
        self.waiting.append(request)

    def check(self, request: Request) -> None:
        """Refuse a request that cannot be run; may be called from any thread.

        Raises:
            ValueError: if it is too long, guidance lacks its negative row, or its schedule is refused.
        """
        guided = request.rows == 2
        if guided and request.negative is None:
            raise ValueError("negative: guidance needs an unconditional row ending with <boi>.")
        if request.max_images:
            request.image_sampling.check_schedule(request.grid[0] * request.grid[1])
        images = request.max_images * (request.grid[0] * request.grid[1] + 2)
        longest = max(len(request.prompt.ids), len(request.negative.ids) if guided and request.negative else 0)
        if longest + images + request.max_new_tokens > self.length:
            raise ValueError(
                f"request: {longest} tokens and up to {images + request.max_new_tokens} new ones, a row holds {self.length}; "
                "shorten the prompt or lower max_new_tokens or max_images."
            )
        if request.rows > self.max_rows:
            raise ValueError(f"max_rows: {self.max_rows} cannot hold a guided request, which takes 2.")

    def partial(self, request: Request) -> list[int]:
        """Codes so far of the image that a request generates; empty before it has begun."""
        return next((list(row.codes) for row in self.rows if row.request is request), [])

    def cancel(self, request: Request) -> None:
        """Forget a request, waiting or running; its rows are free for the next one."""
        if request in self.waiting:
            self.waiting.remove(request)
        for row in [row for row in self.rows if row.request is request]:
            self._release(row)

    def _release(self, row: _Row) -> None:
        self.rows.remove(row)
        self.free = sorted(self.free + row.indices, reverse=True)

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self.rows or self.waiting)

    def run(self, requests: Sequence[Request]) -> list[list[Segment]]:
        """Segments that each request produced, in the order given. Raises ValueError if one of them failed."""
        for request in requests:
            self.submit(request)
        results: dict[Request, list[Segment]] = {}
        while self.busy:
            results.update(self.step())
            if self.failed:
                raise next(iter(self.failed.values()))
        return [results[request] for request in requests]

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, list[Segment]]]:
        """Admit waiting requests, give every row one token; returns the requests that are finished by it.

        A request whose logits are not finite moves to :attr:`failed`; the others go on.
        """
        self._admit()
        for kind in (True, False):
            rows = [row for row in self.rows if (row.span is not None) is kind and row.next is None]
            if rows:
                (self._sample_codes if kind else self._sample_text)(rows)
        done = [row for row in self.rows if row.finished]
        for row in done:
            row.close_text()
            self._release(row)
        if self.rows:
            self._advance()
        return [(row.request, row.segments) for row in done]

    def _admit(self) -> None:
        fresh: list[_Row] = []
        while self.waiting and self.waiting[0].rows <= len(self.free):
            request = self.waiting.popleft()
            fresh.append(_Row(request, [self.free.pop() for _ in range(request.rows)], self.decoder))
        opens = self.decoder.model.config.boi_token_id
        placed = []
        for row in fresh:
            placed.append((row, 0, row.request.prompt))
            if row.request.prompt.ids[-1] == opens and len(row.indices) == 2:
                assert row.request.negative is not None  # submit has checked it
                placed.append((row, 1, row.request.negative))
        self._place(placed)
        for row in fresh:
            if row.request.prompt.ids[-1] == opens:
                row.open_image()
        self.rows += fresh

    def _place(self, placed: list[tuple[_Row, int, Prompt]]) -> None:
        """Read prompts and copy them to the columns before the next one."""
        if not placed:
            return
        state = prefill(self.decoder, [prompt for _, _, prompt in placed], 0)
        end = state.cache.end
        if not self.rows:
            self._column = 0
        if not self._cache.keys:
            for mine, theirs in ((self._cache.keys, state.cache.keys), (self._cache.values, state.cache.values)):
                mine += [t.new_zeros(self.max_rows, t.shape[1], self._cache.length, t.shape[3]) for t in theirs]
        longest = max(len(prompt.ids) for _, _, prompt in placed)
        if longest > self._column:
            self._move(longest - self._column)
        for i, (row, side, prompt) in enumerate(placed):
            index, count = row.indices[side], len(prompt.ids)
            columns = slice(self._column - count, self._column)
            row.first = columns.start if side == 0 else min(row.first, columns.start)
            for mine, theirs in ((self._cache.keys, state.cache.keys), (self._cache.values, state.cache.values)):
                for target, source in zip(mine, theirs, strict=True):
                    target[index, :, columns] = source[i, :, end - count : end]
            self._bias[index] = float("-inf")
            self._bias[index, :, :, columns] = 0.0
            self._hidden[index] = state.hidden[i]
            row.position[side] = float(state.position[i])

    @property
    def _first(self) -> int:
        """The first column that is still read."""
        return min((row.first for row in self.rows), default=self._column)

    def _move(self, by: int) -> None:
        """Move the columns that are still read."""
        first, stop = self._first, self._column
        bias = self._bias[..., first:stop].clone()
        self._bias.fill_(float("-inf"))
        self._bias[..., first + by : stop + by] = bias
        for kept in (*self._cache.keys, *self._cache.values):
            kept[:, :, first + by : stop + by] = kept[:, :, first:stop].clone()
        for row in self.rows:
            row.first += by
        self._column += by

    def _sample_codes(self, rows: list[_Row]) -> None:
        for sampling, alike in _grouped(rows, lambda row: row.request.image_sampling):
            try:
                self._sample_alike(alike, sampling)
            except ValueError:  # of one row or more, which shall not take the others with it
                for row in alike:
                    try:
                        self._sample_alike([row], sampling)
                    except ValueError as error:
                        self._give_up(row, error)

    def _sample_alike(self, rows: list[_Row], sampling: Sampling) -> None:
        sides = 2 if sampling.guided else 1
        hidden = self._hidden[[row.indices[side] for side in range(sides) for row in rows]]
        scales = torch.tensor([row.scales[len(row.codes)] for row in rows], device=hidden.device)
        noise = []
        for row in rows:
            assert row.image_noise is not None  # set when the image opened
            noise.append(row.image_noise.at(len(row.codes))[:, 0])
        codes = sample_next(self.decoder, hidden, sampling, scales[:, None], torch.cat(noise))
        for row, code in zip(rows, codes.tolist(), strict=True):
            row.codes.append(code)
            if len(row.codes) == len(row.scales):
                row.close_image()

    def _give_up(self, row: _Row, error: ValueError) -> None:
        self.failed[row.request] = error
        self._release(row)
        for kept in (*self._cache.keys, *self._cache.values):
            kept[row.indices] = 0.0  # a bias of -inf would not hide NaN from the next request

    def _sample_text(self, rows: list[_Row]) -> None:
        vocabulary = self.decoder.model.config.vocabulary
        never = {vocabulary.eoi_token_id, vocabulary.bos_token_id, vocabulary.pad_token_id} - {
            *vocabulary.eos_token_ids,
            None,
        }
        for sampling, alike in _grouped(rows, lambda row: row.request.text_sampling):
            logits = self.decoder.text_logits(self._hidden[[row.indices[0] for row in alike]]).float()
            logits[:, list(never)] = float("-inf")
            for own, row in zip(logits, alike, strict=True):
                if row.images >= row.request.max_images:
                    own[vocabulary.boi_token_id] = float("-inf")
                if row.request.text_ids is not None:
                    own[row.request.text_ids :] = float("-inf")
            noise = torch.cat([row.text_noise.at(row.written)[:, 0] for row in alike])
            for row, token in zip(alike, sample_codes(logits, sampling, noise).tolist(), strict=True):
                row.written += 1
                if token in vocabulary.eos_token_ids:
                    row.finished = True
                    continue
                row.next = token
                if token != vocabulary.boi_token_id:
                    row.text.append(token)
                    row.finished = row.written >= row.request.max_new_tokens

    def _advance(self) -> None:
        """Run the token that every row has just got and write it to the next column."""
        model, device = self.decoder.model, self._hidden.device
        writing = [(row, row.next) for row in self.rows if row.next is not None]
        sampling = [row for row in self.rows if row.next is None]
        text, coordinates = torch.zeros(self.max_rows, dtype=torch.int64), torch.zeros(self.max_rows, 1, 2)
        opening = []
        for row, token in writing:
            text[row.indices[0]] = token
            coordinates[row.indices[0]] = row.position[0]
            row.position[0] += 1
            if token == model.config.boi_token_id:
                row.close_text()
                opening.append(row)
            row.next = None
        embeds = model.get_input_embeddings()(text.to(device))
        positions = self.decoder.positions(coordinates.to(device)) if writing else self._nowhere.clone()
        image_positions = torch.zeros(self.max_rows, 1, dtype=torch.bool, device=device)
        if sampling:
            indices, codes, placed = [], [], []
            for row in sampling:
                assert row.span is not None
                indices += row.indices
                codes += row.codes[-1:] * len(row.indices)
                placed.append(row.span[:, len(row.codes) - 1])
            embeds[indices] = self.decoder.embed(torch.tensor(codes, device=device)).to(embeds.dtype)
            positions[indices] = torch.cat(placed)[:, None]
            image_positions[indices] = True
        if self._column == self._cache.length:
            self._move(-self._first)
        first = self._first
        self._bias[..., self._column] = 0.0
        used = 1 + max(index for row in self.rows for index in row.indices)  # the free rows above cost nothing
        read = (slice(used), slice(None), slice(first, self._column + 1))
        cache = KeyValueCache(self.length)
        cache.keys, cache.values = [k[read] for k in self._cache.keys], [v[read] for v in self._cache.values]
        cache.column = self._column - first
        bias = self._bias[:used, ..., first : self._column + 1]
        hidden = self.decoder(embeds[:used, None], positions[:used], cache, bias, image_positions[:used])
        self._hidden[:used] = hidden[:, -1]
        self._column += 1
        self._place(
            [(row, 1, row.request.negative) for row in opening if len(row.indices) == 2 and row.request.negative]
        )
        for row in opening:
            row.open_image()


def _grouped(rows: list[_Row], sampling: Callable[[_Row], Sampling]) -> Iterable[tuple[Sampling, list[_Row]]]:
    """Rows that are sampled alike, to be sampled together."""
    groups: dict[Sampling, list[_Row]] = {}
    for row in rows:
        groups.setdefault(sampling(row), []).append(row)
    return groups.items()
