"""Continuous batching: requests join and leave a running batch, each row in its own modality and at its own place.

All rows share the cache column that is written next. A request may join at any step: its prompt is copied to the columns
just before, and a bias hides what other requests left there. A step reads the columns from the oldest running request on;
when the last column is written, the columns in use move together at the front. A guided request holds a second row for its
unconditional side.

In a step every row runs what it has to: a text token, the codes that it has sampled, queries. Rows that run less than
others leave columns empty, which nobody sees; queries stand behind all, in columns that are written again.
"""

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unified.decoding.batch_rows import Request, Row
from unified.decoding.decode import entering_embeddings, noise_of, query_embeddings, sample_cells
from unified.decoding.decoder import Decoder
from unified.decoding.kv_cache import KeyValueCache
from unified.decoding.passes import image_columns
from unified.decoding.prefill import Prompt, check_conditions, prefill, prompt_columns
from unified.decoding.sampling import sample_codes
from unified.prediction.arrange import image_spans
from unified.sequence import Segment, TextSegment


@dataclass
class _Feed:
    """What a row runs in a step.

    Attributes:
        row: the row.
        embeds: ``(1, T, D)``, of codes or a token and then of queries.
        places: ``(sides or 1, T, ...)``, their positions for the decoder.
        asking: how many of them are queries.
        visible: ``(T, T)``, which of them see which; None if all see all.
        is_image: ``(T,)`` or ``(1,)`` for all alike, whether they are an image's own.
    """

    row: Row
    embeds: Tensor
    places: Tensor
    asking: int = 0
    visible: Tensor | None = None
    is_image: Tensor | bool = True


class Batcher:
    """Keeps ``max_rows`` rows busy: submit requests at any time, call :meth:`step` until they are done.

    Args:
        decoder: from :func:`unified.decoding.make_decoder`.
        max_rows: rows of the batch.
        length: columns that a request may fill at most: its text tokens, prompt included, and
            :func:`unified.decoding.passes.image_columns` of its images.
    """

    def __init__(self, decoder: Decoder, max_rows: int, length: int):
        self.decoder, self.length = decoder, length
        self.free = list(range(max_rows))[::-1]  # the lowest one is taken first
        self.max_rows = max_rows
        self.waiting: deque[Request] = deque()
        self.rows: list[Row] = []
        self.failed: dict[Request, ValueError] = {}  # requests that :meth:`step` gave up
        raster = decoder.model.prediction.is_raster and decoder.model.prediction.frame is None
        window = getattr(decoder.model.config.text_config, "sliding_window", None)
        if not raster and window is not None and window < length:
            raise ValueError(
                f"prediction.order: {decoder.model.prediction.order!r} leaves columns empty in a running batch, and layers with a "
                f"window of {window} would count them; generate such images without it."
            )
        # Rows of other orders leave columns empty, and queries stand behind what others write.
        spare = length // 4 if raster else 2 * length
        self._cache = KeyValueCache(length + max(1, spare))
        self._column = 0
        dtype, device = decoder.model.dtype, decoder.model.device
        self._bias = torch.full((max_rows, 1, 1, self._cache.length), float("-inf"), dtype=dtype, device=device)
        self._nowhere = decoder.positions(torch.zeros(1, 1, 2, device=device))

    def submit(self, request: Request) -> None:
        """Queue a request. Raises ValueError as :meth:`check`."""
        self.check(request)
        self.waiting.append(request)

    def check(self, request: Request) -> None:
        """Refuse a request that cannot be run; may be called from any thread.

        Raises:
            ValueError: if it is too long, a row is empty or its images are no valid spans, guidance lacks its negative row,
                or its schedule is refused.
        """
        guided, vocabulary = request.rows == 2, self.decoder.model.config.vocabulary
        if guided and request.negative is None:
            raise ValueError("negative: guidance needs an unconditional row ending with <boi>.")
        if request.max_images:
            request.image_sampling.check_schedule(request.grid[0] * request.grid[1])
        images = request.max_images and request.max_images * image_columns(self.decoder.model, request.grid)
        rows = [request.prompt, request.negative] if guided and request.negative else [request.prompt]
        for name, row in zip(("prompt", "negative"), rows, strict=False):
            if not row.ids:
                raise ValueError(f"{name}: need a row of at least one id.")
            image_spans(np.array(row.ids), row.grids, vocabulary)
        if not request.max_images and request.prompt.ids[-1] == vocabulary.boi_token_id:
            raise ValueError("max_images: 0, but the prompt ends with <boi>; use at least 1.")
        if guided and rows[-1].ids[-1] != vocabulary.boi_token_id:
            raise ValueError("negative: guidance needs an unconditional row ending with <boi>.")
        check_conditions(self.decoder.model, rows)
        if self.decoder.model.config.classes is not None and request.max_new_tokens:
            raise ValueError(f"max_new_tokens: {request.max_new_tokens}, but a model of classes writes no text; use 0.")
        longest = max(prompt_columns(self.decoder.model, row) for row in rows)
        if longest + images + request.max_new_tokens > self.length:
            raise ValueError(
                f"request: {longest} positions and up to {images + request.max_new_tokens} new ones, a row holds {self.length}; "
                "shorten the prompt or lower max_new_tokens or max_images."
            )
        if request.rows > self.max_rows:
            raise ValueError(f"max_rows: {self.max_rows} cannot hold a guided request, which takes 2.")

    def partial(self, request: Request) -> Tensor | None:
        """Codes ``(h, w)`` so far of the image that a request generates, -1 where none is yet; None before it has begun."""
        image = next((row.image for row in self.rows if row.request is request), None)
        return None if image is None else image.codes.reshape(request.grid).cpu()

    def written(self, request: Request) -> list[int]:
        """Ids so far of the text that a request writes; empty before it has begun and in its images."""
        return next((list(row.text) for row in self.rows if row.request is request), [])

    def so_far(self, request: Request) -> list[Segment]:
        """What a request has generated so far, without the image that is being generated; empty before it has begun."""
        row = next((row for row in self.rows if row.request is request), None)
        if row is None:
            return []
        return [*row.segments, *([TextSegment(list(row.text))] if row.text else [])]

    def cancel(self, request: Request) -> None:
        """Forget a request, waiting or running; its rows are free for the next one."""
        if request in self.waiting:
            self.waiting.remove(request)
        for row in [row for row in self.rows if row.request is request]:
            self._release(row)

    def _release(self, row: Row) -> None:
        self.rows.remove(row)
        self.free = sorted(self.free + row.indices, reverse=True)

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self.rows or self.waiting)

    def run(self, requests: Sequence[Request], on_step: Callable[[], None] | None = None) -> list[list[Segment]]:
        """Segments that each request produced, in the order given. Raises ValueError if one of them failed.

        ``on_step`` is called after every step, for those who show what there is so far.
        """
        for request in requests:
            self.submit(request)
        results: dict[Request, list[Segment]] = {}
        while self.busy:
            results.update(self.step())
            if self.failed:
                raise next(iter(self.failed.values()))
            if on_step is not None:
                on_step()
        return [results[request] for request in requests]

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, list[Segment]]]:
        """Admit waiting requests, give every row one token or group of codes; returns the requests that are finished by it.

        A request whose logits are not finite moves to :attr:`failed`; the others go on.
        """
        self._admit()
        self._sample_codes([row for row in self.rows if row.image is not None and row.image.ready])
        self._sample_text([row for row in self.rows if row.image is None and row.next is None])
        done = [row for row in self.rows if row.finished]
        for row in done:
            row.close_text()
            self._release(row)
        if self.rows:
            self._advance()
        return [(row.request, row.segments) for row in done]

    def _admit(self) -> None:
        fresh: list[Row] = []
        while self.waiting and self.waiting[0].rows <= len(self.free):
            request = self.waiting.popleft()
            fresh.append(Row(request, [self.free.pop() for _ in range(request.rows)], self.decoder))
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

    def _place(self, placed: list[tuple[Row, int, Prompt]]) -> None:
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
        longest = max(state.lengths)
        if longest > self._column:
            self._move(longest - self._column)
        for i, (row, side, _) in enumerate(placed):
            index, count = row.indices[side], state.lengths[i]
            columns = slice(self._column - count, self._column)
            row.first = columns.start if side == 0 else min(row.first, columns.start)
            for mine, theirs in ((self._cache.keys, state.cache.keys), (self._cache.values, state.cache.values)):
                for target, source in zip(mine, theirs, strict=True):
                    target[index, :, columns] = source[i, :, end - count : end]
            self._bias[index] = float("-inf")
            self._bias[index, :, :, columns] = 0.0
            states = state.hidden[i][None, None]
            row.states = states if side == 0 else torch.cat([row.states[:1, -1:], states])
            row.position[side] = float(state.position[i])

    @property
    def _first(self) -> int:
        """The first column that is still read."""
        return min((row.first for row in self.rows), default=self._column)

    def _move(self, by: int) -> None:
        """Move the columns that are still read on, to make room for a longer prompt."""
        first, stop = self._first, self._column
        bias = self._bias[..., first:stop].clone()
        self._bias.fill_(float("-inf"))
        self._bias[..., first + by : stop + by] = bias
        for kept in (*self._cache.keys, *self._cache.values):
            kept[:, :, first + by : stop + by] = kept[:, :, first:stop].clone()
        for row in self.rows:
            row.first += by
        self._column += by

    def _compact(self) -> None:
        """Leave out the columns that nobody sees: those of every row end together, as far in front as possible."""
        used = {index: (self._bias[index, 0, 0] == 0).nonzero().flatten() for row in self.rows for index in row.indices}
        end = max(map(len, used.values()))
        self._bias.fill_(float("-inf"))
        for index, columns in used.items():
            place = slice(end - len(columns), end)
            for kept in (*self._cache.keys, *self._cache.values):
                kept[index, :, place] = kept[index][:, columns]
            self._bias[index, :, :, place] = 0.0
        for row in self.rows:
            row.first = end - max(len(used[index]) for index in row.indices)
        self._column = end

    def _sample_codes(self, rows: list[Row]) -> None:
        def alike(row: Row) -> Hashable:
            assert row.image is not None
            group = row.image.passes.groups[row.image.group]
            return (
                row.request.image_sampling,
                group.shape,
                None if group.missing is None else row.image.group,
                row.request.grid,
            )

        self._sample_groups(_grouped(rows, alike), self._sample_codes_alike)

    def _sample_groups(self, groups: list[list[Row]], sample: Callable[[list[Row]], None]) -> None:
        """Sample rows that are alike together; one whose logits are not finite shall not take the others with it."""
        for group in groups:
            try:
                sample(group)
            except ValueError:
                for row in group:
                    try:
                        sample([row])
                    except ValueError as error:
                        self._give_up(row, error)

    def _sample_codes_alike(self, rows: list[Row]) -> None:
        sampling = rows[0].request.image_sampling
        states: list[list[Tensor]] = [[], []]
        noise, scales, groups = [], [], []
        for row in rows:
            assert row.image is not None
            group = row.image.passes.groups[row.image.group]
            own = row.states[:, group.sources].unflatten(1, group.shape)
            for side in range(1 + sampling.guided):
                states[side].append(own[side])
            noise.append(noise_of(row.image.noise, group.ranks)[0])
            scales.append(row.image.scales[int(group.ranks[0])])
            groups.append(group)
        scale = torch.tensor(scales, device=noise[0].device)[:, None, None]
        stacked = torch.stack([*states[0], *states[1]])
        codes, _ = sample_cells(self.decoder, stacked, groups[0].missing, sampling, scale, torch.stack(noise))
        for row, group, own in zip(rows, groups, codes, strict=True):
            assert row.image is not None
            row.image.codes[0, group.codes[0]] = own
            row.image.group += 1
            if row.image.complete:
                row.end_image()

    def _give_up(self, row: Row, error: ValueError) -> None:
        self.failed[row.request] = error
        self._release(row)
        for kept in (*self._cache.keys, *self._cache.values):
            kept[row.indices] = 0.0  # a bias of -inf would not hide NaN from the next request

    def _sample_text(self, rows: list[Row]) -> None:
        self._sample_groups(_grouped(rows, lambda row: row.request.text_sampling), self._sample_text_alike)

    def _sample_text_alike(self, rows: list[Row]) -> None:
        vocabulary = self.decoder.model.config.vocabulary
        ends = set(vocabulary.eos_token_ids)
        never = {vocabulary.eoi_token_id, vocabulary.bos_token_id, vocabulary.pad_token_id} - {*ends, None}
        logits = self.decoder.text_logits(torch.stack([row.states[0, -1] for row in rows])).float()
        logits[:, list(never)] = float("-inf")
        for own, row in zip(logits, rows, strict=True):
            if row.images >= row.request.max_images:
                own[vocabulary.boi_token_id] = float("-inf")
            if row.request.text_ids is not None:
                own[row.request.text_ids :] = float("-inf")
        noise = torch.cat([row.text_noise.at(row.written)[:, 0] for row in rows])
        sampling = rows[0].request.text_sampling
        for row, token in zip(rows, sample_codes(logits, sampling, noise).tolist(), strict=True):
            row.written += 1
            if token in ends:
                row.finished = True
                continue
            row.next = token
            if token != vocabulary.boi_token_id:
                row.text.append(token)
                row.finished = row.written >= row.request.max_new_tokens

    def _advance(self) -> None:
        """Run what every row has to run and write it to the next columns."""
        model = self.decoder.model
        feeds = [self._token(row) if row.image is None else self._codes(row) for row in self.rows]
        asking = max(feed.asking for feed in feeds)
        kept = max(feed.embeds.shape[1] - feed.asking for feed in feeds)
        if self._column + kept + asking > self._cache.length:
            self._compact()
        first, column, end = self._first, self._column, self._column + kept + asking
        used = 1 + max(index for row in self.rows for index in row.indices)  # the free rows above cost nothing
        embeds = feeds[0].embeds.new_zeros(used, kept + asking, feeds[0].embeds.shape[2])
        places = self._nowhere.expand(used, kept + asking, *self._nowhere.shape[2:]).clone()
        image_positions = torch.zeros(used, kept + asking, dtype=torch.bool, device=embeds.device)
        windows = [self._window(feed, kept, embeds.device) for feed in feeds]
        for feed, window in zip(feeds, windows, strict=True):
            for side, index in enumerate(feed.row.indices):
                embeds[index, window], image_positions[index, window] = feed.embeds[0], feed.is_image
                places[index, window] = feed.places[side % len(feed.places)]
        cache = KeyValueCache(end - first)
        read = (slice(used), slice(None), slice(first, end))
        cache.keys, cache.values = [k[read] for k in self._cache.keys], [v[read] for v in self._cache.values]
        cache.column = column - first
        bias = self._among(feeds, windows, used, kept, kept + asking)
        hidden = self.decoder(embeds, places, cache, bias, image_positions)
        self._column += kept
        opening = []
        for feed, window in zip(feeds, windows, strict=True):
            row = feed.row
            row.states = hidden[row.indices][:, window]
            if row.image is not None:
                row.image.ran += feed.embeds.shape[1]
                if row.image.complete:
                    row.close_image()
            else:
                row.position[0] += 1
                if row.next == model.config.boi_token_id:
                    row.close_text()
                    opening.append(row)
                row.next = None
        self._place(
            [(row, 1, row.request.negative) for row in opening if len(row.indices) == 2 and row.request.negative]
        )
        for row in opening:
            row.open_image()

    def _token(self, row: Row) -> _Feed:
        model = self.decoder.model
        token = torch.tensor([[row.next]], device=model.device)
        place = torch.tensor([[[row.position[0]] * 2]], device=model.device)
        return _Feed(row, model.get_input_embeddings()(token), self.decoder.positions(place), is_image=False)

    def _codes(self, row: Row) -> _Feed:
        image = row.image
        assert image is not None
        entering, asking = image.running()
        positions = torch.tensor([*entering, *asking], device=image.codes.device)
        embeds = entering_embeddings(self.decoder, image.codes, image.passes, positions[: len(entering)])
        if asking:
            embeds = torch.cat([embeds, query_embeddings(self.decoder, 1, len(asking))], dim=1)
        is_image, visible = image.passes.is_image(positions)[0], image.passes.visible(positions)
        return _Feed(row, embeds, image.places[:, positions], len(asking), visible, is_image)

    @staticmethod
    def _window(feed: _Feed, kept: int, device: torch.device) -> Tensor:
        """Columns that a row writes, counted from the first of this step: queries behind those of all rows."""
        own = feed.embeds.shape[1] - feed.asking
        return torch.tensor([*range(own), *range(kept, kept + feed.asking)], device=device)

    def _among(self, feeds: list[_Feed], windows: list[Tensor], used: int, kept: int, width: int) -> Tensor:
        """The bias of a step ``(used, 1, width, columns)``; columns that are kept are shown from the next step on."""
        first, column = self._first, self._column
        if width == 1:
            self._bias[..., column] = 0.0
            return self._bias[:used, ..., first : column + 1]
        hidden = float("-inf")
        self._bias[..., column : column + width] = hidden
        bias = self._bias[:used, ..., first : column + width].repeat(1, 1, width, 1)
        bias[..., column - first :].diagonal(dim1=-2, dim2=-1).zero_()  # a position without any column would be NaN
        for feed, window in zip(feeds, windows, strict=True):
            shown = torch.zeros(len(window), len(window), dtype=bias.dtype, device=bias.device)
            if feed.visible is not None:
                shown = shown.masked_fill(~feed.visible, hidden)
            for index in feed.row.indices:
                bias[index, 0, window[:, None], window + column - first] = shown
                self._bias[index, ..., column : column + feed.embeds.shape[1] - feed.asking] = 0.0
        return bias


def _grouped(rows: list[Row], key: Callable[[Row], Hashable]) -> list[list[Row]]:
    """Rows that are sampled alike, to be sampled together."""
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())
