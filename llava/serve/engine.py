"""Answers many requests at a time: what waits is put into one batch, and every row streams and ends by itself.

The batch of `llava/eval/answering/runner.py` with other rows: each has its own limit, sampling, stop strings and end.
Requests that arrive while a batch is being answered form the next one.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from llava.data.images import ProcessedImage
from llava.details import AnsweredRow, Said
from llava.errors import LlavaError
from llava.eval.answering.generation import GenerationOptions, RowSampler
from llava.eval.answering.loading import LoadedModel
from llava.eval.answering.runner import image_arguments, pad_left
from llava.extension import ExtensionSet
from llava.runtime.chat.token_text import TokenDecoder
from llava.runtime.finite_logits import LogitsWatch
from llava.serve.details import row_details
from llava.serve.problems import BusyError, EngineError, StoppedError
from llava.serve.schema import Details
from llava.serve.streaming import StopFilter

logger = logging.getLogger(__name__)

End = Literal["stop", "length", "cancelled"]
Observed = Callable[[AnsweredRow], Mapping[str, Sequence[Said]]]
Formatting = Callable[[], Details]

DETAILS_FAILED = "the details of the answer failed; ask without them, or see the server's log"


@dataclass(frozen=True)
class Job:
    """What one request asks of the model.

    Attributes:
        input_ids: (T,) int64 with `IMAGE_TOKEN_INDEX` for each image.
        images: its images.
        options: temperature, top_p, limit and seed; without beams.
        stops: strings that end the answer and are not part of it.
        positions: what the images take in the sequence.
        ends: tokens that end the answer; None: those of a prompt without template.
        wants_details: say what the extensions did, too; see `llava.serve.details`.
        inference: options of installed packages; jobs with the same ones share a batch.
        extensions: what follows from them; None: the model's own.
    """

    input_ids: Tensor
    images: Sequence[ProcessedImage]
    options: GenerationOptions
    stops: tuple[str, ...] = ()
    positions: int = 0
    ends: tuple[int, ...] | None = None
    wants_details: bool = False
    inference: tuple[tuple[str, str], ...] = ()
    extensions: ExtensionSet | None = None


class Row:
    """A job on its way through the engine.

    Args:
        job: what is asked.
        on_text: called with each piece of the answer, in the engine's thread.
        on_end: called once, with the reason, or with the error that ended it.

    Attributes:
        tokens: number of tokens generated so far, the one that ends the answer included.
        ended: nothing is generated for it any more.
        describe: called when the answer has ended; None while nobody generates, or wants details.
        details: what it gave, before `on_end` is called: a function that formats the details, for another thread.
    """

    def __init__(
        self, job: Job, on_text: Callable[[str], None], on_end: Callable[[End | LlavaError, Row], None]
    ) -> None:
        self.job, self.tokens, self.ended = job, 0, False
        self.describe: Callable[[Row], Formatting] | None = None
        self.details: Formatting | None = None
        self._on_text, self._on_end = on_text, on_end
        self._filter = StopFilter(job.stops)
        self._decoder: TokenDecoder | None = None
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Ask for nothing more; from any thread."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """True if nobody waits for the answer."""
        return self._cancelled.is_set()

    def take(self, token: int, tokenizer: Any, ends: Collection[int]) -> None:
        """The next token of the answer; one of `ends` is its last, and no text."""
        if self.ended:  # padding behind the end
            return
        if self.cancelled:
            self.end("cancelled")
            return
        self.tokens += 1
        self._decoder = self._decoder or TokenDecoder(tokenizer)
        if token not in ends:
            self._say(self._filter.push(self._decoder.push([token])))
        if token in ends or self._filter.stopped:
            self.end("stop")
        elif self.tokens >= self.job.options.max_new_tokens:
            self.end("length")

    def end(self, reason: End | LlavaError) -> None:
        """Say what was held back, and that this is all."""
        if self.ended:
            return
        self.ended = True
        if self._decoder is not None and not isinstance(reason, LlavaError):
            self._say(self._filter.push(self._decoder.rest()))
            self._say(self._filter.rest())
        if self.describe is not None and reason in ("stop", "length"):
            try:
                self.details = self.describe(self)
            except Exception:  # other rows of the batch need no details; the log has the trace
                logger.exception("the details of an answer failed")
                reason = EngineError(DETAILS_FAILED)
        self._on_end(reason, self)

    @property
    def output_ids(self) -> list[int]:
        """What was generated, without the token that ended it."""
        return [] if self._decoder is None else self._decoder.ids

    def _say(self, text: str) -> None:
        if text:
            self._on_text(text)


class _Streams(BaseStreamer):
    """Hands the tokens of each step to their rows, and ends those whose logits are not numbers.

    Args:
        rows: of the batch.
        loaded: model and tokenizer.
        watch: of the same `generate`.
        ends: for each row the tokens that end it.
    """

    def __init__(
        self, rows: Sequence[Row], loaded: LoadedModel, watch: LogitsWatch, ends: Sequence[Collection[int]]
    ) -> None:
        self.rows, self.loaded, self.watch, self.ends = rows, loaded, watch, ends
        self._step = 0

    def put(self, value: Tensor) -> None:
        """Tokens (B,) of a step; before them comes the prompt (B, 0), which enters as embeddings."""
        if value.ndim != 1:
            return
        # The tokens are on the host already, so that the flags cost no wait of their own.
        taken = zip(self.rows, value.tolist(), self.watch.first(), self.ends, strict=True)
        for row, token, broken, ends in taken:
            if broken > self._step:
                row.take(token, self.loaded.tokenizer, ends)
            elif not row.ended:
                logger.error("%s", self.loaded.no_answer("a request"))
                row.end(EngineError(self.loaded.no_answer("this request")))
        self._step += 1

    def end(self) -> None:
        """Nothing: rows end one by one."""


class _Ends(StoppingCriteria):
    """Ends each row when it has ended or nobody waits for it."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Bool (B,)."""
        return torch.tensor([row.ended or row.cancelled for row in self.rows], device=input_ids.device)


class _Samplers(LogitsProcessor):
    """Samples each row by its own options; rows of temperature 0 stay as they are."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.samplers = [RowSampler(row.job.options, ["request"]) if row.job.options.samples else None for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) with one token standing in the rows that are sampled."""
        scores = scores.clone()
        for index, sampler in enumerate(self.samplers):
            if sampler is not None:
                row = slice(index, index + 1)
                scores[row] = sampler(input_ids[row], scores[row])
        return scores


@contextlib.contextmanager
def describing(rows: Sequence[Row], loaded: LoadedModel) -> Iterator[None]:
    """Let the rows that want details have them; the model is not watched where none does."""
    wanted = [(index, row) for index, row in enumerate(rows) if row.job.wants_details]
    with contextlib.ExitStack() as stack:
        if wanted:
            extensions = rows[0].job.extensions or loaded.model.extensions
            observed = stack.enter_context(extensions.observe(loaded.model))
        for index, row in wanted:
            row.describe = partial(_details_of, index=index, observed=observed, loaded=loaded)
        yield


def _details_of(row: Row, *, index: int, observed: Observed, loaded: LoadedModel) -> Formatting:
    answered = AnsweredRow(index, row.job.input_ids, row.output_ids, loaded.tokenizer)
    return partial(row_details, observed(answered), row.job.images, loaded.image_processor)


class Engine:
    """A thread that answers jobs in batches.

    Args:
        loaded: model, tokenizer and image processor.
        max_batch: rows in one `generate`.
        max_waiting: jobs that may wait beside those being answered.
        gather_seconds: how long a first job waits for others, so that requests of the same moment share a batch.
    """

    def __init__(
        self, loaded: LoadedModel, max_batch: int = 16, max_waiting: int = 64, gather_seconds: float = 0.01
    ) -> None:
        self.loaded, self.max_batch, self.gather_seconds = loaded, max_batch, gather_seconds
        self.batches: list[int] = []
        """Number of rows of each batch so far."""
        self.answering: list[Row] = []
        """Rows of the batch at hand."""
        self._waiting: queue.Queue[Row | None] = queue.Queue(max_waiting)
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._closing = threading.Event()

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def close(self) -> None:
        """Finish the batch at hand, and end what still waits with an error."""
        self._closing.set()
        with contextlib.suppress(queue.Full):  # a full queue wakes the thread as well
            self._waiting.put_nowait(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        """True while jobs are answered."""
        return self._thread.is_alive() and not self._closing.is_set()

    @property
    def waiting(self) -> int:
        """Number of rows that no batch has taken yet."""
        return self._waiting.qsize()

    def submit(self, row: Row) -> None:
        """Queue a row.

        Raises:
            BusyError: too many wait already.
            StoppedError: the engine does not run.
        """
        if not self.alive:
            raise StoppedError("the server is shutting down")
        try:
            self._waiting.put_nowait(row)
        except queue.Full as error:
            raise BusyError(f"{self._waiting.maxsize} requests are waiting already; try again later") from error

    def _work(self) -> None:
        while not self._closing.is_set():
            self.answering = self._gather()
            alike: dict[Any, list[Row]] = {}
            for row in self.answering:
                alike.setdefault(row.job.inference, []).append(row)
            for rows in alike.values():
                self.batches.append(len(rows))
                self._answer(rows)
            self.answering = []
        with contextlib.suppress(queue.Empty):
            while True:
                row = self._waiting.get_nowait()
                if row is not None:
                    row.end(StoppedError("the server is shutting down"))

    def _gather(self) -> list[Row]:
        """The next batch; empty when the engine closes."""
        rows, row = [], self._waiting.get()
        until = time.monotonic() + self.gather_seconds
        while row is not None:
            if row.cancelled:
                row.end("cancelled")
            else:
                rows.append(row)
            if len(rows) == self.max_batch:
                break
            try:
                row = self._waiting.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
        return rows

    def _answer(self, rows: list[Row]) -> None:
        """Answer one batch of jobs with the same `inference`; a failure ends its rows with an error, nothing else."""
        try:
            self._generate(rows)
        except torch.OutOfMemoryError:
            halves = [rows[: len(rows) // 2], rows[len(rows) // 2 :]] if len(rows) > 1 else []
            if not halves or any(row.tokens for row in rows):  # what was sent cannot be taken back
                self._fail(rows, "the device ran out of memory; ask for fewer tokens or smaller images")
                return
        except LlavaError as error:  # says what to do, for example with a budget that a rule cannot reach
            logger.warning("a batch of %d requests was refused: %s", len(rows), error)
            self._fail(rows, str(error))
            return
        except Exception:  # the thread must outlive a bad batch; the log has the trace
            logger.exception("a batch of %d requests failed", len(rows))
            self._fail(rows, "the model failed on this request; see the server's log")
            return
        else:
            return
        torch.cuda.empty_cache()
        self.max_batch = max(len(half) for half in halves)
        logger.warning("out of memory: going on with batches of at most %d", self.max_batch)
        for half in halves:
            self._answer(half)

    def _fail(self, rows: Sequence[Row], message: str) -> None:
        for row in rows:
            row.end(EngineError(message))

    def _generate(self, rows: list[Row]) -> None:
        tokenizer, model = self.loaded.tokenizer, self.loaded.model
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        input_ids, attention_mask = pad_left([row.job.input_ids for row in rows], pad)
        watch, usual = LogitsWatch(), self.loaded.answer_end().ids
        ends = [usual if row.job.ends is None else row.job.ends for row in rows]
        # `generate` ends rows at what ends all of them; a row with an end of its own is ended by `_Ends`.
        common = [token for token in ends[0] if all(token in others for others in ends)]
        with describing(rows, self.loaded), torch.no_grad():
            model.generate(
                input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                **image_arguments([row.job.images for row in rows], self.loaded),
                do_sample=False,
                max_new_tokens=max(row.job.options.max_new_tokens for row in rows),
                logits_processor=LogitsProcessorList([watch, _Samplers(rows)]),
                stopping_criteria=StoppingCriteriaList([_Ends(rows)]),
                streamer=_Streams(rows, self.loaded, watch, ends),
                use_cache=True,
                extensions=rows[0].job.extensions,
                pad_token_id=pad,
                **({"eos_token_id": common} if common else {}),
            )
        for row in rows:  # cancelled between two steps
            row.end("cancelled")
